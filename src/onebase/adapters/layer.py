"""The wrapper around a frozen module: its own output, changed row by row by the parts of whichever adapter owns the row.

`AdaptedLayer` holds the frozen module and calls it, so a quantised one needs no branch, and it knows adapters only by
their number in the bank. What parts do and in which order: part.py. Low-rank updates of all adapters are one
operation; other parts are called once for each stretch of rows that has them.
"""

from __future__ import annotations

import inspect
import math
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import replace
from enum import Enum
from typing import Any, cast

import torch
from torch import Tensor, nn

from onebase.adapters.part import InputPart, LowRankPart, ModulePart, OutputPart, Part, RowCall
from onebase.base.route import Route, RowSpace, Slot
from onebase.errors import ConfigError
from onebase.ops.keyed import mix_rows, position_keys
from onebase.ops.low_rank import LowRank, add_low_rank_
from onebase.ops.segments import NO_OWNER, Segments


class Rows(Enum):
    """What a row of a module's input is."""

    VECTORS = "vectors"  # (..., features): every vector on its own
    IDS = "ids"  # (...): every number on its own
    FIRST = "first"  # (rows, ...): whatever lies behind the first dimension


class AdaptedLayer(nn.Module):
    """A frozen module with the bank's parts on it, bound to one row space when it is made."""

    def __init__(
        self, base_layer: nn.Module, path: str, space: RowSpace, slot: Slot, *, reads_tokens: bool = True,
        tokens_at: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.reads_tokens = reads_tokens  # an embedding of what a batch's entries are, not of where it stands
        self.tokens_at = tokens_at  # which dimension of its input are the tokens, as the base's self-check saw it
        self.base_layer = base_layer
        self.path, self.space, self.rows = path, space, rows_of(base_layer)
        self._slot = slot
        self._key = path_key(path)
        self._has_children = any(True for _ in base_layer.children())
        self._attends = any(hasattr(module, "layer_idx") for module in base_layer.modules())  # as learned keys ask
        self._parts: dict[int, list[Part]] = {}
        self._of_kind: dict[type, dict[int, list[Any]]] = {}
        self.low_rank: LowRank | None = None
        # models read more of a module than they call it for: its settings, and by name what lies in it. All of it is shown,
        # functions and tensors included: a choice by kind or name would end at the next model (act_fn, gate_up_proj)
        for name, value in {**vars(base_layer), **base_layer._parameters, **base_layer._modules}.items():
            if not (name.startswith("_") or hasattr(self, name)):
                self.show(name, value)

    def show(self, name: str, value: Any) -> None:
        """Let a model read `name` of this layer as of the frozen module; it is no second place for a module."""
        object.__setattr__(self, name, value)

    @property
    def weight(self) -> Tensor:
        """The frozen weight (some models read it)."""
        return cast(Tensor, self.base_layer.weight)

    @property
    def bias(self) -> Any:
        """The frozen bias (some models read it); a recurrent module says by it whether it has some."""
        return self.base_layer.bias

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
        self._of_kind = {  # once, not in every forward: asking a part for its kind takes 15 us
            kind: {o: found for o, parts in self._parts.items() if (found := [p for p in parts if isinstance(p, kind)])}
            for kind in (InputPart, ModulePart, OutputPart)
        }

    def forward(self, *args: Any, **named: Any) -> Any:
        """Return the module's output, each row changed by the parts of its owner."""
        route = self._slot.route
        if route is None or not self._concerns(route):
            return self.base_layer(*args, **named)
        route = self._narrowed(route)
        keyword = None if args else next(iter(named))
        x = args[0] if keyword is None else named.pop(keyword)
        x = self._of_every_entry(x, route)
        # rows, not x, go through the base: an update is added in place, and to a view that would cost a copy
        rows = x.flatten(0, -2) if self.rows is Rows.VECTORS else x.flatten() if self.rows is Rows.IDS else x
        shape = x.shape[:-1] if self.rows is Rows.VECTORS else x.shape if self.rows is Rows.IDS else x.shape[:1]
        segments, times, each = self._segments(route, tuple(shape))
        keys = route.row_keys.get(self.space)
        if route.dropout_key is not None:
            keys = position_keys(route.dropout_key, 0, segments.row_count).to(x.device)
        keys = None if keys is None else mix_rows(_repeated(keys, times, each), self._key)
        y = self._run(RowCall(self.base_layer, rows, args[1:], keys, named, keyword), segments)
        if self.rows is Rows.FIRST:
            return y
        return y.view(*shape, y.shape[-1])

    def _concerns(self, route: Route) -> bool:
        """Return whether a row may belong to an adapter with parts here.

        If none does, the frozen module is called as if it were not wrapped: a mere view in between would change in
        which order its input's gradients are added up, and so the last bit of a neighbour in the bank.
        """
        if self.is_bare or route.batch_owners is not None:
            return any(owner in self._parts for owner in route.batch_owners or ())
        known = route.rows.get(self.space)
        return known is None or any(owner in self._parts for _, _, owner in known)

    def _narrowed(self, route: Route) -> Route:
        """Return the route of a batch as this layer sees it: one owner for all, where it has parts of no other."""
        if route.batch_owners is None:
            return route
        here = {owner if owner in self._parts else NO_OWNER for owner in route.batch_owners}
        return replace(route, batch_owners=tuple(here)) if len(here) == 1 else route

    def _of_every_entry(self, x: Tensor, route: Route) -> Tensor:
        """Return an input with a line for each entry of the route's batch: positions may come once for all of them.

        Raises:
            ConfigError: they come once for all in another shape (T5's distances), which entries cannot share.
            RuntimeError: they are ids of another number of entries.
        """
        count = 1 if route.batch_owners is None else len(route.batch_owners)
        if count == 1:
            return x
        if x.dim() > 1 and x.shape[0] == 1:
            return x.expand(count, *x.shape[1:])
        if self.rows is Rows.IDS and not self.reads_tokens:
            raise ConfigError(
                f"{self.path}: positions may be looked up once for the whole batch, so that they cannot be told apart by "
                "adapter: its members take turns. Give it batches of one adapter each."
            )
        if self.rows is Rows.IDS and x.shape[0] != count:
            raise RuntimeError(f"an embedding got ids of shape {tuple(x.shape)} for a batch of {count}")
        return x

    def _segments(self, route: Route, shape: tuple[int, ...]) -> tuple[Segments, int, int]:
        """Return who owns the rows of an input with these leading dimensions; how often all tokens come; how many rows each.

        A norm on attention heads sees several vectors a token: behind each token (1, tokens, heads), or all tokens
        head by head (1, heads, tokens).

        Raises:
            ConfigError: the module takes the tokens of several adapters at once, and cannot be split.
            RuntimeError: the route says nothing of such rows.
        """
        count = math.prod(shape)
        known = route.rows.get(self.space)
        if getattr(self.base_layer, "batch_first", True) is False and len(set(route.batch_owners or ())) > 1:
            raise ConfigError(
                f"{self.path}: a {type(self.base_layer).__name__} with batch_first=False has its entries behind the first "
                "dimension, so that they cannot be split between adapters: its members take turns. Give it batches of "
                "one adapter each."
            )
        if route.batch_owners is not None or known is None or known.row_count == count:
            return route.segments(self.space, count), 1, 1
        owners = {owner for _, _, owner in known}
        each, rest = divmod(count, known.row_count)
        if len(owners) == 1 and (self.rows is Rows.FIRST or not rest):
            return Segments.of([count], [*owners]), 1, each
        if self.rows is Rows.FIRST:
            raise ConfigError(
                f"{self.path}: a {type(self.base_layer).__name__} sees all tokens of a flat batch at once, so that they "
                "cannot be split between adapters: its members take turns. Give it batches of one adapter each."
            )
        if len(shape) < 2 or rest:
            return route.segments(self.space, count), 1, 1
        if shape[0] > 1:  # entries of a padded batch, or tokens, come first: what is theirs lies together
            return Segments(known.offsets * each, known.owners), 1, each
        place = self.tokens_at
        if place is None or place >= len(shape) or shape[place] != known.row_count:
            raise RuntimeError(f"{self.path}: cannot tell {known.row_count} tokens from heads in an input of {shape}")
        times = math.prod(shape[:place])
        each //= times
        spans = [((end - start) * each, owner) for start, end, owner in known] * times
        return Segments.of([length for length, _ in spans], [owner for _, owner in spans]), times, each

    def forward_rows(self, rows: Tensor, segments: Segments, row_keys: Tensor | None) -> Tensor:
        """Return the output for rows that lie one after the other.

        Args:
            segments: which adapter owns which of them.
            row_keys: what their dropout in this layer depends on; None switches it off.
        """
        y: Tensor = self._run(RowCall(self.base_layer, rows, row_keys=row_keys), segments)
        return y

    def _run(self, call: RowCall, segments: Segments) -> Any:
        rows = call.x
        stretches = list(segments)
        x = _each(
            rows,
            stretches,
            self._of_kind[InputPart],
            lambda part, piece, start, end: part.on_input(piece),
        )
        if any(owner in self._of_kind[ModulePart] for _, _, owner in stretches):
            y = self._instead(call, x, segments)
        else:
            y = replace(call, x=x).run(self.base_layer)
        if self.low_rank is not None:
            y = add_low_rank_(y, x, self.low_rank, segments, call.row_keys)
        return _each(
            y,
            stretches,
            self._of_kind[OutputPart],
            lambda part, piece, start, end: part.on_output(piece, call.part(start, end, rows[start:end])),
        )

    def _instead(self, call: RowCall, x: Tensor, segments: Segments) -> Any:
        """Return what each owner's own module, or the frozen one, makes of its rows.

        Adapted modules inside see some rows of the batch only, all of one owner: their route says so.
        """
        stretches = list(segments)
        pieces = []
        for start, end, owner in stretches:
            own = next(iter(self._of_kind[ModulePart].get(owner, [])), None)
            part = call.part(start, end, x[start:end])
            alone = len(stretches) == 1 or not self._has_children
            if not alone and self._attends and self._slot.route is not None and self._slot.route.memories:
                raise ConfigError(
                    f"{self.path} is trained whole by an adapter of this batch, and another one has learned keys that "
                    "stand in it (prefix-tuning). Run one adapter at a time."
                )
            with nullcontext() if alone else self._slot.use(Route(batch_owners=(owner,))):
                pieces.append(part.run(self.base_layer) if own is None else own.instead(part))
        return pieces[0] if len(pieces) == 1 else _joined(pieces)


def _joined(pieces: list[Any]) -> Any:
    """Return the results for several stretches as one: rows behind rows, in each member of a tuple."""
    first = pieces[0]
    if isinstance(first, Tensor):
        return torch.cat(pieces)
    if isinstance(first, tuple):
        return tuple(_joined(list(members)) for members in zip(*pieces, strict=True))
    if first is None:
        return None
    raise ConfigError(
        f"a module returns a {type(first).__name__}, which cannot be put together from the rows of several adapters. Run "
        "one adapter at a time."
    )


def _each(
    rows: Any,
    stretches: list[tuple[int, int, int]],
    parts: Mapping[int, list[Any]],
    change: Callable[[Any, Tensor, int, int], Tensor],
) -> Any:
    """Return the rows with an owner's parts of one kind applied to each of its stretches, in the order of their putting."""
    if not any(owner in parts for _, _, owner in stretches):
        return rows
    pieces = []
    for start, end, owner in stretches:
        piece = rows[start:end]
        for part in parts.get(owner, ()):
            piece = change(part, piece, start, end)
        pieces.append(piece)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def _repeated(keys: Tensor, times: int, each: int) -> Tensor:
    """Return every token's key for each of its rows."""
    return keys if times == each == 1 else keys.repeat_interleave(each).repeat(times)


def low_rank_of(pairs: list[tuple[int, LowRankPart]]) -> LowRank:
    """Return the pairs of one layer, each with its owner's number, as the routed operation takes them."""
    plain = [(owner, part) for owner, part in pairs if part.start is None]
    if len(plain) < len(pairs):
        starts = [(owner, part, part.start) for owner, part in pairs if part.start is not None]
        now = _low_rank_of([(owner, part, part.lora_A, part.lora_B) for owner, part, _ in starts])
        first = _low_rank_of([(owner, part, A, B) for owner, part, (A, B) in starts])
        return replace(low_rank_of(plain), started=(now, first))
    return _low_rank_of([(owner, part, part.lora_A, part.lora_B) for owner, part in pairs])


def _low_rank_of(pairs: list[tuple[int, LowRankPart, Tensor, Tensor]]) -> LowRank:
    pair_of_owner = torch.full((max((owner for owner, *_ in pairs), default=-1) + 1,), NO_OWNER, dtype=torch.int64)
    for index, (owner, *_) in enumerate(pairs):
        pair_of_owner[owner] = index
    return LowRank(
        lora_A=tuple(A for _, _, A, _ in pairs),
        lora_B=tuple(B for _, _, _, B in pairs),
        scaling=torch.tensor([part.scaling for _, part, *_ in pairs], dtype=torch.float64),
        dropout=torch.tensor([part.dropout for _, part, *_ in pairs], dtype=torch.float64),
        pair_of_owner=pair_of_owner,
    )


def rows_of(module: nn.Module) -> Rows:
    """Return what a row of a module's input is: known for embeddings and for what works on single vectors."""
    if isinstance(module, nn.Embedding):
        plain = len(inspect.signature(type(module).forward).parameters) == 2  # OPT's positions take a mask and more
        return Rows.IDS if plain else Rows.FIRST
    name = type(module).__name__
    if isinstance(module, nn.Linear) or name == "Conv1D" or (name.endswith("Norm") and name != "GroupNorm"):
        return Rows.VECTORS
    if isinstance(getattr(module, "in_features", None), int) and isinstance(getattr(module, "out_features", None), int):
        return Rows.VECTORS  # quantised linear layers
    return Rows.FIRST


def frozen_module(model: nn.Module, path: str) -> nn.Module:
    """Return the model's own module at a path, whatever wrappers it and those around it have.

    Raises:
        AttributeError: there is none.
    """
    module = model
    for name in path.split("."):
        found = getattr(module, name)
        module = found.base_layer if isinstance(found, AdaptedLayer) else found
    return module


def path_key(path: str) -> int:
    """Return what a module's path adds to the keys of its dropout."""
    return zlib.crc32(path.encode())
