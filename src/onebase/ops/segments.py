"""Segments: which adapter owns which rows of a flat batch, as tensors.

Here: `Segments`, the only description of ownership that the routed operations read. Not here: which example a row
belongs to (ops/layout.py) or which adapters exist (adapters/bank.py). Offsets and owners are tensors padded to a
bucketed count, so that code compiled for one batch is reused for the next: Python integers would be constants to a
compiler and recompile for every batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Int64
from torch import Tensor

NO_OWNER = -1
_FEWEST = 4


@dataclass(frozen=True)
class Segments:
    """Rows `offsets[i]` to `offsets[i + 1]` belong to adapter `owners[i]`; `NO_OWNER` rows pass unchanged.

    Both tensors lie on the CPU. Unused places at the end are empty segments without an owner.
    """

    offsets: Int64[Tensor, " n_plus_1"]
    owners: Int64[Tensor, " n"]

    @staticmethod
    def of(lengths: Sequence[int], owners: Sequence[int]) -> Segments:
        """Return segments of `lengths` rows each, neighbours with one owner joined, padded to a bucketed count."""
        if len(lengths) != len(owners):
            raise ValueError(f"{len(lengths)} lengths but {len(owners)} owners")
        joined: list[list[int]] = []
        for length, owner in zip(lengths, owners, strict=True):
            if joined and joined[-1][1] == owner:
                joined[-1][0] += length
            elif length:
                joined.append([length, owner])
        count = bucket_of(len(joined))
        offsets = torch.zeros(count + 1, dtype=torch.int64)
        used = torch.tensor([length for length, _ in joined], dtype=torch.int64).cumsum(0)
        offsets[1 : len(joined) + 1] = used
        offsets[len(joined) + 1 :] = used[-1] if joined else 0
        padded = torch.full((count,), NO_OWNER, dtype=torch.int64)
        padded[: len(joined)] = torch.tensor([owner for _, owner in joined], dtype=torch.int64)
        return Segments(offsets, padded)

    @property
    def row_count(self) -> int:
        """Number of rows described."""
        return int(self.offsets[-1])

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Yield (first row, row after the last, owner) of every segment that has rows."""
        return iter(self._spans)

    @cached_property
    def _spans(self) -> list[tuple[int, int, int]]:
        bounds = self.offsets.tolist()
        spans = zip(bounds[:-1], bounds[1:], self.owners.tolist(), strict=True)
        return [(start, end, owner) for start, end, owner in spans if end > start]


def bucket_of(count: int) -> int:
    """Return the smallest power of two that holds `count`, at least 4."""
    size = _FEWEST
    while size < count:
        size *= 2
    return size
