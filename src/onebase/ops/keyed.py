"""Randomness that is keyed, not consumed: a draw depends on what it is for, never on what was drawn before.

A row's key mixes (seed, step, example, position, target), so no neighbour in the batch, no recomputation under
activation checkpointing and no resume changes a mask. The mixing function is splitmix64's finaliser (Steele, Lea and
Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, fig. 17); the mask itself uses murmur3's 32-bit
finaliser, because it runs over rows x columns.
"""

from __future__ import annotations

import zlib

import torch
from jaxtyping import Bool, Int64
from torch import Tensor

_MASK64 = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


def mix(*parts: int | str) -> int:
    """Return one 64-bit key of all the parts, in order; equal on every machine and in every process."""
    key = 0
    for part in parts:
        number = zlib.crc32(part.encode()) if isinstance(part, str) else part
        key = (key * 31 + number + _GAMMA) & _MASK64
        key = ((key ^ (key >> 30)) * _MIX_1) & _MASK64
        key = ((key ^ (key >> 27)) * _MIX_2) & _MASK64
        key ^= key >> 31
    return key


def mix_rows(keys: Int64[Tensor, " rows"], part: int) -> Int64[Tensor, " rows"]:
    """Return every row's key mixed with one more part, the same for all rows."""
    return _finalise(keys ^ _signed(mix(part)))


def position_keys(key: int, first: int, count: int) -> Int64[Tensor, " count"]:
    """Return the keys of `count` positions of one example, the first at position `first`."""
    positions = torch.arange(first, first + count, dtype=torch.int64)
    return _finalise(positions * _signed(_GAMMA) + _signed(key))


def keep_mask(row_keys: Int64[Tensor, " rows"], columns: int, p: float) -> Bool[Tensor, "rows columns"]:
    """Return a mask that is False with probability `p`, decided by (row key, column) alone.

    Cost: about eight 32-bit integer operations an element.
    """
    rows = (row_keys & 0x7FFFFFFF).to(torch.int32)
    column = torch.arange(columns, dtype=torch.int64, device=row_keys.device) * 0x9E3779B1
    bits = rows[:, None] ^ _low32(column)[None, :]
    # murmur3's finaliser on signed 32-bit numbers: shifts are arithmetic, so the copied sign bits are masked off
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * _as_int32(0x85EBCA6B)
    bits ^= (bits >> 13) & 0x7FFFF
    bits *= _as_int32(0xC2B2AE35)
    bits ^= (bits >> 16) & 0xFFFF
    return (bits & 0x7FFFFFFF) >= int(p * 2**31)


def _finalise(keys: Tensor) -> Tensor:
    keys = (keys ^ ((keys >> 30) & ((1 << 34) - 1))) * _signed(_MIX_1)
    keys = (keys ^ ((keys >> 27) & ((1 << 37) - 1))) * _signed(_MIX_2)
    return keys ^ ((keys >> 31) & ((1 << 33) - 1))


def _signed(number: int) -> int:
    number &= _MASK64
    return number - (1 << 64) if number >= 1 << 63 else number


def _as_int32(number: int) -> int:
    return number - (1 << 32) if number >= 1 << 31 else number


def _low32(numbers: Tensor) -> Tensor:
    low = numbers & 0xFFFFFFFF
    return torch.where(low >= 1 << 31, low - (1 << 32), low).to(torch.int32)
