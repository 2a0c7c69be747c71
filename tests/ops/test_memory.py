"""Learned keys and values take their places, and nothing else changes."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase.ops.memory import Memory, fits, take_places, take_places_


@st.composite
def placed(draw):
    """Return states, learned rows and places that do not overlap."""
    batch, heads, length, width = (draw(st.integers(1, high)) for high in (3, 3, 12, 4))
    count = draw(st.integers(1, length))
    starts = [(e, draw(st.integers(0, length - count))) for e in range(batch) if e == 0 or draw(st.booleans())]
    draws = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    states = torch.randn(batch, heads, length, width, generator=draws, dtype=torch.float64)
    learned = torch.randn(heads, count, width, generator=draws, dtype=torch.float64)
    return states, learned, starts


def by_loop(states, learned, starts):
    """Return the meaning: row by row."""
    out = states.clone()
    for entry, start in starts:
        for row in range(learned.shape[1]):
            for head in range(learned.shape[0]):
                out[entry, head, start + row] = learned[head, row]
    return out


@given(placed())
def test_learned_rows_stand_at_their_places_and_all_others_are_as_they_were(case):
    states, learned, starts = case
    expected = by_loop(states, learned, starts)
    assert torch.equal(take_places(states, learned, starts), expected)
    before = states.clone()
    take_places_(states, learned, starts)
    assert torch.equal(states, expected)
    assert before.shape == states.shape


@given(placed())
def test_a_learned_rows_gradient_is_the_sum_over_its_places_and_a_replaced_row_has_none(case):
    states, learned, starts = case
    found = []
    for function in (take_places, by_loop):
        leaves = (states.clone().requires_grad_(), learned.clone().requires_grad_())
        out = function(leaves[0], leaves[1], starts)
        (out * torch.linspace(1, 2, out.numel(), dtype=out.dtype).view_as(out)).sum().backward()
        found.append([leaf.grad for leaf in leaves])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)
    for entry, start in starts:
        assert not found[0][0][entry, :, start : start + learned.shape[1]].any()


@pytest.mark.parametrize(
    ("shape", "layer", "places", "fitting"),
    [
        ((1, 2, 9, 4), 2, ((0, 4),), True),
        ((3, 2, 9, 4), 0, None, True),
        ((1, 2, 9, 4), 3, ((0, 0),), False),  # no such layer
        ((1, 1, 9, 4), 0, ((0, 0),), False),  # other heads
        ((1, 2, 9, 3), 0, ((0, 0),), False),  # another width
        ((1, 2, 9, 4), 0, ((0, 5),), False),  # behind the end
        ((1, 2, 9, 4), 0, ((1, 0),), False),  # no such entry
        ((1, 2, 4, 4), 0, None, False),
    ],
)
def test_a_memory_fits_layers_of_its_shape_that_are_long_enough(shape, layer, places, fitting):
    memory = Memory(torch.zeros(3, 2, 5, 4), torch.zeros(3, 2, 5, 4), places)
    states = torch.zeros(shape)
    assert fits(memory, states, states, layer) is fitting
    assert memory.starts(2) == (places or ((0, 0), (1, 0)))
