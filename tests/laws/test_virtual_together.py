"""Members with virtual tokens, together and alone: the same bits, and a NaN stays with its owner."""

from typing import Any

import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.config.methods import Lora, PrefixTuning, PromptTuning
from onebase.measure.forward import batches_of, forward_loss
from tests import tiny

METHODS: dict[str, Any] = {
    "prompt": PromptTuning(num_virtual_tokens=5),
    "prefix": PrefixTuning(num_virtual_tokens=7),
    "lora": Lora(r=3),
    "projected": PrefixTuning(num_virtual_tokens=3, prefix_projection=True),
}


def bank_and_batches(name: str, dtype: torch.dtype) -> tuple[Bank, list[Any]]:
    bank = Bank(tiny.base_of(name, dtype=dtype))
    batches: list[Any] = []
    for seed, (label, settings) in enumerate(METHODS.items()):
        if name != "gpt2" or label != "lora":
            tiny.fill_(bank.add(label, settings, seed=seed), seed=seed)
            batches += batches_of(bank, label, tiny.examples_of(9, 17, 5, seed=seed), range(3), 10**6)
    return bank, batches


def run(bank: Bank, batch: Any) -> tuple[torch.Tensor, dict[str, dict[str, torch.Tensor]]]:
    tiny.clear_gradients(bank)
    loss, rows = forward_loss(bank, batch, 0.1)
    loss.backward()
    return rows.loss, {label: tiny.gradients(bank, label) for label in bank.adapters}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["llama", "gemma2", "mistral", "gpt2", "opt"])
def test_losses_and_gradients_are_byte_identical_together_and_alone(name, dtype):
    bank, batches = bank_and_batches(name, dtype)
    alone = [run(bank, batch) for batch in batches]
    losses, gradients = run(bank, tiny.together(*batches))
    assert torch.equal(losses, torch.cat([own for own, _ in alone]))
    for label, (_, own) in zip(bank.adapters, alone, strict=True):
        for key, gradient in gradients[label].items():
            assert gradient.abs().max() > 0
            assert torch.equal(gradient, own[label][key]), (label, key)


@pytest.mark.parametrize("sick", ["prompt", "prefix", "projected"])
def test_a_nan_in_one_members_virtual_tokens_leaves_the_others_byte_identical(sick):
    bank, batches = bank_and_batches("llama", torch.float32)
    losses, gradients = run(bank, tiny.together(*batches))
    next(bank.adapters[sick].parameters())[1].data.fill_(float("nan"))
    after, found = run(bank, tiny.together(*batches))
    counts = [batch.label_count for batch in batches]
    for label, before, own in zip(bank.adapters, losses.split(counts), after.split(counts), strict=True):
        if label == sick:
            assert bool(own.isnan().any())
            continue
        assert torch.equal(before, own)
        assert all(torch.equal(gradient, found[label][key]) for key, gradient in gradients[label].items())


def test_two_checkpointed_forwards_before_their_backwards_equal_plain_ones():
    bank, (prompt, prefix, lora, projected) = bank_and_batches("llama", torch.float32)
    found = []
    for recompute in (False, True):
        tiny.clear_gradients(bank)
        with bank.base.activation_checkpointing(recompute):
            mixed = [tiny.together(prompt, lora, projected), tiny.together(prefix, prompt)]
            for loss in [forward_loss(bank, batch, 0.1)[0] for batch in mixed]:
                loss.backward()
        found.append({label: tiny.gradients(bank, label) for label in bank.adapters})
    for label, gradients in found[0].items():
        assert all(gradient.abs().max() > 0 for gradient in gradients.values())
        assert all(torch.equal(gradient, found[1][label][key]) for key, gradient in gradients.items()), label
