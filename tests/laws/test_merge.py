"""A merged folder is a plain model that does what base and adapter do, or it is not there; `verify` tells what is broken."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from onebase.adapters.bank import Bank
from onebase.adapters.ia3 import Ia3Input
from onebase.adapters.lora import LoraPart
from onebase.adapters.merging import check_mergeable, merged_modules, merged_state
from onebase.adapters.part import ModulePart
from onebase.base.fingerprint import fingerprint_of_state
from onebase.base.model import Base
from onebase.base.pretrained import open_pretrained
from onebase.base.writing import write_model
from onebase.config.methods import Ia3, Lora
from onebase.errors import CapacityError, ConfigError, TargetError, VerificationError
from onebase.train import merging
from onebase.train.comparing import compare_modules, inputs_for, numbers_of
from onebase.train.merging import merge
from tests import families, tiny

NO_WEIGHTS = {"bottleneck", "prompt-tuning", "prefix-tuning"}
ROWS = [[5, 9, 11, 40, 7, 3], [8, 60, 4]]


def bank_with(name: str, kind: Any, dtype: torch.dtype = torch.float32, size: float = 0.1, **settings: Any) -> Bank:
    bank = Bank(tiny.base_of(name, dtype=dtype))
    bank.add("other", Lora(r=2, target_modules=["dense"] if name == "bert" else "all-linear"))
    families.perturb_(bank.add("own", kind(**settings), seed=1), 1, size)
    return bank


def merged_to(folder: Path, bank: Bank, **more: Any) -> Any:
    """Merge, and return the folder as anybody would open it."""
    merge(bank, "own", folder, inputs_for(bank, ROWS), **more)
    return plain(folder, bank)


def plain(folder: Path, bank: Bank) -> Any:
    loaded = type(bank.base.model).from_pretrained(folder)
    return loaded.eval()


def unmerged(bank: Bank, row: list[int]) -> torch.Tensor:
    with torch.no_grad(), bank.base.native(bank.sole_route("own")) as model:
        return numbers_of(model(input_ids=torch.tensor([row])))


def check_equal(bank: Bank, model: Any, tolerance: float = 1e-5) -> None:
    for row in ROWS:
        expected = unmerged(bank, row)
        with torch.no_grad():
            found = numbers_of(model(input_ids=torch.tensor([row])))
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "bert", "mixtral"])
def test_every_method_is_merged_into_a_folder_that_transformers_opens_or_says_why_not(name, tmp_path):
    # the fused experts of transformers know no fp64, in which bounds can be narrow
    dtype, tolerance = (torch.float32, 2e-5) if name in families.EAGER else (torch.float64, 1e-7)
    bank = Bank(tiny.base_of(name, dtype=dtype))
    before = fingerprint_of_state(bank.base.model)
    for seed, (label, (kind, settings)) in enumerate(families.variants().items()):
        try:
            adapter = bank.add("own", kind(**settings), seed=seed)
            families.perturb_(tiny.as_dtype_(adapter, dtype), seed, 0.05)
        except (ConfigError, TargetError):
            continue  # docs/coverage.md says which and why
        folder = tmp_path / label
        if adapter.settings.method in NO_WEIGHTS:
            with pytest.raises(ConfigError, match=r"cannot be merged: it.* Ship it as an adapter"):
                check_mergeable(adapter)
            with pytest.raises(ConfigError, match="cannot be merged"):
                merge(bank, "own", folder, [])
            assert not folder.exists()
        else:
            check_equal(bank, merged_to(folder, bank), tolerance)
        bank.remove("own")
    assert fingerprint_of_state(bank.base.model) == before


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_the_folder_holds_what_pefts_merge_and_unload_gives(name, method, tmp_path):
    kind, settings = (Ia3, {}) if method == "ia3" else (Lora, {"r": 4, "use_dora": method == "dora"})
    bank = bank_with(name, kind, **settings)
    adapter = bank.adapters["own"]
    targets = list(adapter.target_paths)
    shared: dict[str, Any] = {"target_modules": targets, "fan_in_fan_out": name == "gpt2"}
    if method == "ia3":
        inner = [part.path for part in adapter.parts if isinstance(part, Ia3Input)]
        config: Any = peft.IA3Config(feedforward_modules=inner, **shared)
    else:
        config = peft.LoraConfig(r=4, lora_alpha=32, use_dora=method == "dora", **shared)
    theirs: Any = peft.get_peft_model(tiny.model_of(name), config)
    peft.set_peft_model_state_dict(theirs, {f"base_model.model.{key}": t for key, t in adapter.state.items()})
    expected = theirs.merge_and_unload().state_dict()
    found = merged_to(tmp_path / "merged", bank).state_dict()
    assert set(found) == set(expected)
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_a_tied_weight_that_changes_on_one_side_is_untied_in_the_folder(target, tmp_path):
    bank = bank_with("llama-tied", Lora, r=4, target_modules=[target])
    model = merged_to(tmp_path / "merged", bank)
    assert model.config.tie_word_embeddings is False
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)
    check_equal(bank, model)
    assert bank.base.model.config.tie_word_embeddings is True


def test_a_tied_weight_that_nothing_changes_stays_tied(tmp_path):
    bank = bank_with("llama-tied", Lora, r=4, target_modules=["q_proj"])
    model = merged_to(tmp_path / "merged", bank)
    assert model.config.tie_word_embeddings is True
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert "lm_head.weight" not in load_file(tmp_path / "merged" / "model.safetensors")


class AlwaysTied(transformers.LlamaForCausalLM):  # type: ignore[misc]
    """A model whose head is its embedding, whatever its configuration says."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        self.lm_head.weight = self.model.embed_tokens.weight


def test_a_tie_that_no_configuration_undoes_is_refused_with_the_weights(tmp_path):
    model = AlwaysTied(tiny.model_of("llama-tied").config)
    bank = Bank(Base(model, name="always-tied"))
    families.perturb_(bank.add("own", Lora(r=4, target_modules=["lm_head"])), 1)
    with pytest.raises(ConfigError, match=r"embed_tokens\.weight and lm_head\.weight are one weight") as caught:
        merge(bank, "own", tmp_path / "merged", inputs_for(bank, ROWS))
    assert "Every AlwaysTied shares them. Ship it as an adapter" in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_an_encoder_decoders_tied_embeddings_are_untied_too(tmp_path):
    bank = bank_with("t5", Lora, r=4, target_modules=["encoder.embed_tokens"])
    model = merged_to(tmp_path / "merged", bank)
    assert not torch.equal(model.encoder.embed_tokens.weight, model.decoder.embed_tokens.weight)


@pytest.mark.parametrize(("own", "stored"), [("bfloat16", None), ("float32", "bfloat16"), ("bfloat16", "float32")])
def test_a_merge_is_computed_in_fp32_and_rounded_once_into_the_format_asked_for(own, stored, tmp_path):
    bank = bank_with("llama", Lora, getattr(torch, own), r=4, target_modules=["q_proj", "down_proj"])
    dtype = None if stored is None else getattr(torch, stored)
    merge(bank, "own", tmp_path / "merged", inputs_for(bank, ROWS), dtype=dtype)
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {dtype or bank.base.dtype}
    for part in bank.adapters["own"].parts:
        pair: Any = part
        exact = bank.places.module(part.path).weight.float() + pair.scaling * (pair.lora_B @ pair.lora_A)
        found = tensors[f"{part.path}.weight"]
        torch.testing.assert_close(found, exact.detach().to(found.dtype), rtol=1e-6, atol=1e-7)


DAMAGED = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("own", "stored", "size"),
    [
        ("float32", None, 0.1),
        ("float32", "bfloat16", 0.003),
        ("bfloat16", None, 0.0003),
        ("float16", "float32", 0.0001),
    ],
)
def test_a_merge_with_one_layers_scale_doubled_is_caught_and_the_layer_named(own, stored, size, tmp_path, monkeypatch):
    bank = bank_with("llama", Lora, getattr(torch, own), size, r=4)
    dtype = None if stored is None else getattr(torch, stored)
    right = LoraPart.merge_

    def wrong(part: Any, module: Any) -> None:
        right(part, module)
        if part.path == DAMAGED:
            right(part, module)

    monkeypatch.setattr(LoraPart, "merge_", wrong)
    with pytest.raises(VerificationError, match=rf"merging failed: {DAMAGED} does not do merged what it does"):
        merge(bank, "own", tmp_path / "merged", inputs_for(bank, ROWS), dtype=dtype)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(LoraPart, "merge_", right)
    merge(bank, "own", tmp_path / "merged", inputs_for(bank, ROWS), dtype=dtype)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2", "bert"])
def test_on_a_half_base_every_methods_merged_modules_are_right_in_fp32_where_no_copy_stands_in(name):
    bank = Bank(tiny.base_of(name, dtype=torch.bfloat16))
    inputs, narrow = inputs_for(bank, ROWS), 0
    for seed, (kind, settings) in enumerate(families.variants().values()):
        try:
            adapter = families.perturb_(bank.add("own", kind(**settings), seed=seed), seed, 0.05)
            found = compare_modules(bank, "own", merged_modules(bank, "own"), inputs)
        except (ConfigError, TargetError):
            found = {}  # docs/coverage.md says which and why
        copied = {part.path for part in bank.adapters["own"].parts if isinstance(part, ModulePart)} if found else set()
        for path, apart in found.items():
            assert apart.value <= apart.bound, (adapter.settings, path, apart)
            assert path in copied or any(bank.places.module(path).children()) or apart.bound == 1e-4
            narrow += apart.bound == 1e-4
        if "own" in bank.adapters:
            bank.remove("own")
    assert narrow > 20


def test_results_that_differ_although_every_tensor_is_right_are_refused_with_the_worst_layer(tmp_path, monkeypatch):
    bank = bank_with("llama", Lora, r=4)
    opened = open_pretrained

    def other(*args: Any, **more: Any) -> Any:
        model, *rest = opened(*args, **more)
        model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *call: 1.5 * call[-1])
        return model, *rest

    monkeypatch.setattr(merging, "open_pretrained", other)
    with pytest.raises(VerificationError, match=rf"read again, does not do .* modules differ {DAMAGED} by 5\.0e-01"):
        merge(bank, "own", tmp_path / "merged", inputs_for(bank, ROWS))
    assert list(tmp_path.iterdir()) == []


def test_a_written_file_that_is_damaged_is_caught_and_the_tensor_named(tmp_path, monkeypatch):
    bank = bank_with("llama", Lora, r=4)
    write = write_model

    def damaged(model: Any, folder: Path, base: Any) -> None:
        write(model, folder, base)
        tensors = load_file(folder / "model.safetensors")
        tensors[f"{DAMAGED}.weight"][3, 4] += 1e-3
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(merging, "write_model", damaged)
    with pytest.raises(VerificationError, match=rf"{DAMAGED}\.weight does not hold what was computed: .* 1\.0e-03"):
        merge(bank, "own", tmp_path / "merged", inputs_for(bank, ROWS))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("own", "stored"), [("bfloat16", None), ("float32", "float16"), ("float32", None)])
@pytest.mark.parametrize("key", [f"{DAMAGED}.weight", "model.norm.weight"])
@pytest.mark.parametrize("where", ["in fp32", "rounded"])
def test_one_number_that_changes_after_the_modules_were_compared_is_caught_and_the_tensor_named(
    own, stored, key, where, tmp_path, monkeypatch
):
    bank = bank_with("llama", Lora, getattr(torch, own), r=4)
    path, _, name = key.rpartition(".")

    def damaged(*args: Any, modules: dict[str, torch.nn.Module], **more: Any) -> Any:
        if where == "in fp32" and path in modules:
            modules[path].get_parameter(name).data[3, 4] *= 1.01
        state = merged_state(*args, modules=modules, **more)
        if where == "rounded" or path not in modules:
            state[key] = state[key].clone()
            state[key].view(-1)[3] *= 1.01
        return state

    monkeypatch.setattr(merging, "merged_state", damaged)
    dtype = None if stored is None else getattr(torch, stored)
    with pytest.raises(
        VerificationError, match=rf"{key} does not hold what was computed: it was changed after its module"
    ):
        merge(bank, "own", tmp_path / "merged", inputs_for(bank, ROWS), dtype=dtype)
    assert list(tmp_path.iterdir()) == []


def test_results_that_are_not_numbers_are_never_within_bounds(tmp_path, monkeypatch):
    bank = bank_with("llama", Lora, r=4)
    right = LoraPart.merge_

    def wrong(part: Any, module: Any) -> None:
        right(part, module)
        if part.path == DAMAGED:
            module.weight[0, 0] = float("nan")

    monkeypatch.setattr(LoraPart, "merge_", wrong)
    with pytest.raises(VerificationError, match=rf"modules differ {DAMAGED} by inf"):
        merge(bank, "own", tmp_path / "merged", inputs_for(bank, ROWS))


def test_an_adapter_that_gives_no_numbers_itself_is_said_to_be_so(tmp_path):
    bank = bank_with("llama", Lora, r=4)
    for _, parameter in bank.adapters["own"].parameters():
        parameter.data.mul_(1e30)
    with pytest.raises(VerificationError, match=r"base and adapter give results that are no numbers .*learning_rate"):
        merge(bank, "own", tmp_path / "merged", inputs_for(bank, ROWS))
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_already_and_what_does_not_fit_is_told_before_anything_is_merged(tmp_path, monkeypatch):
    bank = bank_with("llama", Lora, r=4)
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="is there already"):
        merge(bank, "own", tmp_path / "there", inputs_for(bank, ROWS))
    monkeypatch.setattr("onebase.base.memory.available_bytes", lambda: 1000)
    with pytest.raises(CapacityError, match="of memory are free"):
        merge(bank, "own", tmp_path / "merged", inputs_for(bank, ROWS))
    assert not (tmp_path / "merged").exists()


def test_whoever_can_read_the_configuration_can_read_the_weights(tmp_path):
    merged_to(tmp_path / "merged", bank_with("llama", Lora, r=4))
    modes = {path.name: path.stat().st_mode for path in (tmp_path / "merged").iterdir()}
    assert modes["model.safetensors"] == modes["config.json"]


def test_generation_settings_are_written_as_they_are(tmp_path):
    bank = bank_with("llama", Lora, r=4)
    own = transformers.GenerationConfig(temperature=0.3, top_p=0.8, max_new_tokens=77, eos_token_id=[2, 5])
    bank.base.model.generation_config = own  # a temperature without sampling: saving it again would be refused
    model = merged_to(tmp_path / "merged", bank)
    for key in ("temperature", "top_p", "max_new_tokens", "eos_token_id"):
        assert getattr(model.generation_config, key) == getattr(own, key)


def with_sentence_files(folder: Path, parts: dict[str, dict[str, str]]) -> dict[str, bytes]:
    """Write what sentence-transformers keeps beside a model's weights, and return it."""
    listed = [{"idx": i, "name": str(i), "path": part, "type": "..."} for i, part in enumerate(["", *parts])]
    files = {"modules.json": json.dumps(listed), "sentence_bert_config.json": '{"max_seq_length": 256}'}
    files |= {f"{part}/{name}": text for part, inside in parts.items() for name, text in inside.items()}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return {name: text.encode() for name, text in files.items()}


def test_what_sentence_transformers_keeps_beside_an_encoder_goes_with_it_and_not_with_a_classifier(tmp_path):
    files = with_sentence_files(tmp_path / "base", {"1_Pooling": {"config.json": "{}"}, "2_Normalize": {}})
    encoder = tiny.model_of("bert")
    classifier = transformers.BertForSequenceClassification(tiny.model_of("bert").config)
    for model, there in ((encoder, files), (classifier, {})):
        bank = Bank(Base(model.eval(), name="sentences", folder=tmp_path / "base", fingerprint="none"))
        bank.add("own", Lora(r=2, target_modules=["query"]))
        said: list[str] = []
        out = tmp_path / type(model).__name__
        merge(bank, "own", out, inputs_for(bank, ROWS), note=said.append)
        assert {name: (out / name).read_bytes() for name in files if (out / name).exists()} == there
        told = (
            "with sentence-transformers' modules.json" if there else "without modules.json and what it names.*classes"
        )
        assert any(re.search(told, line) for line in said)


@pytest.mark.parametrize(
    ("parts", "words"),
    [
        ({"2_Dense": {"config.json": "{}", "pytorch_model.bin": ""}}, "2_Dense/pytorch_model.bin is a pickle"),
        ({"../other": {"config.json": "{}"}}, "'../other' in it is no folder beside it"),
        ({"..": {}}, "'..' in it is no folder beside it"),
    ],
)
def test_what_sentence_transformers_keeps_goes_whole_or_not_at_all(parts, words, tmp_path):
    with_sentence_files(tmp_path / "base", parts)
    bank = Bank(Base(tiny.model_of("bert"), name="sentences", folder=tmp_path / "base", fingerprint="none"))
    bank.add("own", Lora(r=2, target_modules=["query"]))
    said: list[str] = []
    merge(bank, "own", tmp_path / "out", inputs_for(bank, ROWS), note=said.append)
    assert any(words in line for line in said)
    assert not (tmp_path / "out" / "modules.json").exists()
