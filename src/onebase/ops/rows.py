"""Moving the rows of a flat batch into the groups' slots, and out again; each is the other's backward, but for prefixes.

A slot that is padding holds its node's own first row: it is masked, or lies after every token that could see it, so it is
read by nobody and its gradient is zero. Rows of a prefix stand in the slots of every example behind it; their gradients add up.
Rows are never moved with fancy indexing, whose backward is a slow, unordered index_put, nor by slices, whose backward
fills a tensor with zeros for each. `reference_slots` and `reference_rows` are the meaning, by that indexing.
"""

from __future__ import annotations

from collections.abc import Hashable
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from onebase.ops.layout import Layout


def reference_slots(rows: Float[Tensor, "rows heads dim"], layout: Layout, *, ancestors: bool) -> tuple[Tensor, ...]:
    """Return rows[row of every slot] for each group: the meaning of `slots_of`."""
    return tuple(rows[group.key_rows if ancestors else group.rows] for group in layout.groups)


def reference_rows(slots: tuple[Float[Tensor, "_ heads dim"], ...], layout: Layout) -> Float[Tensor, "rows heads dim"]:
    """Return slots[slot of every row]: the meaning of `rows_of_slots`."""
    return torch.cat(slots)[layout.slots]


def slots_of(rows: Float[Tensor, "rows heads dim"], layout: Layout, *, ancestors: bool) -> tuple[Tensor, ...]:
    """Return the rows in the slots of each group, (count, slots of a node, heads, dim); equal to `reference_slots`.

    Args:
        ancestors: whether the rows of a node's ancestors stand before its own.
    """
    found: tuple[Tensor, ...] = _Slots.apply(rows, layout, ancestors)  # type: ignore[no-untyped-call]
    return found


def rows_of_slots(slots: tuple[Float[Tensor, "_ heads dim"], ...], layout: Layout) -> Float[Tensor, "rows heads dim"]:
    """Return the rows that stand in the groups' own slots, in the layout's order; equal to `reference_rows`."""
    rows: Tensor = _Rows.apply(layout, *slots)  # type: ignore[no-untyped-call]
    return rows


class _Slots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, layout: Layout, ancestors: bool) -> tuple[Tensor, ...]:
        ctx.layout, ctx.ancestors = layout, ancestors
        return tuple(
            rows.index_select(0, index.flatten()).view(*index.shape, *rows.shape[1:])
            for index in _indices(layout, ancestors, rows.device)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        layout: Layout = ctx.layout
        widths = [group.width for group in layout.groups]
        own = [grad[:, -width:].flatten(0, 1) for grad, width in zip(grads, widths, strict=True)]
        total = (own[0] if len(own) == 1 else torch.cat(own)).index_select(0, _slots(layout, grads[0].device))
        if ctx.ancestors:
            for number, (group, grad) in enumerate(zip(layout.groups, grads, strict=True)):
                if group.ancestors is not None:
                    index = _on(layout, ("ancestors", number), group.ancestors.flatten(), grad.device)
                    total.index_add_(0, index, grad[:, : -group.width].flatten(0, 1))
        return total, None, None


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, layout: Layout, *slots: Tensor) -> Tensor:
        ctx.layout, ctx.sizes = layout, [len(part) for part in slots]
        joined = slots[0] if len(slots) == 1 else torch.cat(slots)
        return joined.index_select(0, _slots(layout, joined.device))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        layout: Layout = ctx.layout
        spread = grad.new_zeros(layout.slot_count, *grad.shape[1:])
        spread.index_copy_(0, _slots(layout, grad.device), grad)
        return None, *spread.split(ctx.sizes)  # type: ignore[no-untyped-call]


def _slots(layout: Layout, device: torch.device) -> Tensor:
    return _on(layout, "slots", layout.slots, device)


def _indices(layout: Layout, ancestors: bool, device: torch.device) -> list[Tensor]:
    """Return the flat row of every slot, group by group."""
    return [
        _on(layout, ("rows", number, ancestors), group.key_rows if ancestors else group.rows, device)
        for number, group in enumerate(layout.groups)
    ]


def _on(layout: Layout, name: Hashable, index: Tensor, device: torch.device) -> Tensor:
    """Return an index of a layout on a device, moved there once."""
    return index if index.device == device else layout.once((name, device), partial(index.to, device))
