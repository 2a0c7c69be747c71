"""The routed update equals its reference, and its gradients are autograd's on the reference."""

import dataclasses
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.ops.keyed import keep_mask, mix, position_keys
from onebase.ops.low_rank import LowRank, add_low_rank_, reference
from onebase.ops.segments import NO_OWNER, Segments

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}


def low_rank_of(ranks, pair_of_owner, *, inputs=5, outputs=6, dropout=0.0, dtype=torch.float64, seed=0):
    draws = torch.Generator().manual_seed(seed)
    made = [
        (torch.randn(r, inputs, generator=draws, dtype=dtype), torch.randn(outputs, r, generator=draws, dtype=dtype))
        for r in ranks
    ]
    return LowRank(
        lora_A=tuple(A.requires_grad_() for A, _ in made),
        lora_B=tuple(B.requires_grad_() for _, B in made),
        scaling=torch.tensor([0.5 + pair for pair in range(len(ranks))], dtype=torch.float64),
        dropout=torch.tensor([dropout * (pair % 2 == 0) for pair in range(len(ranks))], dtype=torch.float64),
        pair_of_owner=torch.tensor(pair_of_owner, dtype=torch.int64),
    )


def numbers(*shape, seed=1, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def gradients(out, weight, parts):
    """Return the gradients of one number made of `out`; zeros for parts that it does not depend on."""
    found = torch.autograd.grad((out.sin() * weight).sum(), parts, allow_unused=True, materialize_grads=True)
    return list(found)


@st.composite
def cases(draw):
    """Segments with empty ones, owners without a pair or beyond the table, ranks that differ, rows beyond the last."""
    ranks = draw(st.lists(st.integers(1, 4), min_size=1, max_size=4))
    table = draw(st.lists(st.sampled_from([NO_OWNER, *range(len(ranks))]), max_size=5))
    parts = draw(st.lists(st.tuples(st.integers(0, 4), st.integers(NO_OWNER, len(table) + 1)), max_size=7))
    beyond = draw(st.integers(0, 2))
    dropout = draw(st.sampled_from([0.0, 0.4]))
    segments = Segments.of([length for length, _ in parts], [owner for _, owner in parts])
    return low_rank_of(ranks, table, dropout=dropout), segments, segments.row_count + beyond


@settings(max_examples=150)
@given(cases(), st.booleans())
def test_the_update_and_all_its_gradients_equal_the_references(case, with_keys):
    low_rank, segments, rows = case
    keys = position_keys(mix(7), 0, rows) if with_keys else None
    x, y, weight = (
        numbers(rows, 5).requires_grad_(),
        numbers(rows, 6, seed=2).requires_grad_(),
        numbers(rows, 6, seed=3),
    )
    parts = (x, y, *low_rank.lora_A, *low_rank.lora_B)
    ours = add_low_rank_(y.clone(), x, low_rank, segments, keys)
    meant = reference(y.clone(), x, low_rank, segments, keys)
    torch.testing.assert_close(ours, meant, **EXACT)
    for one, other in zip(gradients(ours, weight, parts), gradients(meant, weight, parts), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_the_reference_is_the_formula():
    """By hand, row by row, with dropout."""
    low_rank = low_rank_of([2, 3], [1, NO_OWNER, 0], dropout=0.5)
    segments = Segments.of([2, 1, 1, 2], [2, 1, NO_OWNER, 0])
    x, y, keys = numbers(6, 5), numbers(6, 6, seed=2), position_keys(mix(7), 0, 6)
    pairs = [0, 0, None, None, 1, 1]
    kept = keep_mask(keys, 5, 0.5)
    rows = []
    for i, pair in enumerate(pairs):
        row = y[i]
        if pair is not None:
            seen = x[i] * kept[i] / 0.5 if pair == 0 else x[i]  # only the first pair has dropout
            row = row + (0.5 + pair) * low_rank.lora_B[pair] @ (low_rank.lora_A[pair] @ seen)
        rows.append(row)
    torch.testing.assert_close(reference(y, x, low_rank, segments, keys), torch.stack(rows), **EXACT)


def test_gradients_agree_with_finite_differences():
    low_rank = low_rank_of([2, 3], [0, 1], dropout=0.4)
    segments = Segments.of([2, 1, 2], [1, NO_OWNER, 0])
    keys = position_keys(mix(7), 0, 5)

    def run(y, x, *weights):
        changed = dataclasses.replace(low_rank, lora_A=weights[:2], lora_B=weights[2:])
        return add_low_rank_(y.clone(), x, changed, segments, keys)

    inputs = (
        numbers(5, 6).requires_grad_(),
        numbers(5, 5, seed=4).requires_grad_(),
        *low_rank.lora_A,
        *low_rank.lora_B,
    )
    assert torch.autograd.gradcheck(run, inputs)


def test_it_adds_in_place():
    low_rank, segments = low_rank_of([2], [0]), Segments.of([3], [0])
    y = numbers(3, 6)
    out = add_low_rank_(y, numbers(3, 5), low_rank, segments)
    assert out.data_ptr() == y.data_ptr()


def test_rows_without_an_update_are_untouched_to_the_bit():
    low_rank = low_rank_of([2], [NO_OWNER, 0])
    segments = Segments.of([2, 2, 2, 2], [NO_OWNER, 1, 0, 9])
    y, x = numbers(9, 6), numbers(9, 5)
    out = add_low_rank_(y.clone(), x, low_rank, segments)
    still = [0, 1, 4, 5, 6, 7, 8]
    assert torch.equal(out[still], y[still])
    assert not torch.equal(out[2:4], y[2:4])


def test_frozen_parts_get_no_gradient():
    low_rank, segments = low_rank_of([2], [0]), Segments.of([3], [0])
    low_rank.lora_A[0].requires_grad_(False)
    x = numbers(3, 5)
    add_low_rank_(numbers(3, 6), x, low_rank, segments).sum().backward()
    assert x.grad is None
    assert low_rank.lora_A[0].grad is None
    assert low_rank.lora_B[0].grad is not None


@pytest.mark.parametrize("poison", ["x", "lora_A", "lora_B"])
def test_a_nan_of_one_owner_leaves_the_other_byte_identical(poison):
    segments = Segments.of([3, 2, 4], [0, NO_OWNER, 1])

    def run(poisoned):
        low_rank, x = low_rank_of([2, 3], [0, 1], dropout=0.3), numbers(9, 5)
        if poisoned and poison == "x":
            x[1] = float("nan")
        elif poisoned:
            getattr(low_rank, poison)[0].data[0, 0] = float("nan")
        x.requires_grad_()
        out = add_low_rank_(numbers(9, 6, seed=2), x, low_rank, segments, position_keys(mix(7), 0, 9))
        out[3:].sin().sum().backward()
        return out[3:], x.grad[3:], low_rank.lora_A[1].grad, low_rank.lora_B[1].grad, out[:3]

    clean, dirty = run(False), run(True)
    assert all(torch.equal(one, other) for one, other in zip(clean[:-1], dirty[:-1], strict=True))
    assert dirty[-1].isnan().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_close_as_its_rounding(dtype):
    low_rank, segments = low_rank_of([4, 2], [0, 1], dtype=torch.float32), Segments.of([8, 8], [0, 1])
    x, y = numbers(16, 5), numbers(16, 6, seed=2)
    ours = add_low_rank_(y.to(dtype), x.to(dtype), low_rank, segments)
    as_fp64 = {part: tuple(t.detach().double() for t in getattr(low_rank, part)) for part in ("lora_A", "lora_B")}
    meant = reference(y, x, dataclasses.replace(low_rank, **as_fp64), segments)
    torch.testing.assert_close(
        ours.detach().double(), meant, rtol=0, atol=8 * torch.finfo(dtype).eps * float(meant.abs().max())
    )
    ours.sum().backward()
    assert low_rank.lora_A[0].grad.dtype == torch.float32
