"""The passes of kernels.c on tensors: contiguous fp32 on the CPU, each one read and one write of memory.

base/kernels.py compiles them and calls `use` once a process; until then, and for other tensors, `fits` says no and callers
run what torch offers. Nothing here knows autograd. A call takes 3 us beyond its work.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch
from torch import Tensor

_INTEGER, _FLOAT, _POINTER = ctypes.c_long, ctypes.c_float, ctypes.c_void_p
_ARGUMENTS = {
    "swiglu": [_INTEGER, *[_POINTER] * 3],
    "swiglu_gradient": [_INTEGER, *[_POINTER] * 5],
    "rms_norm": [_INTEGER, _INTEGER, _FLOAT, *[_POINTER] * 4],
    "rms_norm_gradient": [_INTEGER, _INTEGER, *[_POINTER] * 5],
    "quantise_rows": [_INTEGER, _INTEGER, *[_POINTER] * 4],
    "scale_products": [_INTEGER, _INTEGER, *[_POINTER] * 5],
    "softmax_gradient": [_INTEGER, _INTEGER, _FLOAT, *[_POINTER] * 4],
    "rotate": [*[_INTEGER] * 4, *[_POINTER] * 4],
}


class _Process:
    library: ctypes.CDLL | None = None


def use(path: Path | None) -> None:
    """Let this process compute with the compiled kernels at `path` from now on; None: without.

    Raises:
        OSError: the library cannot be loaded here.
    """
    library = None if path is None else ctypes.CDLL(str(path))
    for name, arguments in {} if library is None else _ARGUMENTS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, None
    _Process.library = library


def in_use() -> bool:
    """Return whether this process computes with compiled kernels."""
    return _Process.library is not None


def fits(*tensors: Tensor | None) -> bool:
    """Return whether the kernels take these tensors: fp32 on the CPU."""
    return _Process.library is not None and all(
        t is None or (t.dtype is torch.float32 and t.device.type == "cpu") for t in tensors
    )


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Return silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    y = torch.empty_like(gate)
    _library().swiglu(y.numel(), *_addresses(gate, up, y))
    return y


def swiglu_gradient(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return d gate and d up."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    d_gate, d_up = torch.empty_like(gate), torch.empty_like(gate)
    _library().swiglu_gradient(grad.numel(), *_addresses(grad, gate, up, d_gate, d_up))
    return d_gate, d_up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return weight * x / sqrt(mean(x^2) + eps) over the last dimension, and one over the root, (rows,)."""
    x, weight = x.contiguous(), weight.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    inverse = x.new_empty(x.numel() // size)
    _library().rms_norm(inverse.numel(), size, eps, *_addresses(x, weight, y, inverse))
    return y, inverse


def rms_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Return dx of `rms_norm`."""
    grad, x, weight = grad.contiguous(), x.contiguous(), weight.contiguous()
    dx = torch.empty_like(x)
    _library().rms_norm_gradient(inverse.numel(), x.shape[-1], *_addresses(grad, x, weight, inverse, dx))
    return dx


def quantise_rows(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the 8-bit integers and scales (rows, 1) of (rows, size) numbers times their column's factor."""
    x = x.contiguous()
    integers, scales = torch.empty(x.shape, dtype=torch.int8), x.new_empty(x.shape[0], 1)
    _library().quantise_rows(*x.shape, *_addresses(x, factors, integers, scales))
    return integers, scales


def scale_products(products: Tensor, scales: Tensor, factors: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return products * scales * factors + bias for (rows, size) 32-bit integers."""
    y = torch.empty(products.shape)
    _library().scale_products(*products.shape, *_addresses(products.contiguous(), scales, factors, bias, y))
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """Return (rows, heads, size) numbers after the rotation by (rows, size) cosines and sines, or after its transpose."""
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    y = torch.empty_like(x)
    _library().rotate(*x.shape, int(back), *_addresses(x, cos, sin, y))
    return y


def softmax_gradient_(logits: Tensor, weights: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Turn (rows, size) logits into weights * (softmax - floor), and return each row's largest and total, (rows,).

    The logarithm of a row's sum of e^logit is largest + log(total).
    """
    largest, totals = logits.new_empty(len(logits)), logits.new_empty(len(logits))
    _library().softmax_gradient(*logits.shape, floor, *_addresses(weights.contiguous(), logits, largest, totals))
    return largest, totals


def _library() -> ctypes.CDLL:
    assert _Process.library is not None
    return _Process.library


def _addresses(*tensors: Tensor | None) -> list[int | None]:
    return [None if tensor is None else tensor.data_ptr() for tensor in tensors]
