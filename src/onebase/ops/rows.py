"""Moving whole rows: into slots with zero padding, and out again; each is the other's backward.

Rows are never moved with fancy indexing, whose backward is a slow, unordered index_put.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor


def spread_rows(
    rows: Float[Tensor, "rows ..."], places: Int64[Tensor, " rows"], count: int
) -> Float[Tensor, "count ..."]:
    """Return `count` rows, zero but for row i at place `places[i]`; places are distinct."""
    moved: Tensor = _MoveRows.apply(rows, places.to(rows.device), count, True)  # type: ignore[no-untyped-call]
    return moved


def take_rows(rows: Float[Tensor, "count ..."], places: Int64[Tensor, " rows"]) -> Float[Tensor, "rows ..."]:
    """Return the rows at `places`; places are distinct."""
    moved: Tensor = _MoveRows.apply(rows, places.to(rows.device), rows.shape[0], False)  # type: ignore[no-untyped-call]
    return moved


class _MoveRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, count: int, spread: bool) -> Tensor:
        ctx.places, ctx.count, ctx.spread = places, count, spread
        return _spread(rows, places, count) if spread else rows.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        moved = grad.index_select(0, ctx.places) if ctx.spread else _spread(grad, ctx.places, ctx.count)
        return moved, None, None, None


def _spread(rows: Tensor, places: Tensor, count: int) -> Tensor:
    return rows.new_zeros(count, *rows.shape[1:]).index_copy_(0, places, rows)
