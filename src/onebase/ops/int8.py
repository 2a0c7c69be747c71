"""A frozen linear layer in 8 bits, forward and backward: integer products between quantisation and scaling in one pass each.

A weight has one scale an output, a row of activations one of its own (so that no row sees its neighbours):

    W[o] ~ u_o P[o]     u_o = max |W[o]| / 127     P = round(W[o] / u_o)
    x_i  ~ s_i q_i      s_i = max |x_i| / 127      q_i = round(x_i (127 / max |x_i|))
    y_i  = s_i (q_i P^T) u + b

The backward is the same with g * u in the place of x, and P in the place of P^T: dx_i = t_i (round(g_i u / t_i) P). So
gradients are rounded row by row: the gradient of an int8 layer is an approximation of the gradient of its own forward.
With shares d of the columns, x d stands for x in the forward and dx is multiplied by d; P is made of W / d.
A row that holds a NaN or an infinity stays not finite, and is nobody else's.

`reference` and `reference_gradient` are the meaning, in floating point. Products of 8-bit integers are exact in 32 bits
up to an inner size of 130,000.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int8, Int32
from torch import Tensor

from onebase.ops import native

LARGEST = 127
_TINY = 1e-30  # largest number of a row of zeros, whose integers are zeros
_CUDA_ROWS = 32  # torch._int_mm takes more than 16 rows there


def quantise_weight(
    weight: Float[Tensor, "out in"],
) -> tuple[Int8[Tensor, "out in"], Float[Tensor, " out"]]:
    """Return the integers P and the scales u of a weight, each row by itself."""
    integers, scales = quantise_rows(weight, None)
    return integers, scales[:, 0]


def reference(
    x: Float[Tensor, "rows in"],
    weight: Int8[Tensor, "out in"],
    scales: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None = None,
    shares: Float[Tensor, " in"] | None = None,
) -> Float[Tensor, "rows out"]:
    """Return s (q P^T) u + b in floating point: the meaning of `int8_linear`."""
    x = x if shares is None else x * shares
    largest = _largest(x)
    y = (torch.round(x * (LARGEST / largest)) @ weight.to(x.dtype).T) * (largest / LARGEST) * scales
    return y if bias is None else y + bias


def reference_gradient(
    grad: Float[Tensor, "rows out"],
    weight: Int8[Tensor, "out in"],
    scales: Float[Tensor, " out"],
    shares: Float[Tensor, " in"] | None = None,
) -> Float[Tensor, "rows in"]:
    """Return dx of `int8_linear` in floating point."""
    largest = _largest(grad * scales)
    dx = (torch.round(grad * scales * (LARGEST / largest)) @ weight.to(grad.dtype)) * (largest / LARGEST)
    return dx if shares is None else dx * shares


def int8_linear(
    x: Float[Tensor, "rows in"],
    weight: Int8[Tensor, "out in"],
    scales: Float[Tensor, " out"],
    bias: Float[Tensor, " out"] | None = None,
    shares: Float[Tensor, " in"] | None = None,
    given: tuple[Tensor, Tensor] | None = None,
) -> Float[Tensor, "rows out"]:
    """Return the layer's output for every row, in the rows' own format; equal to `reference`.

    Args:
        shares: what the columns of `x` are multiplied by before they are rounded.
        given: the integers and scales of `x`, where another layer has made them already.
    """
    y: Tensor = _Int8Linear.apply(x, weight, scales, bias, shares, given)  # type: ignore[no-untyped-call]
    return y


class _Int8Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        scales: Tensor,
        bias: Tensor | None,
        shares: Tensor | None,
        given: tuple[Tensor, Tensor] | None,
    ) -> Tensor:
        ctx.save_for_backward(weight, scales, shares)
        integers, row_scales = quantise_rows(x, shares) if given is None else given
        return scale_products(product(integers, weight.T), row_scales, scales, bias, x.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, scales, shares = ctx.saved_tensors
        integers, row_scales = quantise_rows(grad, scales)
        dx = scale_products(product(integers, weight), row_scales, shares, None, grad.dtype)
        return dx, None, None, None, None, None


def product(one: Int8[Tensor, "rows inner"], other: Int8[Tensor, "inner columns"]) -> Int32[Tensor, "rows columns"]:
    """Return the exact product of 8-bit integers."""
    rows = one.shape[0]
    if one.is_cuda and rows < _CUDA_ROWS:
        one = torch.cat([one, one.new_zeros(_CUDA_ROWS - rows, one.shape[1])])
    found: Tensor = torch._int_mm(one, other)
    return found[:rows]


def quantise_rows(
    x: Float[Tensor, "rows inner"], factors: Float[Tensor, " inner"] | None
) -> tuple[Int8[Tensor, "rows inner"], Float[Tensor, "rows 1"]]:
    """Return the integers and scales of x * factors (None: of x), each row by itself: to the bit, compiled or not."""
    if native.fits(x, factors):
        return native.quantise_rows(x, factors)
    x = x.float() if factors is None else x.float() * factors
    largest = _largest(x)
    by = torch.full_like(largest, LARGEST) / largest  # a plain number divided by a tensor is rounded twice
    return torch.round(x * by).to(torch.int8), largest / LARGEST


def scale_products(
    products: Int32[Tensor, "rows columns"],
    row_scales: Float[Tensor, "rows 1"],
    scales: Float[Tensor, " columns"] | None,
    bias: Float[Tensor, " columns"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "rows columns"]:
    """Return products * row_scales * scales + bias, in the format asked for."""
    if dtype is torch.float32 and native.fits(row_scales, scales, bias):
        return native.scale_products(products, row_scales, scales, bias)
    y = products.float() * row_scales
    y = y if scales is None else y * scales
    return (y if bias is None else y + bias).to(dtype)


def _largest(x: Tensor) -> Tensor:
    """Return max |x_i| of every row, (rows, 1)."""
    return x.abs().amax(1, keepdim=True).clamp_min(_TINY)
