"""A gated activation, a root-mean-square norm and a rotation of positions, as one pass over memory each way.

torch writes every factor of these to memory, and autograd keeps most of them: seven tensors for a norm, four for a gated
activation. Here the forward is one pass and so is the backward, which makes what it needs again from the inputs.

    swiglu(g, u)   = silu(g) u                silu(g) = g s, s = sigmoid(g)
        dg = d u s (1 + g (1 - s)),   du = d silu(g)
    rms_norm(x, w) = w n                      n = x r, r = 1 / sqrt(mean(x^2) + eps)
        dx = r (d w - n mean(d w n))
    rotary(x)      = x cos + rotate_half(x) sin
        dx = d cos + rotate_half^T(d sin)

The weight of a norm is frozen here and gets no gradient. The `reference` functions are the meaning, and what runs where
the kernels do not fit (ops/native.py). Source: SwiGLU, arXiv:2002.05202 sec. 2; RMSNorm, arXiv:1910.07467 eq. 4; rotary
positions, arXiv:2104.09864 sec. 3.4.2.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from onebase.ops import native


def swiglu_reference(
    gate: Float[Tensor, "*rows inner"], up: Float[Tensor, "*rows inner"]
) -> Float[Tensor, "*rows inner"]:
    """Return silu(gate) * up: the meaning of `swiglu`."""
    return F.silu(gate) * up


def rms_norm_reference(
    x: Float[Tensor, "*rows size"], weight: Float[Tensor, " size"], eps: float
) -> Float[Tensor, "*rows size"]:
    """Return weight * x / sqrt(mean(x^2) + eps), computed in fp32 at least: the meaning of `rms_norm`."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rotary_reference(
    x: Float[Tensor, "heads rows size"], cos: Float[Tensor, "rows size"], sin: Float[Tensor, "rows size"]
) -> Float[Tensor, "heads rows size"]:
    """Return x cos + rotate_half(x) sin: the meaning of `rotary`."""
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def swiglu(gate: Float[Tensor, "*rows inner"], up: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows inner"]:
    """Return silu(gate) * up; equal to `swiglu_reference` but for rounding."""
    if not native.fits(gate, up):
        return swiglu_reference(gate, up)
    y: Tensor = _SwiGlu.apply(gate, up)  # type: ignore[no-untyped-call]
    return y


def rms_norm(x: Float[Tensor, "*rows size"], weight: Float[Tensor, " size"], eps: float) -> Float[Tensor, "*rows size"]:
    """Return weight * x / sqrt(mean(x^2) + eps); equal to `rms_norm_reference` but for rounding."""
    if not native.fits(x, weight) or weight.requires_grad:
        return rms_norm_reference(x, weight, eps)
    y: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


def rotary(
    x: Float[Tensor, "heads rows size"], cos: Float[Tensor, "rows size"], sin: Float[Tensor, "rows size"]
) -> Float[Tensor, "heads rows size"]:
    """Return x cos + rotate_half(x) sin; equal to `rotary_reference` but for rounding. Heads lie beside each other."""
    if not native.fits(x, cos, sin) or cos.requires_grad or sin.requires_grad:
        return rotary_reference(x, cos, sin)
    y: Tensor = _Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return y


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return native.swiglu(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return native.swiglu_gradient(grad, *ctx.saved_tensors)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = native.rms_norm(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return native.rms_norm_gradient(grad, *ctx.saved_tensors), None, None


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return native.rotate(x.transpose(0, 1), cos, sin, back=False).transpose(0, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return native.rotate(grad.transpose(0, 1), *ctx.saved_tensors, back=True).transpose(0, 1), None, None
