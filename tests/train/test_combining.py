"""Adapters from disk, combined, written, and read by PEFT."""

import peft
import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.adapters.combining import Recipe, combine
from onebase.config.methods import Lora
from onebase.errors import FileFormatError
from onebase.files.peft_format import read_adapter
from onebase.train import saving
from onebase.train.combining import ingredients_on
from tests import tiny

SETTINGS = {
    "pissa": Lora(r=3, init_lora_weights="pissa"),
    "few": Lora(r=4, target_modules=["q_proj", "embed_tokens"], use_rslora=True),
    "patterns": Lora(r=2, rank_pattern={"layers.1.mlp.up_proj": 5}, alpha_pattern={"k_proj": 3}),
}


@pytest.fixture
def base():
    return tiny.base_of("llama")


@pytest.fixture
def stored(base, tmp_path):
    """Three adapters, written and read."""
    bank = Bank(base)
    for name, settings in SETTINGS.items():
        saving.write(tmp_path / name, base, tiny.fill_(bank.add(name, settings)), task="chat")
    for name in SETTINGS:
        bank.remove(name)
    return [read_adapter(tmp_path / name) for name in SETTINGS]


def their_updates(folder) -> dict[str, torch.Tensor]:
    model = peft.PeftModel.from_pretrained(tiny.model_of("llama"), folder)
    return {
        path: module.get_delta_weight("default").detach()
        for path, module in model.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_peft_reads_the_written_sum_as_the_sum_of_what_it_reads(base, stored, tmp_path):
    weights = [1.0, -0.5, 0.25]
    bank = Bank(base)
    settings, tensors = combine(ingredients_on(bank, stored), weights, Recipe("cat"))
    saving.write(tmp_path / "sum", base, bank.add("sum", settings, tensors=tensors), task="chat")
    expected: dict[str, torch.Tensor] = {}
    for weight, one in zip(weights, stored, strict=True):
        for path, update in their_updates(one.folder).items():
            expected[path] = expected.get(path, torch.zeros_like(update)) + weight * update
    found = their_updates(tmp_path / "sum")
    assert found.keys() == expected.keys()
    assert settings.r == 2 * 3 + 2
    assert sorted(settings.rank_pattern.values()) == [4, 2 * 3 + 5, 12, 12]
    for path, update in expected.items():
        torch.testing.assert_close(found[path], update, rtol=0, atol=1e-6 * float(update.abs().max()))


def test_an_adapter_for_another_base_is_refused(stored):
    other = Bank(tiny.base_of("llama", seed=1))
    with pytest.raises(FileFormatError, match="was trained on tiny-llama with weights"):
        ingredients_on(other, stored)
    assert len(ingredients_on(other, stored, allow_base_mismatch=True)) == 3
