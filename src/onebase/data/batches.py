"""Batches: which examples a step sees, in which order, and how they become flat rows of real tokens.

The order of an epoch depends on (seed, epoch) alone. A step's batch is cut into micro-batches by a budget of tokens,
in order; the cut changes nothing but memory, because losses are weighted by the labels of the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase.data.examples import Example, Examples
from onebase.data.prefixes import Group, groups_of
from onebase.data.tokens import IntArray
from onebase.ops.keyed import mix, position_keys
from onebase.ops.layout import NO_PARENT, Layout, Node


@dataclass(frozen=True)
class FlatBatch:
    """Examples end to end: `token_ids` (tokens,), how they hang together, and what is to be predicted where.

    `label_rows[i]` is the token whose hidden state predicts `label_ids[i]`; both are (labels,), example by example, as
    the layout's nodes count their labels. `examples` are the numbers of the examples in their data set, in the order of
    the layout. Where each example has a target, `targets`
    holds them, `label_ids` is empty, and `label_rows` are the examples' last tokens.
    """

    token_ids: Tensor
    layout: Layout
    label_rows: Tensor
    label_ids: Tensor
    examples: tuple[int, ...]
    targets: Tensor | None = None

    @property
    def label_count(self) -> int:
        """Number of labelled tokens, or of examples where each has a target."""
        return int(self.label_rows.shape[0])


def epoch_order(count: int, seed: int, epoch: int, shuffle: bool) -> NDArray[np.int64]:
    """Return the order in which an epoch visits `count` examples: by their keys of (seed, epoch), or as they lie."""
    if not shuffle:
        return np.arange(count)
    keys = position_keys(mix("order", seed, epoch), 0, count).numpy()
    return np.argsort(keys, kind="stable")


def steps_per_epoch(count: int, batch_size: int) -> int:
    """Return the number of steps that visit each of `count` examples once; the last one may be smaller."""
    return -(-count // batch_size)


def batch_of_step(count: int, step: int, batch_size: int, seed: int, shuffle: bool = True) -> NDArray[np.int64]:
    """Return the numbers of the examples of optimiser step `step` (from 0)."""
    epoch, place = divmod(step, steps_per_epoch(count, batch_size))
    return epoch_order(count, seed, epoch, shuffle)[place * batch_size : (place + 1) * batch_size]


@dataclass(frozen=True)
class Front:
    """What stands before examples: the virtual tokens of their adapter, placeholder ids that are never labelled.

    `shared`: what examples have in common is a node of its own that a batch computes once, their parent: the virtual
    tokens, and the first tokens where examples begin alike. Otherwise each example begins with them (a bidirectional
    model's prefix depends on what follows).
    """

    token_ids: tuple[int, ...] = ()
    shared: bool = False


NOTHING = Front()
_COPIED = 8  # measured: 0.10 of what a token keeps for its backward (SmolLM2, 32 tokens behind 128)


def micro_batches(
    examples: Examples, numbers: Sequence[int], budget_tokens: int, owner: str | None, front: Front = NOTHING
) -> Iterator[FlatBatch]:
    """Yield the examples of these numbers as flat batches of at most `budget_tokens` computed tokens.

    In order, except that examples which begin alike meet, where the first of them is. Virtual tokens count: once a
    batch where they are shared, in every example otherwise. An example behind a shared prefix counts an eighth of that
    too, since attention keeps its keys and values for each example. Who begins like whom is decided before anything is cut, so
    that a shared token's dropout mask does not depend on the budget.
    """
    given = [examples[n] for n in numbers]
    once, each = (len(front.token_ids), 0) if front.shared else (0, len(front.token_ids))
    cut: list[Group] = []
    tokens = once
    for group in _groups(given, front):
        for place in group.members:
            own = each + len(given[place].token_ids) - group.length + group.length // _COPIED
            joins = bool(cut) and cut[-1].first == group.first
            if cut and tokens + own + (not joins) * group.length > budget_tokens:
                yield _flat(given, numbers, cut, owner, front)
                cut, tokens, joins = [], once, False
            earlier = cut.pop().members if joins else ()
            cut.append(replace(group, members=(*earlier, place)))
            tokens += own + (not joins) * group.length
    if cut:
        yield _flat(given, numbers, cut, owner, front)


def flatten(
    examples: Sequence[Example], numbers: Sequence[int], owner: str | None, front: Front = NOTHING
) -> FlatBatch:
    """Return examples end to end, all owned by one adapter (None: by the base alone), behind what they share."""
    return _flat(examples, numbers, _groups(examples, front), owner, front)


def _groups(examples: Sequence[Example], front: Front) -> list[Group]:
    return groups_of(examples) if front.shared else [Group((place,), 0, place) for place in range(len(examples))]


def _flat(
    examples: Sequence[Example], numbers: Sequence[int], groups: Sequence[Group], owner: str | None, front: Front
) -> FlatBatch:
    """Return the members of the groups end to end."""
    row = _Row(owner)
    root = row.add(front.token_ids, virtual=len(front.token_ids)) if front.shared and front.token_ids else NO_PARENT
    own = () if front.shared else front.token_ids
    for group in groups:
        parent = root
        if group.length:
            parent = row.add(examples[group.first].token_ids[: group.length], root, example=int(numbers[group.first]))
        for place in group.members:
            row.add_example(examples[place], parent, int(numbers[place]), group.length, own)
    return row.batch([place for group in groups for place in group.members], examples, numbers)


class _Row:
    """A flat batch in the making."""

    def __init__(self, owner: str | None) -> None:
        self.owner = owner
        self.nodes: list[Node] = []
        self.token_ids: list[NDArray[np.int64]] = []
        self.label_rows: list[NDArray[np.int64]] = []
        self.label_ids: list[NDArray[np.int64]] = []
        self.ends: list[int] = []

    def add(
        self,
        token_ids: Sequence[int] | IntArray,
        parent: int = NO_PARENT,
        *,
        example: int = 0,
        labels: int = 0,
        virtual: int = 0,
    ) -> int:
        """Add a node and return its number."""
        ids = np.asarray(token_ids, dtype=np.int64)
        self.nodes.append(Node(len(ids), self.owner, example, parent, labels, virtual))
        self.token_ids.append(ids)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(ids))
        return len(self.nodes) - 1

    def add_example(self, example: Example, parent: int, number: int, shared: int, own: Sequence[int]) -> None:
        """Add what an example has beside the `shared` first tokens, behind virtual tokens of its `own`."""
        ids, labelled = example.token_ids[shared:], np.flatnonzero(example.labelled[shared:])
        node = self.add(
            np.concatenate([np.asarray(own, dtype=np.int64), ids]),
            parent,
            example=number,
            labels=len(labelled),
            virtual=len(own),
        )
        start = self.ends[-1] - len(ids)
        rows = start + labelled - 1  # a token is predicted by the one before it; an example's first is never labelled
        if len(labelled) and labelled[0] == 0:
            rows[0] = self.ends[self.nodes[node].parent] - 1
        self.label_rows.append(rows)
        self.label_ids.append(ids[labelled].astype(np.int64))

    def batch(self, order: Sequence[int], examples: Sequence[Example], numbers: Sequence[int]) -> FlatBatch:
        """Return the batch of examples that were added in this order."""
        layout, token_ids = Layout(self.nodes), torch.from_numpy(np.concatenate(self.token_ids))
        found = tuple(int(numbers[place]) for place in order)
        if examples[0].target is not None:
            ends = torch.tensor([self.ends[i] - 1 for i in layout.leaves])
            targets = torch.from_numpy(np.asarray([examples[place].target for place in order]))
            return FlatBatch(token_ids, layout, ends, token_ids[:0], found, targets)
        rows, ids = (torch.from_numpy(np.concatenate(parts)) for parts in (self.label_rows, self.label_ids))
        return FlatBatch(token_ids, layout, rows, ids, found)
