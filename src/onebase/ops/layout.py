"""The layout of a flat batch: a tree of nodes laid end to end in one row of real tokens, without padding.

A node is a stretch of tokens that is computed once. An example is a node; a prefix that several examples share (an
adapter's virtual tokens, a common system prompt) is a node too, and the parent of those examples. A token sees the
tokens of its node's ancestors and, in its own node, those before it (all of them in a bidirectional model). Nodes of
different adapters never share an ancestor.

Attention alone needs to know examples. For it the layout holds *groups*: the nodes of one length bucket, as slots
padded to the bucket. A node's group depends on its own length and its ancestors' alone, never on its neighbours, so
that an example's arithmetic is the same whatever it shares a batch with.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import torch
from jaxtyping import Int64
from torch import Tensor

from onebase.ops.keyed import mix, position_keys

NO_PARENT = -1

Made = TypeVar("Made")


@dataclass(frozen=True)
class Node:
    """A stretch of `length` tokens.

    `owner` is the adapter's name (None: the base alone), `example` the example's number in its data set (keys the
    randomness), `parent` the index of the node that comes before it, `labels` how many of its tokens are predictors
    of a labelled token, `virtual` how many of its first tokens are the owner's own and not the text's.
    """

    length: int
    owner: str | None = None
    example: int = 0
    parent: int = NO_PARENT
    labels: int = 0
    virtual: int = 0


@dataclass(frozen=True)
class Group:
    """Nodes attended together: `count` of them, each `width` slots wide, from slot `first_slot` on.

    `rows` holds the flat row of every slot, a node's first row where the slot is padding. `ancestors` holds, for each node, the flat rows of its ancestors' tokens, padded with the node's own first row where
    `ancestor_count` is smaller than its width; None when no node of the group has a parent.
    """

    first_slot: int
    count: int
    width: int
    lengths: Int64[Tensor, " count"]
    rows: Int64[Tensor, "count width"]
    ancestors: Int64[Tensor, "count prefix"] | None
    ancestor_count: Int64[Tensor, " count"]

    @cached_property
    def key_rows(self) -> Int64[Tensor, "count keys"]:
        """The flat row of every key slot: the ancestors' before the nodes' own."""
        return self.rows if self.ancestors is None else torch.cat([self.ancestors, self.rows], 1)


class Layout:
    """An immutable tree of nodes and what attention and the adapters read of it."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = tuple(nodes)
        self._made: dict[Hashable, Any] = {}
        if not self.nodes:
            raise ValueError("a layout has at least one node")
        for index, node in enumerate(self.nodes):
            if not NO_PARENT <= node.parent < index:
                raise ValueError(f"node {index}: its parent {node.parent} must come before it")
            if node.length < 1:
                raise ValueError(f"node {index}: a node has at least one token, got {node.length}")
            if node.parent != NO_PARENT and self.nodes[node.parent].owner != node.owner:
                raise ValueError(f"node {index} of {node.owner!r} has a parent of {self.nodes[node.parent].owner!r}")
            if not 0 <= node.virtual <= node.length:
                raise ValueError(f"node {index}: {node.virtual} of its {node.length} tokens cannot be virtual")

    def once(self, key: Hashable, make: Callable[[], Made]) -> Made:
        """Return what was made for this key the first time it was asked for: masks and index tensors on a device."""
        if key not in self._made:
            self._made[key] = make()
        made: Made = self._made[key]
        return made

    @cached_property
    def starts(self) -> tuple[int, ...]:
        """The flat row of each node's first token."""
        ends = torch.tensor([node.length for node in self.nodes]).cumsum(0).tolist()
        return (0, *ends[:-1])

    @cached_property
    def token_count(self) -> int:
        """Number of tokens that are computed."""
        return sum(node.length for node in self.nodes)

    @cached_property
    def depths(self) -> tuple[int, ...]:
        """The position of each node's first token in its example: the tokens of all its ancestors."""
        depths: list[int] = []
        for node in self.nodes:
            parent = node.parent
            depths.append(0 if parent == NO_PARENT else depths[parent] + self.nodes[parent].length)
        return tuple(depths)

    @cached_property
    def position_ids(self) -> Int64[Tensor, "1 tokens"]:
        """Position of every token in its own example, from 0."""
        pieces = [torch.arange(d, d + n.length) for d, n in zip(self.depths, self.nodes, strict=True)]
        return torch.cat(pieces)[None]

    def row_keys(self, seeds: Sequence[int], step: int) -> Int64[Tensor, " tokens"]:
        """Return each token's key: a mix of its owner's seed (one a node), the step, its example and its position."""
        pieces = [
            position_keys(mix(seed, step, node.example), depth, node.length)
            for seed, node, depth in zip(seeds, self.nodes, self.depths, strict=True)
        ]
        return torch.cat(pieces)

    @cached_property
    def leaves(self) -> tuple[int, ...]:
        """The nodes that are nobody's parent: the examples."""
        parents = {node.parent for node in self.nodes}
        return tuple(index for index in range(len(self.nodes)) if index not in parents)

    def example_rows(self, without: Collection[int] = ()) -> list[Int64[Tensor, " tokens"]]:
        """Return the flat rows of each example's tokens, its ancestors' first.

        Args:
            without: the starts of nodes whose virtual tokens are left out.
        """
        found = []
        for leaf in self.leaves:
            index, rows = leaf, list[int]()
            while index != NO_PARENT:
                node, start = self.nodes[index], self.starts[index]
                rows = [*range(start + (node.virtual if start in without else 0), start + node.length), *rows]
                index = node.parent
            found.append(torch.tensor(rows))
        return found

    def ancestor_rows(self, index: int) -> list[int]:
        """Return the flat rows of the tokens that come before node `index` in its example, first to last."""
        rows: list[int] = []
        parent = self.nodes[index].parent
        while parent != NO_PARENT:
            start = self.starts[parent]
            rows = [*range(start, start + self.nodes[parent].length), *rows]
            parent = self.nodes[parent].parent
        return rows

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The nodes by (own length bucket, ancestors' length bucket)."""
        members: dict[tuple[int, int], list[int]] = {}
        for index, (node, depth) in enumerate(zip(self.nodes, self.depths, strict=True)):
            members.setdefault((length_bucket(node.length), length_bucket(depth)), []).append(index)
        groups, first_slot = [], 0
        for (width, prefix), indices in members.items():
            groups.append(self._group(indices, first_slot, width, prefix))
            first_slot += len(indices) * width
        return tuple(groups)

    def _group(self, indices: list[int], first_slot: int, width: int, prefix: int) -> Group:
        ancestors = None
        if prefix:
            ancestors = torch.zeros(len(indices), prefix, dtype=torch.int64)
            for line, index in enumerate(indices):
                rows = self.ancestor_rows(index)
                ancestors[line, : len(rows)] = torch.tensor(rows)
                ancestors[line, len(rows) :] = self.starts[index]  # padding points to the node itself
        lengths = torch.tensor([self.nodes[i].length for i in indices])
        starts, offsets = torch.tensor([self.starts[i] for i in indices])[:, None], torch.arange(width)
        return Group(
            first_slot=first_slot,
            count=len(indices),
            width=width,
            lengths=lengths,
            rows=starts + offsets.where(offsets < lengths[:, None], 0),
            ancestors=ancestors,
            ancestor_count=torch.tensor([self.depths[i] for i in indices]),
        )

    @cached_property
    def slot_count(self) -> int:
        """Number of slots of all groups, padding included."""
        last = self.groups[-1]
        return last.first_slot + last.count * last.width

    @cached_property
    def slots(self) -> Int64[Tensor, " tokens"]:
        """The slot of every token: each token has one, a slot without a token is padding."""
        places: dict[int, int] = {}
        seen: dict[tuple[int, int], int] = {}
        starts = {
            (group.width, 0 if group.ancestors is None else group.ancestors.shape[1]): group.first_slot
            for group in self.groups
        }
        for index, (node, depth) in enumerate(zip(self.nodes, self.depths, strict=True)):
            key = (length_bucket(node.length), length_bucket(depth))
            places[index] = starts[key] + seen.get(key, 0) * key[0]
            seen[key] = seen.get(key, 0) + 1
        return torch.cat([torch.arange(places[i], places[i] + n.length) for i, n in enumerate(self.nodes)])


def length_bucket(length: int) -> int:
    """Return `length` rounded up to the widths that attention runs at: steps of 16 to 128, of 64 beyond."""
    step = 16 if length <= 128 else 64
    return -(-length // step) * step
