"""Laws of the portable form: the same model to PEFT and to onebase, with nothing left that a server might not read."""

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.base.model import Base
from onebase.config.methods import Bottleneck, Ia3, Lora, PromptTuning
from onebase.errors import ConfigError, VerificationError
from onebase.files.lint import lint
from onebase.files.serving import TOOLS
from onebase.train import portable, saving
from onebase.train.portable import export_portable
from tests.tiny import fill_, model_of

PLAIN: dict[str, tuple[str, Lora]] = {
    "patterns": ("llama", Lora(r=4, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}, use_rslora=True)),
    "pissa": ("llama", Lora(r=3, init_lora_weights="pissa")),
    "layers": ("llama", Lora(r=4, target_modules=["q_proj", "up_proj"], layers_to_transform=[1])),
    "expression": ("llama", Lora(r=4, target_modules=r"model\.layers\.0\..*_proj")),
    "head": ("llama", Lora(r=4, target_modules=["lm_head", "embed_tokens", "q_proj"], rank_pattern={"q_proj": 7})),
    "tied": ("llama-tied", Lora(r=4, target_modules=["embed_tokens", "q_proj"], ensure_weight_tying=True)),
    "gpt2": ("gpt2", Lora(r=4, lora_alpha=5, target_modules=["c_attn", "c_proj"], layers_to_transform=[0])),
}
IDS = torch.arange(3, 15).view(2, 6)


def bank_and_folder(name: str, settings: Any, folder: Path) -> tuple[Bank, Path]:
    base = Base(model_of(name), name="tiny")
    bank = Bank(base)
    saving.write(folder, base, fill_(bank.add("a", settings)), task="text")
    return bank, folder


def as_peft_answers(model: Any, folder: Path) -> torch.Tensor:
    with torch.no_grad():
        return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).eval()(IDS).logits


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", PLAIN)
def test_peft_answers_alike_and_every_server_has_the_right_scale(name: str, tmp_path: Path) -> None:
    kind, settings = PLAIN[name]
    bank, folder = bank_and_folder(kind, settings, tmp_path / "a")
    found = export_portable(bank, "a", folder, tmp_path / "b")
    assert list(bank.adapters) == ["a"]
    model = model_of(kind)
    before, after = as_peft_answers(model, folder), as_peft_answers(model, tmp_path / "b")
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(after, model(IDS).logits, atol=0.1)
    config = json.loads((tmp_path / "b" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == found.r
    assert all(isinstance(name, str) and "." not in name for name in config["target_modules"])
    changing = ("rank_pattern", "alpha_pattern", "use_rslora", "layers_to_transform", "exclude_modules")
    assert not any(config[name] for name in changing)
    alone = name not in ("head", "tied")
    asked = [tool for tool in TOOLS if tool != "diffusers" and (alone or tool != "sglang")]
    assert {one.verdict for one in lint(tmp_path / "b", asked)} == {"loads"}
    assert (found.zero_pairs > 0) == (name in ("layers", "expression", "gpt2"))


REFUSED: dict[str, tuple[Any, str, str]] = {
    "dora": (Lora(r=4, use_dora=True), "use_dora", "onebase. A plain model can hold it"),
    "bias": (Lora(r=4, bias="all"), "bias: all", "onebase, transformers. A plain model"),
    "whole": (Lora(r=4, modules_to_save=["lm_head"]), "modules_to_save", "onebase, transformers. A plain model"),
    "tokens": (Lora(r=4, trainable_token_indices=[3]), "trainable_token_indices", "onebase, transformers. A plain"),
    "ia3": (Ia3(), "the adapter is IA3", "onebase, transformers. A plain model can hold it"),
    "bottleneck": (Bottleneck(), "the adapter is", "loads in onebase."),
    "prompt": (PromptTuning(num_virtual_tokens=3, prompt_tuning_init="RANDOM"), "the adapter is", "in onebase."),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_pairs_cannot_hold_is_refused_with_what_can(name: str, tmp_path: Path) -> None:
    settings, told, instead = REFUSED[name]
    base = Base(model_of("llama", attention_bias=True), name="tiny")
    bank = Bank(base)
    saving.write(tmp_path / "a", base, fill_(bank.add("a", settings)), task="text")
    with pytest.raises(ConfigError) as caught:
        export_portable(bank, "a", tmp_path / "a", tmp_path / "b")
    assert told in str(caught.value) and instead in str(caught.value)
    assert ("onebase merge" in str(caught.value)) == (name not in ("bottleneck", "prompt"))
    assert not (tmp_path / "b").exists()


def test_a_form_that_is_not_the_adapter_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, folder = bank_and_folder("llama", PLAIN["patterns"][1], tmp_path / "a")
    made = portable.portable_form

    def damaged(*given: Any) -> Any:
        settings, tensors, zeros = made(*given)
        tensors["model.layers.1.mlp.up_proj.lora_B.weight"] *= 1 + 1e-5
        return settings, tensors, zeros

    monkeypatch.setattr(portable, "portable_form", damaged)
    with pytest.raises(VerificationError, match=r"the update of model\.layers\.1\.mlp\.up_proj differs"):
        export_portable(bank, "a", folder, tmp_path / "b")
    assert not (tmp_path / "b").exists() and list(bank.adapters) == ["a"]


def test_outputs_that_are_no_numbers_are_no_proof(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, folder = bank_and_folder("llama", PLAIN["patterns"][1], tmp_path / "a")
    monkeypatch.setattr(portable, "numbers_of", lambda out: torch.full((2,), float("nan")))
    with pytest.raises(VerificationError, match="they differ by nan"):
        export_portable(bank, "a", folder, tmp_path / "b")


def test_an_adapter_with_a_scale_folded_wrong_shows_in_the_outputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, folder = bank_and_folder("llama", PLAIN["patterns"][1], tmp_path / "a")
    made = portable.portable_form

    def damaged(*given: Any) -> Any:
        settings, tensors, zeros = made(*given)
        tensors["model.layers.1.mlp.up_proj.lora_B.weight"] *= 2
        return settings, tensors, zeros

    monkeypatch.setattr(portable, "portable_form", damaged)
    monkeypatch.setattr(portable, "check_updates", lambda *given: 0.0)
    with pytest.raises(VerificationError, match="gives other outputs"):
        export_portable(bank, "a", folder, tmp_path / "b")
    shutil.rmtree(tmp_path / "a")
    assert not list(tmp_path.iterdir())
