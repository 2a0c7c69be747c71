"""A micro-batch's loss is the weighted sum over its labels, and its gradient is that of all logits at once."""

import pytest
import torch
import torch.nn.functional as F

from onebase.measure.forward import forward_loss
from tests import tiny


def by_full_logits(bank, examples, owners, weight):
    total = torch.zeros((), dtype=torch.float64)
    for example, owner in zip(examples, owners, strict=True):
        ids = torch.from_numpy(example.token_ids.astype("int64"))
        with bank.base.native(bank.sole_route(owner)) as model:
            logits = model(ids[None], use_cache=False).logits[0]
        targets = torch.where(torch.from_numpy(example.labelled.copy()), ids, -100)[1:]
        total = total + weight * F.cross_entropy(logits[:-1], targets, reduction="sum")
    return total


@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "granite", "cohere", "opt-projected", "bloom"])
def test_the_loss_and_its_gradient_are_those_of_the_models_own_logits(name):
    bank = tiny.bank_of(tiny.base_of(name, dtype=torch.float64), "one", "two")
    examples, owners = tiny.examples_of(9, 14, 5, 2), ("one", None, "two", "one")
    loss, rows = forward_loss(bank, tiny.batch_of(examples, *owners), 0.01)
    loss.backward()
    found = {member: tiny.gradients(bank, member) for member in bank.adapters}
    tiny.clear_gradients(bank)
    total = by_full_logits(bank, examples, owners, 0.01)
    total.backward()
    assert loss.item() == pytest.approx(total.item(), rel=1e-6)
    assert rows.loss.sum().item() * 0.01 == pytest.approx(total.item(), rel=1e-6)
    for member in bank.adapters:
        for key, gradient in tiny.gradients(bank, member).items():
            torch.testing.assert_close(found[member][key], gradient, rtol=1e-4, atol=1e-7)
    assert any(g.any() for g in found["two"].values())


def test_an_exact_weight_is_not_rounded():
    bank = tiny.bank_of(tiny.base_of(dtype=torch.float64), "one")
    batch = tiny.batch_of(tiny.examples_of(9, 14), "one")
    loss, rows = forward_loss(bank, batch, 1 / 3)
    assert loss.item() == pytest.approx(rows.loss.sum().item() / 3, rel=1e-13)


def test_dropout_is_on_with_a_step_alone():
    bank = tiny.bank_of(tiny.base_of(), "one", lora_dropout=0.5)
    batch = tiny.batch_of(tiny.examples_of(9, 14), "one")
    plain, first, again, second = (
        forward_loss(bank, batch, 1.0, dropout_step=step)[0].item() for step in (None, 0, 0, 1)
    )
    assert first == again
    assert len({plain, first, second}) == 3


def test_dropout_reaches_an_adapted_head():
    bank = tiny.bank_of(tiny.base_of(), "one", lora_dropout=0.5, target_modules=["lm_head"])
    batch = tiny.batch_of(tiny.examples_of(9, 14), "one")
    assert len({forward_loss(bank, batch, 1.0, dropout_step=step)[0].item() for step in (None, 0, 1)}) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "bloom"])
def test_a_base_in_half_precision_trains_fp32_adapters(name, dtype):
    exact = tiny.bank_of(tiny.base_of(name), "one")
    half = tiny.bank_of(tiny.base_of(name, dtype=dtype), "one", dtype=torch.float32)
    batch = tiny.batch_of(tiny.examples_of(9, 14), "one")
    losses = []
    for bank in (exact, half):
        loss, _ = forward_loss(bank, batch, 0.1)
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
    one, other = (torch.cat([g.flatten() for g in tiny.gradients(bank, "one").values()]) for bank in (exact, half))
    assert other.dtype == torch.float32
    assert F.cosine_similarity(one, other, 0) > 0.98
