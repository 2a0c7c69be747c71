"""Scaling each output of a layer around its bias: DoRA's one pass over the rows.

    out = bias + factor * (y - bias), computed as factor * y + (1 - factor) * bias

so that a factor of 1 returns y to the bit. `reference` is the meaning. Cost: one multiply-add an element forward, two
passes backward; y is kept for the backward, which a frozen layer alone would not need. Called by adapters/dora.py.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from onebase.ops.attention import at_least_fp32


def reference(
    y: Float[Tensor, "rows out ..."], factor: Float[Tensor, " out"], bias: Float[Tensor, " out"] | None
) -> Float[Tensor, "rows out ..."]:
    """Return bias + factor * (y - bias): the meaning of `rescale`."""
    factor, zero = _beside(factor, y), torch.zeros_like(factor)
    shift = _beside(zero if bias is None else bias, y)
    return (shift + factor * (y - shift)).to(y.dtype)


def rescale(
    y: Float[Tensor, "rows out ..."], factor: Float[Tensor, " out"], bias: Float[Tensor, " out"] | None = None
) -> Float[Tensor, "rows out ..."]:
    """Return each output scaled around its bias; computed in fp32 at least, returned in y's dtype; equal to `reference`.

    Differentiable in y and factor; the bias is the base's, and frozen.
    """
    result: Tensor = _Rescale.apply(y, factor, bias)  # type: ignore[no-untyped-call]
    return result


class _Rescale(torch.autograd.Function):
    """dy = factor * g; dfactor = sum over rows of g * (y - bias)."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, factor: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(y, factor, bias)
        wide, by = at_least_fp32(y), _beside(factor, y)
        if bias is None:
            return (wide * by).to(y.dtype)
        return torch.addcmul(_beside(bias, y) * (1 - by), wide, by).to(y.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, factor, bias = ctx.saved_tensors
        wide = at_least_fp32(grad)
        d_y = (wide * _beside(factor, y)).to(y.dtype) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return d_y, None, None
        d_factor = _over_rows(wide * y)
        if bias is not None:
            d_factor = d_factor - bias * _over_rows(wide)
        return d_y, d_factor.to(factor.dtype), None


def _beside(vector: Tensor, y: Tensor) -> Tensor:
    """Return a number for each output in a shape that meets y's second dimension."""
    return vector.view(-1, *(1,) * (y.dim() - 2))


def _over_rows(values: Tensor) -> Tensor:
    return values.sum([dim for dim in range(values.dim()) if dim != 1])
