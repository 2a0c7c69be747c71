"""A gated activation and a root-mean-square norm as one pass each way, keeping no more than their inputs.

torch writes every factor of these to memory, and autograd keeps most of them: seven tensors for a norm, four for a gated
activation. Here the forward is one fused operation and so is the backward, which makes what it needs again.

    swiglu(g, u)   = silu(g) u                silu(g) = g s, s = sigmoid(g)
        dg = d u s (1 + g (1 - s)),   du = d silu(g)
    rms_norm(x, w) = w n                      n = x r, r = 1 / sqrt(mean(x^2) + eps)
        dx = r (d w - n mean(d w n))

The weight of a norm is frozen here and gets no gradient. `reference` functions are the meaning. Source: SwiGLU, arXiv:2002.05202
sec. 2; RMSNorm, arXiv:1910.07467 eq. 4.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from onebase.ops.fused import fused


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


def swiglu(gate: Float[Tensor, "*rows inner"], up: Float[Tensor, "*rows inner"]) -> Float[Tensor, "*rows inner"]:
    """Return silu(gate) * up; equal to `swiglu_reference` but for rounding."""
    y: Tensor = _SwiGlu.apply(gate, up)  # type: ignore[no-untyped-call]
    return y


def rms_norm(x: Float[Tensor, "*rows size"], weight: Float[Tensor, " size"], eps: float) -> Float[Tensor, "*rows size"]:
    """Return weight * x / sqrt(mean(x^2) + eps); equal to `rms_norm_reference` but for rounding."""
    y: Tensor = _RmsNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return y


class _SwiGlu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _gated(gate, up)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return _gated_gradient(grad, *ctx.saved_tensors)


class _RmsNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, inverse = _normed(x, weight, eps)
        ctx.save_for_backward(x, weight, inverse)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return _normed_gradient(grad, *ctx.saved_tensors), None, None


def _wide(numbers: Tensor) -> Tensor:
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


@fused
def _gated(gate: Tensor, up: Tensor) -> Tensor:
    wide = _wide(gate)
    return (wide * torch.sigmoid(wide)).to(gate.dtype) * up


@fused
def _gated_gradient(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d, g, u = _wide(grad), _wide(gate), _wide(up)
    s = torch.sigmoid(g)
    return (d * u * s * (1 + g * (1 - s))).to(gate.dtype), (d * g * s).to(up.dtype)


@fused
def _normed(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = _wide(x)
    inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * (wide * inverse).to(x.dtype), inverse


@fused
def _normed_gradient(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    d, n = _wide(grad) * _wide(weight), _wide(x) * inverse
    return (inverse * (d - n * (d * n).mean(-1, keepdim=True))).to(x.dtype)
