"""The route: the one mutable thing that a forward reads, held in a slot; a route itself never changes.

Every adapted layer and the attention function hold the base's `Slot`. `slot.use(route)` puts a route there for the
time of a forward. Activation checkpointing recomputes later, when another route may be current: `Slot.for_recompute`
captures the route at forward and reinstates it. The slot is a plain attribute, never a thread-local, because CUDA's
backward runs on autograd's own threads.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from types import MappingProxyType

from torch import Tensor

from onebase.ops.layout import Layout
from onebase.ops.memory import Memory
from onebase.ops.segments import Segments


class RowSpace(Enum):
    """What the rows of a module's input are; a wrapper is bound to its space when it is made, never by shape."""

    TOKEN = "token"  # (tokens, ...), flat; or (batch, length, ...), padded
    EXAMPLE = "example"  # pooled rows, one an example: poolers and heads
    LABEL = "label"  # labelled rows: the output head
    BATCH = "batch"  # (batch, ...): what sees whole examples, such as images


@dataclass(frozen=True)
class Route:
    """Who owns the rows of a forward, in every row space, and how the tokens hang together.

    `batch_owners` says who owns each entry of a batch whose first dimension is the entries (padded batches, images,
    generation): every module's rows, however many an entry has there, are then its owner's. One owner owns all.
    `layout` is None when the model attends by its own means. `memories` are learned keys and values that attention
    finds at some rows in place of its own. `dropout_key` keys dropout where no layout does: row i of every module by it and i.
    """

    layout: Layout | None = None
    rows: Mapping[RowSpace, Segments] = field(default_factory=lambda: MappingProxyType({}))
    row_keys: Mapping[RowSpace, Tensor] = field(default_factory=lambda: MappingProxyType({}))
    batch_owners: tuple[int, ...] | None = None
    memories: tuple[Memory, ...] = ()
    dropout_key: int | None = None

    def __post_init__(self) -> None:
        """Keep the mappings as they are now, whatever becomes of those they were made of."""
        object.__setattr__(self, "rows", MappingProxyType(dict(self.rows)))
        object.__setattr__(self, "row_keys", MappingProxyType(dict(self.row_keys)))

    def __deepcopy__(self, memo: dict[int, object]) -> Route:
        return self  # it never changes; a copy of a model is at rest, where a route names owners alone

    def segments(self, space: RowSpace, row_count: int) -> Segments:
        """Return the owners of `row_count` rows of a space.

        Raises:
            RuntimeError: the route says nothing of that space, or of another number of rows.
        """
        if self.batch_owners is not None:
            return self._of_batch(self.batch_owners, row_count)
        segments = self.rows.get(space)
        if segments is None or segments.row_count != row_count:
            known = {s.value: r.row_count for s, r in self.rows.items()}
            raise RuntimeError(f"a layer got {row_count} rows of the {space.value} space; the route knows {known}")
        return segments

    def _of_batch(self, owners: tuple[int, ...], row_count: int) -> Segments:
        each, rest = divmod(row_count, len(owners))
        if rest:
            raise RuntimeError(f"a layer got {row_count} rows for a batch of {len(owners)}")
        return Segments.of([each] * len(owners), owners)


class Slot:
    """Where the current route lies."""

    def __init__(self) -> None:
        self.route: Route | None = None

    def use(self, route: Route | None) -> AbstractContextManager[None]:
        """Make `route` the current one, and put back the one before; may be entered again and again."""
        return _Use(self, route)

    def for_recompute(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a checkpointed forward and of its recomputation: `context_fn` of torch's checkpoint."""
        return nullcontext(), self.use(self.route)


class _Use(AbstractContextManager[None]):
    """A route in a slot. No generator: a graph that is kept is recomputed, and so entered, once for each backward."""

    def __init__(self, slot: Slot, route: Route | None) -> None:
        self._slot, self._route = slot, route
        self._before: list[Route | None] = []

    def __enter__(self) -> None:
        self._before.append(self._slot.route)
        self._slot.route = self._route

    def __exit__(self, *_: object) -> None:
        self._slot.route = self._before.pop()
