"""The passes of kernels.c, low_rank.c and attention.c on tensors: fp32 on the CPU, contiguous but for attention's.

base/kernels.py compiles them and calls `use` once a process; until then, and for other tensors, `fits` says no and callers
run what torch offers. Nothing here knows autograd. A call takes 3 us beyond its work.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from onebase.ops.pieces import Pieces

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
    "attention": [_INTEGER, *[_POINTER] * 7],
    "attention_gradient": [_INTEGER, *[_POINTER] * 5],
}
_BLOCK = 32  # rows of one at a time in low_rank.c
_MOST_NUMBERS, _MOST_HEADS = 256, 192  # of a head, of a group that shares a key head: WIDEST and ROWS of attention.c


class _Rows(ctypes.Structure):
    _fields_ = (("at", _POINTER), ("token", _INTEGER), ("head", _INTEGER), ("size", _INTEGER))


class _Attention(ctypes.Structure):
    _fields_ = (
        *((name, _INTEGER) for name in ("heads", "kv_heads", "causal", "window")),
        ("scale", _FLOAT),
        *((name, _Rows) for name in ("q", "k", "v")),
    )


class _Gradients(ctypes.Structure):
    _fields_ = (
        *((name, _POINTER) for name in ("q", "k", "v", "k_before", "v_before", "peaks", "inverses")),
        *((name, _Rows) for name in ("out", "grad")),
    )


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


def fits_attention(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Return whether `attention` takes these (tokens, heads, size) numbers."""
    group, rest = divmod(query.shape[1], key.shape[1])
    sizes = (query.shape[2], value.shape[2])
    return fits(query, key, value) and rest == 0 and group <= _MOST_HEADS and max(sizes) <= _MOST_NUMBERS


def attention(
    parts: Sequence[Tensor], pieces: Pieces, *, causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Return the attention of (tokens, heads, size) queries, keys and values, and what its gradient needs of the softmax."""
    query, _, value = parts = [_dense_rows(part) for part in parts]
    out = query.new_empty(*query.shape[:2], value.shape[2])
    peaks_and_inverses = query.new_empty(2, *query.shape[:2])
    call = _attention_call(parts, causal, window, scale)
    _call("attention", *_tables(pieces), ctypes.byref(call), out, *peaks_and_inverses)
    return out, peaks_and_inverses


def attention_gradient(
    grad: Tensor, kept: Sequence[Tensor], pieces: Pieces, *, causal: bool, window: int | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return d query, d key and d value; `kept` holds these three and what `attention` returned."""
    grad, *parts = (_dense_rows(part) for part in (grad, *kept[:3]))
    out, peaks_and_inverses = kept[3:]
    found = tuple(_empty(part) for part in parts)
    apart = [part.new_empty(max(pieces.apart, 1), *part.shape[1:]) for part in parts[1:]]  # attention.c fills it
    call = _attention_call(parts, causal, window, scale)
    numbers = [part.data_ptr() for part in (*found, *apart, *peaks_and_inverses)]
    gradients = _Gradients(*numbers, _rows(out), _rows(grad))
    _call("attention_gradient", *_tables(pieces), ctypes.byref(call), ctypes.byref(gradients))
    return found  # type: ignore[return-value]


def _attention_call(parts: Sequence[Tensor], causal: bool, window: int | None, scale: float) -> _Attention:
    heads = (parts[0].shape[1], parts[1].shape[1])
    return _Attention(*heads, int(causal), window or 0, scale, *(_rows(part) for part in parts))


def _tables(pieces: Pieces) -> tuple[int, Tensor, Tensor, Tensor]:
    return len(pieces.tasks), pieces.tasks, pieces.pieces, pieces.ancestors


def _dense_rows(x: Tensor) -> Tensor:
    """Return the numbers with those of a head beside each other."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> _Rows:
    return _Rows(x.data_ptr(), x.stride(0), x.stride(1), x.shape[2])


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
