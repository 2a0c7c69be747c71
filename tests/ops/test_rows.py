"""Rows move whole, and each move is the other's backward."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase.ops.rows import spread_rows, take_rows


@st.composite
def moves(draw):
    count = draw(st.integers(1, 12))
    places = draw(st.permutations(range(count)))[: draw(st.integers(0, count))]
    return count, torch.tensor(places, dtype=torch.int64)


@given(moves(), st.sampled_from([(), (3,), (2, 3)]))
def test_spread_and_take_are_what_indexing_does_forward_and_backward(move, inner):
    count, places = move
    draws = torch.Generator().manual_seed(0)
    small = torch.randn(len(places), *inner, generator=draws, dtype=torch.float64, requires_grad=True)
    large = torch.randn(count, *inner, generator=draws, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(count, *inner, generator=draws, dtype=torch.float64)

    spread = spread_rows(small, places, count)
    expected = torch.zeros(count, *inner, dtype=torch.float64).index_put((places,), small)
    assert torch.equal(spread, expected)
    assert torch.equal(
        *(torch.autograd.grad((out * weight).sum(), small)[0] for out in (spread, expected)),
    )

    taken, expected = take_rows(large, places), large[places]
    assert torch.equal(taken, expected)
    weight = weight[: len(places)]
    assert torch.equal(*(torch.autograd.grad((out * weight).sum(), large)[0] for out in (taken, expected)))


def test_rows_that_move_leave_padding_at_zero_not_at_what_was_there():
    assert not spread_rows(torch.full((2, 3), float("nan")), torch.tensor([4, 1]), 6)[[0, 2, 3, 5]].any()
