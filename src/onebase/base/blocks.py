"""Parts of a frozen model whose elementwise work runs as one pass (ops/elementwise.py): norms and gated activations.

A module is exchanged for one that holds the same weights and layers under the same names, if it has the shape of one of these
and its result on random rows, with the gradient, is that of the formula: nothing is decided by a model's name. What
differs (a norm of Gemma, another activation) stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from onebase.ops.elementwise import rms_norm, rms_norm_reference, swiglu, swiglu_reference

_ROWS = 3
_CLOSE = 1e-5  # of the largest number: rounding is 1e-7, another formula 1e-1


class FusedRMSNorm(nn.Module):
    """A frozen root-mean-square norm."""

    def __init__(self, norm: nn.Module, eps: float) -> None:
        super().__init__()
        self.weight = norm.weight
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the norm of every vector."""
        assert isinstance(self.weight, Tensor)
        return rms_norm(x, self.weight, self.variance_epsilon)


class FusedGatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), with the layers of the block that it stands for."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = block.gate_proj, block.up_proj, block.down_proj

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for every vector."""
        y: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))  # type: ignore[operator]
        return y


def fuse_(model: nn.Module) -> int:
    """Exchange what can be exchanged, and return how many modules were."""
    count = 0
    for path, module in list(model.named_modules()):
        new = _fused(module)
        if new is not None:
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, new)
            count += 1
    return count


def _fused(module: nn.Module) -> nn.Module | None:
    """Return the module to stand for this one; None where it stays."""
    own = dict(module.named_parameters(recurse=False))
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    weight = own.get("weight")
    if type(module).__name__.endswith("RMSNorm") and [*own] == ["weight"] and isinstance(eps, float):
        assert weight is not None
        if weight.requires_grad or weight.dim() != 1:
            return None
        x = _random((_ROWS, weight.shape[0]), weight)
        same = _same(module, lambda x: rms_norm_reference(x, weight, eps), x)
        return FusedRMSNorm(module, eps) if same else None
    children = {name for name, _ in module.named_children()}
    if {"gate_proj", "up_proj", "down_proj"} <= children and not own and isinstance(
        getattr(module, "act_fn", None), nn.Module
    ) and children <= {"gate_proj", "up_proj", "down_proj", "act_fn"}:  # fmt: skip
        return _fused_mlp(module)
    return None


def _fused_mlp(block: nn.Module) -> nn.Module | None:
    layers = [block.gate_proj, block.up_proj, block.down_proj]
    if not all(isinstance(getattr(layer, "in_features", None), int) for layer in layers):
        return None
    first = next(iter(block.parameters()))
    x = _random((_ROWS, int(block.gate_proj.in_features)), first)  # type: ignore[union-attr, arg-type]

    def meant(x: Tensor) -> Tensor:
        gate, up, down = layers
        y: Tensor = down(swiglu_reference(gate(x), up(x)))  # type: ignore[operator]
        return y

    return FusedGatedMLP(block) if _same(block, meant, x) else None


def _random(shape: tuple[int, ...], like: Tensor) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    dtype = like.dtype if like.is_floating_point() else torch.float32
    return torch.randn(shape, generator=draws).to(like.device, dtype)


@torch.no_grad()
def _same(module: nn.Module, meant: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    found, expected = module(x), meant(x)
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return bool((found - expected).abs().max() <= _CLOSE * expected.abs().max())
