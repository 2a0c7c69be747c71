"""Parts of a frozen model whose elementwise work runs as one pass: norms, gated activations, rotary positions.

A norm or a gated block is exchanged for a module with the same weights and layers under the same names, if its result on
random rows is that of the formula in ops/elementwise.py. What differs (a norm of Gemma, another activation) stays as it is.
An attention module keeps its weights and becomes one of a class made from its own: that one's forward, with another function
in the place of `apply_rotary_pos_emb` of its source file, if both agree in the same way.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from onebase.ops.elementwise import rms_norm, rms_norm_reference, rotary, swiglu, swiglu_reference

Rotation = Callable[..., tuple[Tensor, Tensor]]

_ROWS = 3
_ROTATION = "apply_rotary_pos_emb"
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
        count += _rotates_in_one_pass(module)
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


def _rotates_in_one_pass(module: nn.Module) -> bool:
    """Give an attention module's forward the rotation of ops/elementwise.py, and return whether it has one to exchange."""
    turning = _turning_class(type(module))  # type: ignore[arg-type]  # of classes mypy knows no hash
    if turning is None or "forward" in vars(module):
        return False
    module.__class__ = turning
    return True


@cache
def _turning_class(kind: type[nn.Module]) -> type[nn.Module] | None:
    """Return a class like `kind` whose forward rotates in one pass; None where it rotates in another way."""
    forward: Any = kind.forward
    own = getattr(forward, "__globals__", {}).get(_ROTATION)
    if own is None or hasattr(forward, "__wrapped__") or _ROTATION not in forward.__code__.co_names:
        return None  # a decorated forward does more than its code says
    q, k = (_random((1, heads, _ROWS, 8), torch.empty(0)) for heads in (4, 2))
    cos, sin = (_random((1, _ROWS, 8), part) for part in (q, k))
    try:
        theirs = own(q, k, cos, sin)
        ours = _rotation(own)(q, k, cos, sin)
        same = all(_close(one, other) for one, other in zip(ours, theirs, strict=True))
    except (TypeError, ValueError, RuntimeError, IndexError):  # a rotation that takes something else
        return None
    if not same:
        return None
    around = {**forward.__globals__, _ROTATION: _rotation(own)}
    changed = FunctionType(forward.__code__, around, forward.__name__, forward.__defaults__, forward.__closure__)
    changed.__kwdefaults__ = forward.__kwdefaults__
    return type(kind.__name__, (kind,), {"forward": changed, "__module__": kind.__module__, "__doc__": kind.__doc__})


def _rotation(own: Rotation) -> Rotation:
    """Return `own` as one pass for a flat batch with the arguments that are usual; as it is for all others."""

    def apply_rotary_pos_emb(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **named: Any) -> Any:
        usual = not (args or named) and q.dim() == 4 and cos.dim() == 3 and len(q) == len(cos) == 1
        if not usual or not q.shape[-1] == k.shape[-1] == cos.shape[-1]:
            return own(q, k, cos, sin, *args, **named)
        return rotary(q[0], cos[0], sin[0])[None], rotary(k[0], cos[0], sin[0])[None]

    return apply_rotary_pos_emb


def _random(shape: tuple[int, ...], like: Tensor) -> Tensor:
    draws = torch.Generator().manual_seed(0)
    dtype = like.dtype if like.is_floating_point() else torch.float32
    return torch.randn(shape, generator=draws).to(like.device, dtype)


@torch.no_grad()
def _same(module: nn.Module, meant: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    if len(inspect.signature(module.forward).parameters) != 1:  # it may do more than the trial shows
        return False
    return _close(module(x), meant(x))


def _close(found: object, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    return bool((found - expected).abs().max() <= _CLOSE * expected.abs().max())
