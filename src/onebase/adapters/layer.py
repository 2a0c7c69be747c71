"""The wrapper around a frozen module: its own output, and the update of whichever adapter owns each row.

`AdaptedLayer` computes base_layer(x) + update(x) and nothing else. It holds the frozen module and calls it, so a
quantised one needs no branch, and it knows adapters only by their number in the bank.
"""

from __future__ import annotations

import zlib
from typing import cast

import torch
from torch import Tensor, nn

from onebase.adapters.lora import LoraTarget
from onebase.base.route import RowSpace, Slot
from onebase.ops.keyed import mix_rows
from onebase.ops.low_rank import LowRank, add_low_rank_
from onebase.ops.segments import NO_OWNER


class AdaptedLayer(nn.Module):
    """A frozen linear layer with the bank's pairs beside it, bound to one row space when it is made."""

    def __init__(self, base_layer: nn.Module, path: str, space: RowSpace, slot: Slot) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path, self.space = path, space
        self._slot = slot
        self._key = path_key(path)
        self._targets: dict[int, LoraTarget] = {}
        self.low_rank: LowRank | None = None

    @property
    def weight(self) -> Tensor:
        """The frozen weight (some models read it)."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias (some models read it)."""
        return cast(Tensor | None, self.base_layer.bias)

    @property
    def is_bare(self) -> bool:
        """Whether no adapter is on this layer any more."""
        return not self._targets

    def put(self, owner: int, target: LoraTarget) -> None:
        """Put adapter number `owner`'s pair on this layer."""
        self._targets[owner] = target
        self._rebuild()

    def take_off(self, owner: int) -> None:
        """Remove adapter number `owner`'s pair, if it has one here."""
        self._targets.pop(owner, None)
        self._rebuild()

    def _rebuild(self) -> None:
        targets = list(self._targets.values())
        pair_of_owner = torch.full((max(self._targets, default=-1) + 1,), NO_OWNER, dtype=torch.int64)
        for pair, owner in enumerate(self._targets):
            pair_of_owner[owner] = pair
        self.low_rank = LowRank(
            lora_A=tuple(t.lora_A for t in targets),
            lora_B=tuple(t.lora_B for t in targets),
            scaling=torch.tensor([t.scaling for t in targets], dtype=torch.float64),
            dropout=torch.tensor([t.dropout for t in targets], dtype=torch.float64),
            pair_of_owner=pair_of_owner,
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return base_layer(x) plus, row by row, the update of the row's owner."""
        route = self._slot.route
        if route is None or self.low_rank is None or self.is_bare:
            y: Tensor = self.base_layer(x)
            return y
        rows = x.flatten(0, -2)
        segments = route.segments(self.space, rows.shape[0])
        keys = route.row_keys.get(self.space)
        row_keys = None if keys is None else mix_rows(keys, self._key)
        # rows, not x, go through the base: the update is added in place, and to a view that would cost a copy
        y = add_low_rank_(self.base_layer(rows), rows, self.low_rank, segments, row_keys)
        return y.view(*x.shape[:-1], y.shape[-1])


def path_key(path: str) -> int:
    """Return what a module's path adds to the keys of its dropout."""
    return zlib.crc32(path.encode())
