"""Copies, token rows, tied weights and heads beside each other in one flat batch: each equals itself alone."""

from typing import Any

import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.config.methods import BitFit, Bottleneck, Full, Ia3, LnTuning, Lora
from onebase.measure.forward import forward_loss
from tests import tiny
from tests.adapters.against_peft import filled

HEAD_AND_EMBEDDING = {"gpt2": ["wte", "lm_head"], "llama-tied": ["embed_tokens", "lm_head"]}
IDS = [3, 17, 40, 9]


def members(name: str) -> dict[str, Any]:
    embedding, head = HEAD_AND_EMBEDDING[name]
    pair: dict[str, Any] = {"r": 3, "lora_alpha": 6}
    made = {
        "plain": Lora(**pair),
        "rows": Lora(**pair, target_modules="attention", trainable_token_indices=IDS),
        "rows of the head": Lora(**pair, target_modules="mlp", trainable_token_indices={head: IDS}),
        "saved": Lora(**pair, target_modules="mlp", modules_to_save=[head]),
        "saved and tied": Lora(**pair, target_modules="mlp", modules_to_save=[embedding], ensure_weight_tying=True),
        "tied pair": Lora(**pair, target_modules=[embedding], ensure_weight_tying=True),
        "dora on the head": Lora(**pair, target_modules=[head], use_dora=True),
        "ia3 on the head": Ia3(target_modules=[head]),
        "norms": LnTuning(),
        "bottleneck": Bottleneck(placement="houlsby"),
        "everything": Full(),
        "tied weight alone": Full(target_modules=[embedding, head]),
    }
    return made | ({"biases": BitFit()} if name == "gpt2" else {})


def bank_with(name: str, labels: list[str]) -> Bank:
    bank = Bank(tiny.base_of(name, dtype=torch.float64))
    for label, settings in members(name).items():
        if label in labels:
            filled(bank, label.replace(" ", "-"), settings, size=0.1)
    return bank


def run(bank: Bank, owners: list[str], which: list[int]) -> tuple[dict[int, torch.Tensor], dict[str, Any]]:
    """Return the losses by example and the gradients by adapter of a batch of the examples `which`."""
    tiny.clear_gradients(bank)
    examples = tiny.examples_of(*[5 + 3 * i % 11 for i in range(len(owners))])
    batch = tiny.batch_of(type(examples)([examples[i] for i in which]), *[owners[i] for i in which])
    loss, rows = forward_loss(bank, batch, 0.125)
    loss.backward()
    pieces = rows.loss.split([node.labels for node in batch.layout.nodes])
    return dict(zip(which, pieces, strict=True)), {a: tiny.gradients(bank, a) for a in bank.adapters}


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_each_equals_itself_alone_in_losses_and_gradients(name):
    labels = list(members(name))
    owners = [label.replace(" ", "-") for label in [*labels, *reversed(labels)]]
    losses, gradients = run(bank_with(name, labels), owners, list(range(len(owners))))
    for label in labels:
        adapter = label.replace(" ", "-")
        own, own_gradients = run(
            bank_with(name, [label]), owners, [i for i, owner in enumerate(owners) if owner == adapter]
        )
        for i, loss in own.items():
            torch.testing.assert_close(losses[i], loss, rtol=1e-9, atol=1e-10)
        for key, gradient in own_gradients[adapter].items():
            torch.testing.assert_close(gradients[adapter][key], gradient, rtol=1e-6, atol=1e-9)
        assert any(gradient.any() for gradient in own_gradients[adapter].values())


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_two_checkpointed_forwards_before_their_backwards_each_keep_their_route(name):
    labels = ["rows", "saved and tied", "everything", "norms", "bottleneck", "ia3 on the head", "tied pair"]
    owners = [label.replace(" ", "-") for label in labels]
    expected = bank_with(name, labels)
    examples = tiny.examples_of(*[5 + 3 * i % 11 for i in range(len(owners))])
    batches = [tiny.batch_of(examples, *owners), tiny.batch_of(examples, *reversed(owners))]
    for batch in batches:
        forward_loss(expected, batch, 0.5)[0].backward()
    bank = bank_with(name, labels)
    with bank.base.activation_checkpointing():
        losses = [forward_loss(bank, batch, 0.5)[0] for batch in batches]
        for loss in losses:
            loss.backward()
    for adapter in bank.adapters:
        found, wanted = tiny.gradients(bank, adapter), tiny.gradients(expected, adapter)
        for key, gradient in wanted.items():
            torch.testing.assert_close(found[key], gradient, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["llama-tied", "gpt2"])
def test_a_neighbour_in_the_bank_that_owns_no_row_changes_no_bit_of_a_gradient(name):
    """Members that take turns: every other method waits in the bank while one learns."""
    labels = list(members(name))
    results = []
    for others in ([], labels):
        bank = Bank(tiny.base_of(name))
        for label in ["plain", *others]:
            if label not in (name.replace("-", " ") for name in bank.adapters):
                bank.add(label.replace(" ", "-"), members(name)[label], seed=3)
        results.append(run(bank, ["plain"] * 3, [0, 1, 2]))
    (losses, gradients), (beside, gradients_beside) = results
    assert all(torch.equal(loss, beside[i]) for i, loss in losses.items())
    assert all(torch.equal(g, gradients_beside["plain"][key]) for key, g in gradients["plain"].items())
