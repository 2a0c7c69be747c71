"""Rows move whole into the slots of attention and back, and each move is the other's backward."""

import torch
from hypothesis import given

from onebase.ops.rows import reference_rows, reference_slots, rows_of_slots, slots_of
from tests.ops.test_layout import layouts


def numbers(layout, seed=0):
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(layout.token_count, 2, 3, generator=draws, dtype=torch.float64, requires_grad=True)


@given(layouts())
def test_a_slot_holds_its_token_its_ancestors_before_it_and_padding_its_own_first_token(layout):
    rows = numbers(layout)
    for group, own, with_ancestors in zip(
        layout.groups, slots_of(rows, layout, ancestors=False), slots_of(rows, layout, ancestors=True), strict=True
    ):
        for line in range(group.count):
            node = next(i for i, s in enumerate(layout.starts) if s == int(group.rows[line, 0]))
            start, length = layout.starts[node], layout.nodes[node].length
            assert torch.equal(own[line, :length], rows[start : start + length])
            assert torch.equal(own[line, length:], rows[start].expand_as(own[line, length:]))
            before = layout.ancestor_rows(node)
            assert torch.equal(with_ancestors[line, : len(before)], rows[before])
            assert torch.equal(with_ancestors[line, -group.width :], own[line])


@given(layouts())
def test_gradients_of_real_slots_are_the_references_and_rows_come_back_as_they_were(layout):
    rows = numbers(layout)
    found = slots_of(rows, layout, ancestors=True)
    expected = reference_slots(rows, layout, ancestors=True)
    total, meant = torch.zeros(()), torch.zeros(())
    for group, one, other in zip(layout.groups, found, expected, strict=True):
        assert torch.equal(one, other)
        prefix = group.key_rows.shape[1] - group.width
        real = torch.cat(
            [torch.arange(prefix) < group.ancestor_count[:, None], torch.arange(group.width) < group.lengths[:, None]],
            1,
        )
        weight = torch.randn(one.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        weight = weight * real[..., None, None]
        total, meant = total + (one * weight).sum(), meant + (other * weight).sum()
    torch.testing.assert_close(*(torch.autograd.grad(t, rows)[0] for t in (total, meant)), rtol=1e-12, atol=1e-12)

    slots = tuple(part.flatten(0, 1).detach().requires_grad_() for part in slots_of(rows, layout, ancestors=False))
    back = rows_of_slots(slots, layout)
    assert torch.equal(back, rows) and torch.equal(reference_rows(slots, layout), rows)
    gradient = numbers(layout, seed=2).detach()
    joined, meant = (
        torch.cat(torch.autograd.grad(way(slots, layout), slots, gradient)) for way in (rows_of_slots, reference_rows)
    )
    spread = torch.zeros_like(joined)
    spread[layout.slots] = gradient
    assert torch.equal(joined, spread) and torch.equal(meant, spread)
