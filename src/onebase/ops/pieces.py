"""A layout's tree in the form that attention.c walks: stretches of queries, and who computes them.

A *piece* is a stretch of one node's queries; its keys are the node's ancestors and the node itself. A *task* is one or
several pieces that follow the same keys: siblings behind a shared prefix, or a part of a node that is long. Gradients of
keys before a task's own (the prefix, the node's earlier parts) are kept apart for each task and added up in the order of
the tasks. How a tree is cut depends on that tree alone, so its bits do not depend on its neighbours, nor on threads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Int64
from torch import Tensor

from onebase.ops.layout import NO_PARENT, Layout

_SIBLING_TOKENS = 96  # of a task: its own work pays for the gradients that it keeps apart
_PART_TOKENS = 512
_MOST_PARTS = 4  # a node of n tokens keeps at most 1.5 n keys' gradients apart

Piece = tuple[int, int, int, int, int, int]


@dataclass(frozen=True)
class Pieces:
    """The tables that attention.c reads.

    `pieces` holds the start and length of the piece's node, the tokens before the node, where their rows begin in
    `ancestors`, and the first query and the number of queries. `tasks` holds a task's first piece, its end and the number of
    keys before the earlier tasks' own, which is `apart` in all.
    """

    pieces: Int64[Tensor, "pieces 6"]
    tasks: Int64[Tensor, "tasks 3"]
    ancestors: Int64[Tensor, " rows"]
    apart: int


def pieces_of(layout: Layout, *, causal: bool) -> Pieces:
    """Return a layout's pieces; where attention is not causal every node is one, as its first keys see its last queries."""
    ancestors, pieces, tasks, apart = list[int](), list[Piece](), list[tuple[int, int, int]](), 0
    for family in _families(layout):
        depth, first = layout.depths[family[0]], len(ancestors)
        ancestors += layout.ancestor_rows(family[0])
        for task in _tasks(layout, family, first, causal):
            tasks.append((len(pieces), len(pieces) + len(task), apart))
            pieces += task
            apart += depth + task[0][4]
    return Pieces(
        torch.tensor(pieces),
        torch.tensor(tasks),
        torch.tensor(ancestors, dtype=torch.int64),
        apart,
    )


def _families(layout: Layout) -> list[list[int]]:
    """Return the nodes by parent; one without a parent is a family of its own."""
    found: dict[int, list[int]] = {}
    for index, node in enumerate(layout.nodes):
        found.setdefault(-1 - index if node.parent == NO_PARENT else node.parent, []).append(index)
    return list(found.values())


def _tasks(layout: Layout, family: list[int], first: int, causal: bool) -> Iterator[list[Piece]]:
    depth, task, tokens = layout.depths[family[0]], list[Piece](), 0
    for index in family:
        start, length = layout.starts[index], layout.nodes[index].length
        node = (start, length, depth, first)
        count = min(_MOST_PARTS, -(-length // _PART_TOKENS)) if causal else 1
        if count > 1:
            width = -(-length // count)
            yield from ([(*node, query, min(width, length - query))] for query in range(0, length, width))
            continue
        task.append((*node, 0, length))
        tokens += length
        if tokens >= max(_SIBLING_TOKENS, depth):
            yield task
            task, tokens = [], 0
    if task:
        yield task
