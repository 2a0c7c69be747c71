"""The passes of kernels.c and low_rank.c on tensors: contiguous fp32 on the CPU, each one read and one write of memory.

base/kernels.py compiles them and calls `use` once a process; until then, and for other tensors, `fits` says no and callers
run what torch offers. Nothing here knows autograd. A call takes 3 us beyond its work.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

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
    "low_rank_forward": [*[_INTEGER] * 5, _FLOAT, *[_POINTER] * 6],
    "low_rank_backward": [*[_INTEGER] * 5, _FLOAT, *[_POINTER] * 9],
}

_BLOCK = 32  # rows of one at a time in low_rank.c


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
    y = _empty(gate)
    _call("swiglu", y.numel(), gate.contiguous(), up.contiguous(), y)
    return y


def swiglu_gradient(grad: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return d gate and d up."""
    d_gate, d_up = _empty(gate), _empty(gate)
    _call("swiglu_gradient", gate.numel(), grad.contiguous(), gate.contiguous(), up.contiguous(), d_gate, d_up)
    return d_gate, d_up


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return weight * x / sqrt(mean(x^2) + eps) over the last dimension, and one over the root, (rows,)."""
    y, size = _empty(x), x.shape[-1]
    inverse = x.new_empty(x.numel() // size)
    _call("rms_norm", len(inverse), size, eps, x.contiguous(), weight.contiguous(), y, inverse)
    return y, inverse


def rms_norm_gradient(grad: Tensor, x: Tensor, weight: Tensor, inverse: Tensor) -> Tensor:
    """Return dx of `rms_norm`."""
    dx = _empty(x)
    rows = (grad.contiguous(), x.contiguous())
    _call("rms_norm_gradient", len(inverse), x.shape[-1], *rows, weight.contiguous(), inverse, dx)
    return dx


def quantise_rows(x: Tensor, factors: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return the 8-bit integers and scales (rows, 1) of (rows, size) numbers times their column's factor."""
    integers, scales = _empty(x, torch.int8), x.new_empty(len(x), 1)
    _call("quantise_rows", *x.shape, x.contiguous(), _columns(factors, x), integers, scales)
    return integers, scales


def scale_products(products: Tensor, scales: Tensor, factors: Tensor | None, bias: Tensor | None) -> Tensor:
    """Return products * scales * factors + bias for (rows, size) 32-bit integers and (rows, 1) scales."""
    y = _empty(products, torch.float32)
    columns = (_columns(factors, products), _columns(bias, products))
    _call("scale_products", *products.shape, products.contiguous(), scales.contiguous(), *columns, y)
    return y


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, back: bool) -> Tensor:
    """Return (rows, heads, size) numbers after the rotation by (rows, size) cosines and sines, or after its transpose."""
    y = _empty(x)
    _call("rotate", *x.shape, int(back), x.contiguous(), cos.contiguous(), sin.contiguous(), y)
    return y


def softmax_gradient_(logits: Tensor, weights: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    """Turn contiguous (rows, size) logits into weights * (softmax - floor), and return each row's largest and total, (rows,).

    The logarithm of a row's sum of e^logit is largest + log(total).
    """
    largest, totals = logits.new_empty(len(logits)), logits.new_empty(len(logits))
    _call("softmax_gradient", *logits.shape, floor, weights.contiguous(), logits, largest, totals)
    return largest, totals


def add_low_rank_(y: Tensor, x: Tensor, A: Tensor, B: Tensor, scaling: float, h: Tensor) -> None:
    """Add scaling h B^T to contiguous y (rows, out), with h = x A^T written into the first r columns of h (rows, any)."""
    rows, size, (out, r) = len(x), x.shape[1], B.shape
    sizes = (rows, size, out, r, h.stride(0))
    inputs = (x.contiguous(), A.contiguous(), B.contiguous())
    scratch = x.new_empty(r * out)
    _call("low_rank_forward", *sizes, scaling, *inputs, scratch, h.data_ptr(), y, flop=2 * rows * r * (size + out))


def low_rank_gradient(
    grad: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, scaling: float, dx: Tensor | None, *, need_weights: bool
) -> tuple[Tensor, Tensor] | None:
    """Write dx of `add_low_rank_` if it is wanted, and return dA and dB if they are."""
    rows, size, (out, r) = len(x), x.shape[1], B.shape
    sizes = (rows, size, out, r, h.stride(0))
    inputs = (grad.contiguous(), x.contiguous(), h.data_ptr(), A.contiguous(), B.contiguous())
    scratch = x.new_empty(r * (out + torch.get_num_threads() * (size + out + _BLOCK)))
    found = (A.new_empty(A.shape), B.new_empty(B.shape)) if need_weights else None
    columns = out + size * (dx is not None) + (size + out) * need_weights
    written = (scratch, dx, *(found or (None, None)))
    _call("low_rank_backward", *sizes, scaling, *inputs, *written, flop=2 * rows * r * columns)
    return found


def _empty(like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(like.shape, dtype=dtype or like.dtype, device=like.device)


def _columns(numbers: Tensor | None, rows: Tensor) -> Tensor | None:
    """Return one number a column of `rows`; C reads as many, whatever there are."""
    if numbers is not None and numbers.shape != rows.shape[1:]:
        raise ValueError(f"{tuple(numbers.shape)} numbers for the columns of {tuple(rows.shape)}")
    return None if numbers is None else numbers.contiguous()


def _call(name: str, *arguments: Any, flop: int = 0) -> None:
    """Call a kernel; `arguments` holds the tensors, made for the call or not, until it is over.

    Under torch's profiler the call is an event, with the floating-point operations of its products in its name.
    """
    assert _Process.library is not None
    given = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            assert argument.is_contiguous(), name
            argument = argument.data_ptr()
        given.append(argument)
    function = getattr(_Process.library, name)
    if torch.autograd._profiler_enabled():  # type: ignore[attr-defined]
        with record_function(f"onebase::{name}" + f" {flop} FLOP" * (flop > 0)):
            function(*given)
    else:
        function(*given)
