"""Tensors in safetensors files: written in a fixed order, read with checks. No pickle, no time, no path inside.

The same tensors give the same bytes. torch is imported only when a function is called, so that listing runs costs none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from onebase.errors import FileFormatError
from onebase.files.atomic import write_synced

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

_EXPONENTS = {"F16": ("<u2", 0x7C00), "BF16": ("<u2", 0x7F80), "F32": ("<u4", 0x7F800000), "F64": ("<u8", 0x7FF << 52)}
"""The bits of each number format, as unsigned integers, that are all set in NaN and infinity alone."""
_CHUNK = 1 << 22
_METADATA = {"format": "pt"}  # what transformers and peft write; some readers insist on it


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, str]:
    """Write tensors in their own dtypes and return the file's size in bytes and its SHA-256.

    The file is written in place: call it inside `atomic.new_folder`.
    """
    data = tensor_bytes(tensors)
    write_synced(path, data)
    return len(data), hashlib.sha256(data).hexdigest()


def tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the content of a file of these tensors, in their own dtypes."""
    import safetensors.torch

    # Through bytes, not save_file: that one makes files that only their owner can read, and hides the system's errors.
    data: bytes = safetensors.torch.save(_apart(tensors), metadata=_METADATA)
    return data


def read_tensors(path: Path, *, todo: str) -> dict[str, Tensor]:
    """Return the tensors of a file by name, sorted, on the CPU, independent of the file; `todo` ends the error.

    Raises:
        FileFormatError: the file is damaged or no safetensors file.
    """
    return parse_tensors(path, path.read_bytes(), todo=todo)


def parse_tensors(path: Path, data: bytes, *, todo: str) -> dict[str, Tensor]:
    """Return the tensors in the bytes of a safetensors file; `path` is for the error only."""
    import safetensors
    import safetensors.torch

    try:
        loaded = safetensors.torch.load(data)
    except (safetensors.SafetensorError, ValueError, KeyError, RuntimeError) as error:
        raise FileFormatError(
            f"{path}: damaged, or no safetensors file ({len(data)} bytes): {error}. {todo}"
        ) from error
    return {name: loaded[name] for name in sorted(loaded)}


def not_finite(path: Path) -> dict[str, int]:
    """Return how many numbers are NaN or infinite in each tensor of a sound file that has any. No torch."""
    import numpy as np

    data = np.memmap(path, mode="r")
    start = 8 + int.from_bytes(data[:8].tobytes(), "little")
    found = {}
    for name, tensor in json.loads(data[8:start].tobytes()).items():
        if name != "__metadata__" and tensor["dtype"] in _EXPONENTS:
            unsigned, exponent = _EXPONENTS[tensor["dtype"]]
            first, last = tensor["data_offsets"]
            bits = data[start + first : start + last].view(unsigned)
            chunks = (bits[at : at + _CHUNK] & exponent for at in range(0, len(bits), _CHUNK))
            if count := sum(int((chunk == exponent).sum()) for chunk in chunks):
                found[name] = count
    return found


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors sorted by name, on the CPU, contiguous, none sharing memory with another."""
    apart: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        start = tensor.untyped_storage().data_ptr()
        if start in seen:
            tensor = tensor.clone()
        seen.add(start)
        apart[name] = tensor
    return apart
