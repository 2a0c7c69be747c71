"""The compiled low-rank update equals the reference in fp64, row by row, and keeps what is not finite where it is."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.base.kernels import use_kernels
from onebase.ops import native
from onebase.ops.keyed import mix, position_keys
from onebase.ops.low_rank import LowRank, add_low_rank_, reference
from onebase.ops.segments import NO_OWNER, Segments

SIZES = st.integers(1, 150)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    why = use_kernels()
    if why:
        pytest.skip(why)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pairs_of(ranks, size, out, dropout=0.0):
    return LowRank(
        tuple(numbers(r, size, seed=r).requires_grad_() for r in ranks),
        tuple(numbers(out, r, seed=9 * r).requires_grad_() for r in ranks),
        torch.tensor([0.5 + pair for pair in range(len(ranks))], dtype=torch.float64),
        torch.full((len(ranks),), dropout, dtype=torch.float64),
        torch.arange(len(ranks)),
    )


def wide(low_rank):
    pairs = [tuple(w.detach().double().requires_grad_() for w in ws) for ws in (low_rank.lora_A, low_rank.lora_B)]
    return replace(low_rank, lora_A=pairs[0], lora_B=pairs[1])


def results(function, y, x, low_rank, segments, keys=None):
    """Return the output and the gradients of x, y and all pairs."""
    y, x = y.clone().requires_grad_(), x.clone().requires_grad_()
    found = function(y.clone(), x, low_rank, segments, keys)
    grad = numbers(*y.shape, seed=5).to(y.dtype)
    parts = [x, y, *low_rank.lora_A, *low_rank.lora_B]
    return [found.detach(), *torch.autograd.grad(found, parts, grad, materialize_grads=True, allow_unused=True)]


@settings(max_examples=60)
@given(
    SIZES, SIZES, SIZES, st.lists(st.integers(1, 40), min_size=1, max_size=3), st.sampled_from([0.0, 0.4]), st.data()
)
def test_it_equals_the_reference_and_autograd_in_fp64(rows, size, out, ranks, dropout, data):
    low_rank = pairs_of(ranks, size, out, dropout)
    owners = data.draw(st.lists(st.sampled_from([NO_OWNER, *range(len(ranks))]), min_size=1, max_size=4))
    segments = Segments.of([rows, *[7] * (len(owners) - 1)], owners)
    x, y = numbers(segments.row_count, size), numbers(segments.row_count, out, seed=1)
    keys = position_keys(mix(3), 0, len(x))
    ours = results(add_low_rank_, y, x, low_rank, segments, keys)
    meant = results(reference, y.double(), x.double(), wide(low_rank), segments, keys)
    for found, true in zip(ours, meant, strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=2e-6 * max(1.0, float(true.abs().max())))


@pytest.mark.parametrize("size", [576, 1537])
def test_rows_as_many_and_as_long_as_a_models(size):
    """Sums over more than one chunk of columns and many blocks of rows."""
    low_rank, segments = pairs_of([16, 3], size, 570), Segments.of([301, 150], [0, 1])
    x, y = numbers(451, size), numbers(451, 570, seed=1)
    ours = results(add_low_rank_, y, x, low_rank, segments)
    meant = results(reference, y.double(), x.double(), wide(low_rank), segments)
    for found, true in zip(ours, meant, strict=True):
        torch.testing.assert_close(found.double(), true, rtol=1e-5, atol=2e-6 * float(true.abs().max()))


def test_a_row_alone_is_the_row_among_others_whatever_the_number_of_threads():
    low_rank = pairs_of([5], 70, 90)
    x, y = numbers(131, 70), numbers(131, 90, seed=1)
    one, all_rows = Segments.of([1], [0]), Segments.of([131], [0])
    alone = [results(add_low_rank_, y[i : i + 1], x[i : i + 1], low_rank, one) for i in (0, 66, 130)]
    before = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found, *_ = results(add_low_rank_, y, x, low_rank, all_rows)
            for row, (own, *_) in zip((0, 66, 130), alone, strict=True):
                assert torch.equal(found[row], own[0])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_with_its_pair(bad):
    low_rank, segments = pairs_of([4, 4], 33, 65), Segments.of([50, 50], [0, 1])
    x, y = numbers(100, 33), numbers(100, 65, seed=1)
    x[7, 5] = bad
    found, dx, _, dA, dA_other, dB, dB_other = results(add_low_rank_, y, x, low_rank, segments)
    assert not found[7].isfinite().any()
    assert found[torch.arange(100) != 7].isfinite().all()
    assert dx.isfinite().all()
    assert not dA[:, 5].isfinite().any() and dA[:, torch.arange(33) != 5].isfinite().all()
    assert not dB.isfinite().any()
    assert dA_other.isfinite().all() and dB_other.isfinite().all()


def test_weights_that_need_no_gradient_get_none_and_rows_that_need_none_neither():
    low_rank = pairs_of([4], 33, 65)
    pairs = [tuple(w.detach() for w in ws) for ws in (low_rank.lora_A, low_rank.lora_B)]
    frozen = replace(low_rank, lora_A=pairs[0], lora_B=pairs[1])
    segments, x, y = Segments.of([9], [0]), numbers(9, 33), numbers(9, 65, seed=1)
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(add_low_rank_(y.clone(), leaf, frozen, segments).sum(), [leaf])
    both = torch.autograd.grad(add_low_rank_(y.clone(), leaf, low_rank, segments).sum(), [leaf, *low_rank.weights])
    weights = torch.autograd.grad(add_low_rank_(y.clone(), x, low_rank, segments).sum(), low_rank.weights)
    assert torch.equal(dx, both[0])
    assert all(torch.equal(one, other) for one, other in zip(weights, both[1:], strict=True))


def test_however_the_tensors_lie():
    """Transposed rows, pairs and gradients give what contiguous ones give."""
    low_rank, segments = pairs_of([4], 33, 65), Segments.of([9], [0])
    pairs = [tuple(w.detach().T.contiguous().T for w in ws) for ws in (low_rank.lora_A, low_rank.lora_B)]
    turned = replace(low_rank, lora_A=pairs[0], lora_B=pairs[1])
    for weight in turned.weights:
        weight.requires_grad_()
    x, y = numbers(9, 33), numbers(9, 65, seed=1)
    plain = results(add_low_rank_, y, x, low_rank, segments)
    for one, other in zip(results(add_low_rank_, y, x.T.contiguous().T, turned, segments), plain, strict=True):
        assert torch.equal(one, other)


def test_it_is_what_runs(monkeypatch):
    """Else the tests above would hold torch against torch."""
    called = []
    monkeypatch.setattr(native, "_call", lambda name, *_, **__: called.append(name))
    results(add_low_rank_, numbers(3, 4), numbers(3, 5), pairs_of([2], 4, 5), Segments.of([3], [0]))
    assert called == ["low_rank_forward", "low_rank_backward"]
