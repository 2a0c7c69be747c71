"""A head that any method changes: the loss in chunks equals the model's own logits, forward and backward."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from onebase.adapters.bank import Bank
from onebase.base.model import Base
from onebase.config.methods import BitFit, Full, Ia3, Lora
from onebase.measure.forward import forward_loss
from onebase.ops import loss as loss_op
from tests import tiny
from tests.adapters.against_peft import CLOSE, filled

HEADS: dict[str, Any] = {
    "full": Full(target_modules=["embed_tokens", "lm_head"]),
    "saved": Lora(r=3, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "lora": Lora(r=3, target_modules=["lm_head", "q_proj"]),
    "dora": Lora(r=3, use_dora=True, target_modules=["lm_head", "q_proj"]),
    "ia3": Ia3(target_modules=["lm_head", "k_proj"]),
    "ia3-input": Ia3(target_modules=["lm_head", "down_proj"], feedforward_modules=["lm_head"]),
}


def full_logits_loss(base, bank, examples, owners, weight):
    """Return the weighted sum of losses from the model's own logits, each example alone."""
    total = torch.zeros((), dtype=torch.float64)
    for example, owner in zip(examples, owners, strict=True):
        ids = torch.from_numpy(example.token_ids.astype("int64"))
        with base.native(bank.sole_route(owner)) as model:
            logits = model(ids[None], use_cache=False).logits[0]
        targets = torch.where(torch.from_numpy(example.labelled.copy()), ids, -100)[1:]
        total = total + weight * F.cross_entropy(logits[:-1], targets, reduction="sum")
    return total


@pytest.mark.parametrize("architecture", ["llama", "llama-tied", "gemma2", "granite"])
@pytest.mark.parametrize("kind", sorted(HEADS))
def test_each_adapters_own_head_in_one_batch_equals_the_models_own_logits(kind, architecture, monkeypatch):
    """Other heads stand beside it in the batch; chunks are shorter than an example."""
    monkeypatch.setattr(loss_op, "chunk_rows", lambda vocabulary: 4)
    base = tiny.base_of(architecture, dtype=torch.float64)
    bank = Bank(base)
    for name, settings in {"dummy": HEADS["lora"], "one": HEADS[kind], "two": HEADS["ia3"]}.items():
        filled(bank, name, settings)
    examples, owners = tiny.examples_of(9, 14, 5, 7), ("one", None, "two", "one")
    batch = tiny.batch_of(examples, *owners)
    loss, rows = forward_loss(bank, batch, 0.125)
    loss.backward()
    found = {name: tiny.gradients(bank, name) for name in bank.adapters}
    tiny.clear_gradients(bank)
    expected = full_logits_loss(base, bank, examples, owners, 0.125)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-7)  # Gemma 2 takes its softmax in fp32
    assert rows.loss.sum().item() * 0.125 == pytest.approx(expected.item(), rel=1e-7)
    for name in bank.adapters:
        for key, gradient in tiny.gradients(bank, name).items():
            scale = max(float(gradient.abs().max()), 1e-9)
            torch.testing.assert_close(found[name][key] / scale, gradient / scale, **CLOSE)
    assert all(gradient.any() for gradient in found["one"].values())
    assert not any(gradient.any() for gradient in found["dummy"].values())


def test_without_gradients_for_the_head_hidden_rows_still_get_theirs_through_it():
    base = tiny.base_of(dtype=torch.float64)
    bank = Bank(base)
    filled(bank, "head", HEADS["ia3"])
    for parameter in (p for key, p in bank.adapters["head"].parameters() if "lm_head" in key):
        parameter.requires_grad_(False)
    examples = tiny.examples_of(9, 14)
    forward_loss(bank, tiny.batch_of(examples, "head"), 0.5)[0].backward()
    found = tiny.gradients(bank, "head")
    tiny.clear_gradients(bank)
    full_logits_loss(base, bank, examples, ("head", "head"), 0.5).backward()
    for key, gradient in tiny.gradients(bank, "head").items():
        torch.testing.assert_close(found[key], gradient, rtol=1e-7, atol=1e-9)


def test_a_head_with_pairs_alone_keeps_the_closed_form():
    bank = tiny.bank_of(tiny.base_of(), "one", target_modules=["lm_head"])
    assert bank.head.linear is None
    bank.add("two", Ia3(target_modules=["lm_head"]))
    assert bank.head.linear is not None
    bank.remove("two")
    assert bank.head.linear is None


def test_a_trained_bias_of_a_head_is_part_of_it():
    model = tiny.model_of("llama", dtype=torch.float64)
    model.lm_head.bias = torch.nn.Parameter(torch.linspace(-1, 1, tiny.VOCABULARY).double())
    base = Base(model, name="with-bias")
    bank = Bank(base)
    filled(bank, "one", BitFit(target_modules=["lm_head"]))
    examples = tiny.examples_of(9, 14)
    loss, _ = forward_loss(bank, tiny.batch_of(examples, "one"), 0.5)
    loss.backward()
    found = tiny.gradients(bank, "one")["lm_head.bias"]
    tiny.clear_gradients(bank)
    expected = full_logits_loss(base, bank, examples, ("one", "one"), 0.5)
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    torch.testing.assert_close(found, tiny.gradients(bank, "one")["lm_head.bias"])
