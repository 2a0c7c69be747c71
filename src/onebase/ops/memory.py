"""Memories: learned keys and values that take the place of what attention computed at some rows (prefix tuning).

`take_places` returns new tensors. `take_places_` writes into those of a cache, so that what it keeps from the first
forward are the learned ones. Both change the memory's rows alone, whatever stands beside them.
Called by the attention functions of base/flat.py; the learned tensors come from adapters/prefix.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Memory:
    """One adapter's keys and values for every layer, after rotary, and the rows where they stand.

    `places` holds (entry of the batch, first row) of each stretch of n rows; a flat batch has one entry. None: the
    first rows of every entry.
    """

    keys: Float[Tensor, "layers kv_heads n dim"]
    values: Float[Tensor, "layers kv_heads n dim_v"]
    places: tuple[tuple[int, int], ...] | None

    def starts(self, entries: int) -> tuple[tuple[int, int], ...]:
        """Return the places in a batch of so many entries."""
        return tuple((entry, 0) for entry in range(entries)) if self.places is None else self.places


def fits(memory: Memory, key: Tensor, value: Tensor, layer: int) -> bool:
    """Return whether a layer's keys and values have the memory's shape and rows."""
    layers, kv_heads, count, width = memory.keys.shape
    shapes = (kv_heads, width, memory.values.shape[3]) == (key.shape[1], key.shape[3], value.shape[3])
    rows = all(e < key.shape[0] and start + count <= key.shape[2] for e, start in memory.starts(key.shape[0]))
    return layer < layers and shapes and rows


def take_places(
    states: Float[Tensor, "batch kv_heads length width"],
    learned: Float[Tensor, "kv_heads n width"],
    starts: Sequence[tuple[int, int]],
) -> Float[Tensor, "batch kv_heads length width"]:
    """Return the states with learned[:, i] at row start + i of each (entry, start).

    The places must not overlap. Stretches are split off and joined again, so no index travels to the device, and the
    gradient of a learned row is the sum over its places.
    """
    batch, kv_heads, length, width = states.shape
    filling = learned.to(states.dtype).transpose(0, 1)
    sizes, end = [], 0
    for first in sorted(entry * length + start for entry, start in starts):
        sizes += [first - end, len(filling)]
        end = first + len(filling)
    rows = states.transpose(1, 2).flatten(0, 1)
    pieces = [*rows.split([*sizes, len(rows) - end])]  # type: ignore[no-untyped-call]
    pieces[1::2] = [filling] * len(starts)
    return torch.cat(pieces).view(batch, length, kv_heads, width).transpose(1, 2)


def take_places_(
    states: Float[Tensor, "batch kv_heads length width"],
    learned: Float[Tensor, "kv_heads n width"],
    starts: Sequence[tuple[int, int]],
) -> None:
    """Write learned[:, i] to row start + i of each (entry, start), in place."""
    for entry, start in starts:
        states[entry, :, start : start + learned.shape[1]] = learned.to(states.dtype)
