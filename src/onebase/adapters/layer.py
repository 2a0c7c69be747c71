"""The wrapper around a frozen module: its own output, changed row by row by the parts of whichever adapter owns the row.

`AdaptedLayer` holds the frozen module and calls it, so a quantised one needs no branch, and it knows adapters only by
their number in the bank. What parts do and in which order: part.py. Low-rank updates of all adapters are one
operation; other parts are called once for each stretch of rows that has them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor, nn

from onebase.adapters.part import InputPart, LowRankPart, ModulePart, OutputPart, Part, RowCall
from onebase.base.route import Route, RowSpace, Slot
from onebase.ops.keyed import mix_rows
from onebase.ops.low_rank import LowRank, add_low_rank_
from onebase.ops.segments import NO_OWNER, Segments


class Rows(Enum):
    """What a row of a module's input is."""

    VECTORS = "vectors"  # (..., features): every vector on its own
    IDS = "ids"  # (...): every number on its own
    FIRST = "first"  # (rows, ...): whatever lies behind the first dimension


_Stretch = tuple[int, int, list[Part]]


class AdaptedLayer(nn.Module):
    """A frozen module with the bank's parts on it, bound to one row space when it is made."""

    def __init__(self, base_layer: nn.Module, path: str, space: RowSpace, slot: Slot) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.path, self.space, self.rows = path, space, rows_of(base_layer)
        self._slot = slot
        self._key = path_key(path)
        self._parts: dict[int, list[Part]] = {}
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
        return not self._parts

    @property
    def parts(self) -> Iterator[Part]:
        """All adapters' parts on this layer."""
        return (part for parts in self._parts.values() for part in parts)

    @property
    def is_low_rank(self) -> bool:
        """Whether all that the parts do is the low-rank update."""
        others = (InputPart, ModulePart, OutputPart)
        return not any(isinstance(part, others) or not isinstance(part, LowRankPart) for part in self.parts)

    def put(self, owner: int, part: Part) -> None:
        """Put a part of adapter number `owner` on this layer."""
        self._parts.setdefault(owner, []).append(part)
        self._rebuild()

    def take_off(self, owner: int) -> None:
        """Remove the parts of adapter number `owner`, if it has some here."""
        self._parts.pop(owner, None)
        self._rebuild()

    def _rebuild(self) -> None:
        pairs = [
            (owner, part) for owner, parts in self._parts.items() for part in parts if isinstance(part, LowRankPart)
        ]
        self.low_rank = low_rank_of(pairs) if pairs else None

    def forward(self, x: Tensor, *others: Any, **named: Any) -> Tensor:
        """Return the module's output, each row changed by the parts of its owner."""
        route = self._slot.route
        if route is None or self.is_bare:
            y: Tensor = self.base_layer(x, *others, **named)
            return y
        if self.rows is Rows.IDS:
            x = _of_every_entry(x, route)
        # rows, not x, go through the base: an update is added in place, and to a view that would cost a copy
        rows = x.flatten(0, -2) if self.rows is Rows.VECTORS else x.flatten() if self.rows is Rows.IDS else x
        segments = route.segments(self.space, rows.shape[0])
        keys = route.row_keys.get(self.space)
        keys = None if keys is None else mix_rows(keys, self._key)
        y = self.forward_rows(rows, segments, keys, *others, **named)
        if self.rows is Rows.FIRST:
            return y
        return y.view(*(x.shape if self.rows is Rows.IDS else x.shape[:-1]), y.shape[-1])

    def forward_rows(
        self, rows: Tensor, segments: Segments, row_keys: Tensor | None, *others: Any, **named: Any
    ) -> Tensor:
        """Return the output for rows that lie one after the other.

        Args:
            segments: which adapter owns which of them.
            row_keys: what their dropout in this layer depends on; None switches it off.
        """
        stretches = [(start, end, self._parts.get(owner, [])) for start, end, owner in segments]

        def call(start: int, end: int, x: Tensor) -> RowCall:
            sliced = tuple(_rows_of(other, rows.shape[0], start, end) for other in others)
            return RowCall(self.base_layer, x, sliced, None if row_keys is None else row_keys[start:end])

        x = _each(
            rows,
            stretches,
            InputPart,
            lambda part, piece, start, end: part.on_input(piece),
        )
        if any(isinstance(part, ModulePart) for _, _, parts in stretches for part in parts):
            pieces = [self._instead(parts, call(start, end, x[start:end])) for start, end, parts in stretches]
            y = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
        else:
            y = self.base_layer(x, *others, **named)
        if self.low_rank is not None:
            y = add_low_rank_(y, x, self.low_rank, segments, row_keys)
        return _each(
            y,
            stretches,
            OutputPart,
            lambda part, piece, start, end: part.on_output(piece, call(start, end, rows[start:end])),
        )

    def _instead(self, parts: Iterable[Part], call: RowCall) -> Tensor:
        own = next((part for part in parts if isinstance(part, ModulePart)), None)
        y: Tensor = self.base_layer(call.x, *call.others) if own is None else own.instead(call)
        return y


def _each(
    rows: Tensor, stretches: list[_Stretch], kind: Any, change: Callable[[Any, Tensor, int, int], Tensor]
) -> Tensor:
    """Return the rows with the parts of one kind applied to each stretch, in the order in which they were put on."""
    if not any(isinstance(part, kind) for _, _, parts in stretches for part in parts):
        return rows
    pieces = []
    for start, end, parts in stretches:
        piece = rows[start:end]
        for part in parts:
            if isinstance(part, kind):
                piece = change(part, piece, start, end)
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _of_every_entry(ids: Tensor, route: Route) -> Tensor:
    """Return the ids with a line for each entry of the route's batch: position ids may come once for all of them.

    Raises:
        RuntimeError: they are of another number of entries.
    """
    count = 1 if route.batch_owners is None else len(route.batch_owners)
    if count == 1 or ids.shape[0] == count:
        return ids
    if ids.dim() == 1 or ids.shape[0] != 1:
        raise RuntimeError(f"an embedding got ids of shape {tuple(ids.shape)} for a batch of {count}")
    return ids.expand(count, *ids.shape[1:])


def _rows_of(other: object, row_count: int, start: int, end: int) -> object:
    """Return a further argument for some rows: its own rows where it has one for each, itself otherwise."""
    if isinstance(other, Tensor) and other.dim() > 0 and other.shape[0] == row_count:
        return other[start:end]
    return other


def low_rank_of(pairs: list[tuple[int, LowRankPart]]) -> LowRank:
    """Return the pairs of one layer, each with its owner's number, as the routed operation takes them."""
    pair_of_owner = torch.full((max(owner for owner, _ in pairs) + 1,), NO_OWNER, dtype=torch.int64)
    for index, (owner, _) in enumerate(pairs):
        pair_of_owner[owner] = index
    return LowRank(
        lora_A=tuple(part.lora_A for _, part in pairs),
        lora_B=tuple(part.lora_B for _, part in pairs),
        scaling=torch.tensor([part.scaling for _, part in pairs], dtype=torch.float64),
        dropout=torch.tensor([part.dropout for _, part in pairs], dtype=torch.float64),
        pair_of_owner=pair_of_owner,
    )


def rows_of(module: nn.Module) -> Rows:
    """Return what a row of a module's input is: known for embeddings and for what works on single vectors."""
    if isinstance(module, nn.Embedding):
        return Rows.IDS
    name = type(module).__name__
    if isinstance(module, nn.Linear) or name == "Conv1D" or (name.endswith("Norm") and name != "GroupNorm"):
        return Rows.VECTORS
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return Rows.VECTORS  # quantised linear layers
    return Rows.FIRST


def path_key(path: str) -> int:
    """Return what a module's path adds to the keys of its dropout."""
    return zlib.crc32(path.encode())
