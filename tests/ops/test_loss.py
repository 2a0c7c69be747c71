"""The loss by chunks equals cross-entropy on all logits at once, in value and in every gradient."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.base.kernels import use_kernels
from onebase.ops import loss as loss_module
from onebase.ops import native
from onebase.ops.keyed import mix, position_keys
from onebase.ops.loss import HeadRecord, chunk_rows, head_loss, reference
from onebase.ops.low_rank import reference as low_rank_reference
from onebase.ops.segments import NO_OWNER, Segments
from tests.ops.test_low_rank import low_rank_of, numbers

EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}
HIDDEN, VOCABULARY = 5, 11


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """16 rows a chunk, so that few rows make several chunks."""
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 1)
    assert chunk_rows(VOCABULARY) == 16


@st.composite
def heads(draw):
    weight = numbers(VOCABULARY, HIDDEN, seed=3).requires_grad_(draw(st.booleans()))
    bias = draw(st.sampled_from([None, False, True]))
    adapted = draw(st.sampled_from(["no", "frozen", "trained"]))
    update = None
    if adapted != "no":
        update = low_rank_of([2, 3], [1, NO_OWNER, 0], inputs=HIDDEN, outputs=VOCABULARY, dropout=0.3)
        for part in (*update.lora_A, *update.lora_B):
            part.requires_grad_(adapted == "trained")
    return HeadRecord(
        weight,
        None if bias is None else numbers(VOCABULARY, seed=4).requires_grad_(bias),
        scale=draw(st.sampled_from([1.0, 0.4])),
        soft_cap=draw(st.sampled_from([None, 1.5])),
        update=update,
    )


def rows_of(count, seed=0):
    draws = torch.Generator().manual_seed(seed)
    hidden = torch.randn(count, HIDDEN, generator=draws, dtype=torch.float64).requires_grad_()
    labels = torch.randint(VOCABULARY, (count,), generator=draws)
    weights = torch.rand(count, generator=draws, dtype=torch.float64)
    return hidden, labels, weights


def full_logits(hidden, head, segments, keys=None):
    """Written out: no custom operation, all rows at once."""
    z = hidden @ head.weight.T + (0 if head.bias is None else head.bias)
    if head.update is not None:
        z = low_rank_reference(z, hidden, head.update, segments, keys)
    z = z * head.scale
    return z if head.soft_cap is None else head.soft_cap * torch.tanh(z / head.soft_cap)


@settings(max_examples=150)
@given(heads(), st.lists(st.tuples(st.integers(0, 20), st.integers(NO_OWNER, 3)), min_size=1, max_size=4),
       st.sampled_from([0.0, 0.1]), st.booleans())  # fmt: skip
def test_loss_and_every_gradient_equal_those_of_full_logits(head, parts, smoothing, with_keys):
    segments = Segments.of([length for length, _ in parts], [owner for _, owner in parts])
    hidden, labels, weights = rows_of(segments.row_count)
    keys = position_keys(mix(1), 0, segments.row_count) if with_keys else None
    total, rows = head_loss(hidden, labels, weights, head, segments, keys, smoothing)
    logits = full_logits(hidden, head, segments, keys)
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
    meant = (losses * weights).sum()
    torch.testing.assert_close(total, meant, **EXACT)
    torch.testing.assert_close(rows.loss, losses, **EXACT)
    assert torch.equal(rows.correct, logits.argmax(1) == labels)
    if keys is None:
        torch.testing.assert_close(reference(hidden, labels, weights, head, segments, smoothing), meant, **EXACT)
    parts = (hidden, *head.trainable())
    found = torch.autograd.grad(3 * total, parts, allow_unused=True)
    expected = torch.autograd.grad(3 * meant, parts, allow_unused=True)
    for part, one, other in zip(parts, found, expected, strict=True):
        zero = torch.zeros_like(part)
        torch.testing.assert_close(zero if one is None else one, zero if other is None else other, **EXACT)


@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 31, 32, 33, 48])
@pytest.mark.parametrize("trained", [False, True])
def test_the_number_of_rows_a_chunk_changes_nothing(count, trained, monkeypatch):
    head = HeadRecord(numbers(VOCABULARY, HIDDEN).requires_grad_(trained), soft_cap=2.0)
    segments = Segments.of([count], [0])

    def run():
        hidden, labels, weights = rows_of(count)
        head.weight.grad = None
        total, rows = head_loss(hidden, labels, weights, head, segments)
        total.backward()
        return total, rows.loss, hidden.grad, head.weight.grad if trained else None

    small = run()
    monkeypatch.setattr(loss_module, "CHUNK_BYTES", 2**20)
    for one, other in zip(small, run(), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_a_tied_embedding_gets_the_gradient_of_both_its_uses():
    embedding = numbers(VOCABULARY, HIDDEN).requires_grad_()
    tokens, segments = torch.tensor([1, 4, 4, 9]), Segments.of([4], [0])
    labels, weights = torch.tensor([4, 4, 9, 0]), torch.ones(4, dtype=torch.float64)

    def gradient(loss_of):
        hidden = embedding[tokens].sin()
        (grad,) = torch.autograd.grad(loss_of(hidden), embedding)
        return grad

    head = HeadRecord(embedding)
    found = gradient(lambda hidden: head_loss(hidden, labels, weights, head, segments)[0])
    expected = gradient(lambda hidden: F.cross_entropy(hidden @ embedding.T, labels, reduction="sum"))
    torch.testing.assert_close(found, expected, **EXACT)


def test_without_gradients_nothing_is_kept():
    hidden, labels, weights = rows_of(20)
    with torch.no_grad():
        total, rows = head_loss(
            hidden, labels, weights, HeadRecord(numbers(VOCABULARY, HIDDEN)), Segments.of([20], [0])
        )
    assert not total.requires_grad
    assert not rows.loss.requires_grad


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("soft_cap", [None, 1.5])
def test_a_nan_row_leaves_the_other_owners_rows_and_pairs_byte_identical(adapted, soft_cap):
    segments = Segments.of([20, 15], [2, 0])

    def run(poisoned):
        update = low_rank_of([2, 3], [1, NO_OWNER, 0], inputs=HIDDEN, outputs=VOCABULARY) if adapted else None
        hidden, labels, weights = rows_of(35)
        if poisoned:
            hidden.data[3] = float("nan")
        head = HeadRecord(numbers(VOCABULARY, HIDDEN), soft_cap=soft_cap, update=update)
        total, rows = head_loss(hidden, labels, weights, head, segments)
        total.backward()
        pairs = [] if update is None else [update.lora_A[1].grad, update.lora_B[1].grad]
        return [rows.loss[20:], rows.correct[20:], hidden.grad[20:], *pairs], rows.loss[:20], total

    (clean, _, _), (dirty, first, total) = run(False), run(True)
    assert all(torch.equal(one, other) for one, other in zip(clean, dirty, strict=True))
    assert first.isnan().sum() == 1
    assert total.isnan()


def test_hidden_rows_finer_than_the_head_are_rounded_to_it():
    """Under autocast a norm returns fp32 while the head stays in half precision."""
    hidden, labels, weights = rows_of(20)
    head = HeadRecord(numbers(VOCABULARY, HIDDEN).bfloat16())
    total, _ = head_loss(hidden.float(), labels, weights.float(), head, Segments.of([20], [0]))
    exact = F.cross_entropy(hidden @ head.weight.double().T, labels, reduction="none") @ weights
    assert total.item() == pytest.approx(exact.item(), rel=2e-2)
    total.backward()
    assert hidden.grad is not None


def test_a_chunk_holds_at_least_sixteen_rows_and_not_more_logits_than_said(monkeypatch):
    monkeypatch.undo()
    for vocabulary in (10, 1000, 49_152, 262_144, 10**7):
        rows = chunk_rows(vocabulary)
        assert rows % 16 == 0
        assert rows == 16 or rows * vocabulary * 4 <= loss_module.CHUNK_BYTES


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("size", [1.0, 30.0])
def test_the_compiled_pass_gives_what_the_formula_gives_in_fp64(smoothing, size, monkeypatch):
    if why := use_kernels():
        pytest.skip(why)
    passes: list[int] = []
    own = native.softmax_gradient_

    def counted(*given: Any) -> Any:
        passes.append(1)
        return own(*given)

    monkeypatch.setattr(native, "softmax_gradient_", counted)
    draws = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(40, 2500, generator=draws) * size, torch.eye(2500)  # logits that no product rounds
    labels, weights = torch.randint(2500, (40,), generator=draws), torch.rand(80, generator=draws)[::2]
    labels[:20] = hidden.argmax(1)[:20]
    segments, found = Segments.of([40], [NO_OWNER]), []
    for dtype in (torch.float32, torch.float64):
        h = hidden.to(dtype, copy=True).requires_grad_()
        total, rows = head_loss(h, labels, weights.to(dtype), HeadRecord(weight.to(dtype)), segments, None, smoothing)
        total.backward()
        assert h.grad is not None
        found.append((total.detach().double(), rows.loss.double(), rows.correct.double(), h.grad.double()))
    assert len(passes) == 3  # chunks of 16 rows, in fp32 alone
    for one, true in zip(*found, strict=True):
        torch.testing.assert_close(one, true, rtol=2e-6, atol=2e-6 * float(true.abs().max()))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_the_compiled_pass_keeps_what_is_not_finite_in_its_row(bad):
    if why := use_kernels():
        pytest.skip(why)
    hidden, weight = torch.randn(5, 8), torch.randn(33, 8)
    hidden[2, 3] = bad
    h = hidden.clone().requires_grad_()
    total, rows = head_loss(h, torch.arange(5), torch.ones(5), HeadRecord(weight), Segments.of([5], [NO_OWNER]))
    total.backward()
    assert h.grad is not None
    others = [0, 1, 3, 4]
    assert rows.loss[2].isnan() and not rows.correct[2] and h.grad[2].isnan().all()
    assert rows.loss[others].isfinite().all() and h.grad[others].isfinite().all()
