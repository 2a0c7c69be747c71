"""Batches: which examples a step sees, in which order, and how they become flat rows of real tokens.

The order of an epoch depends on (seed, epoch) alone. A step's batch is cut into micro-batches by a budget of tokens,
in order; the cut changes nothing but memory, because losses are weighted by the labels of the whole step.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase.data.examples import Example, Examples
from onebase.ops.keyed import mix, position_keys
from onebase.ops.layout import NO_PARENT, Layout, Node


@dataclass(frozen=True)
class FlatBatch:
    """Examples end to end: `token_ids` (tokens,), how they hang together, and what is to be predicted where.

    `label_rows[i]` is the token whose hidden state predicts `label_ids[i]`; both are (labels,), in token order.
    `examples` are the numbers of the examples in their data set, in order. Where each example has a target, `targets`
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


def cut_by_tokens(lengths: Sequence[int], budget_tokens: int) -> list[slice]:
    """Return consecutive stretches of at most `budget_tokens` tokens; an example longer than that stands alone."""
    cuts, start, tokens = [], 0, 0
    for place, length in enumerate(lengths):
        if place > start and tokens + length > budget_tokens:
            cuts.append(slice(start, place))
            start, tokens = place, 0
        tokens += length
    return [*cuts, slice(start, len(lengths))] if lengths else []


@dataclass(frozen=True)
class Front:
    """The virtual tokens that stand before every example of an adapter: placeholder ids, never labelled.

    `shared`: they are a node of their own that a batch computes once, the parent of its examples; otherwise each
    example begins with them (a bidirectional model's prefix depends on what follows).
    """

    token_ids: tuple[int, ...] = ()
    shared: bool = False


NOTHING = Front()


def micro_batches(
    examples: Examples, numbers: Sequence[int], budget_tokens: int, owner: str | None, front: Front = NOTHING
) -> Iterator[FlatBatch]:
    """Yield the examples of these numbers as flat batches of at most `budget_tokens` tokens, in order.

    Virtual tokens count: once a batch where they are shared, in every example otherwise.
    """
    once, each = (len(front.token_ids), 0) if front.shared else (0, len(front.token_ids))
    for cut in cut_by_tokens((examples.lengths[list(numbers)] + each).tolist(), budget_tokens - once):
        yield flatten([examples[n] for n in numbers[cut]], numbers[cut], owner, front)


def flatten(
    examples: Sequence[Example], numbers: Sequence[int], owner: str | None, front: Front = NOTHING
) -> FlatBatch:
    """Return examples end to end, all owned by one adapter (None: by the base alone), behind its virtual tokens."""
    count = len(front.token_ids)
    root = [Node(length=count, owner=owner, virtual=count)] if count and front.shared else []
    before = 0 if root else count
    nodes = [
        Node(
            length=before + len(e.token_ids),
            owner=owner,
            example=int(n),
            parent=0 if root else NO_PARENT,
            labels=int(e.labelled.sum()),
            virtual=before,
        )
        for e, n in zip(examples, numbers, strict=True)
    ]
    virtual = np.array(front.token_ids, dtype=np.int64)
    unlabelled = np.zeros(count, dtype=np.bool_)
    pieces = [(virtual, unlabelled)] if root else []
    for example in examples:
        pieces += [(virtual, unlabelled)] if before else []
        pieces.append((example.token_ids.astype(np.int64), example.labelled))
    token_ids = torch.from_numpy(np.concatenate([ids for ids, _ in pieces]))
    layout = Layout([*root, *nodes])
    if examples[0].target is not None:
        ends = [layout.starts[i] + layout.nodes[i].length - 1 for i in layout.leaves]
        targets = torch.from_numpy(np.asarray([example.target for example in examples]))
        return FlatBatch(token_ids, layout, torch.tensor(ends), token_ids[:0], tuple(int(n) for n in numbers), targets)
    label_places = torch.from_numpy(np.flatnonzero(np.concatenate([labelled for _, labelled in pieces])))
    return FlatBatch(
        token_ids=token_ids,
        layout=layout,
        label_rows=label_places - 1,  # a token is predicted by the one before it; an example's first is never labelled
        label_ids=token_ids[label_places],
        examples=tuple(int(n) for n in numbers),
    )
