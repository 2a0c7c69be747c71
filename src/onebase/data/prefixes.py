"""Which examples begin alike: groups with a prefix that is computed once for all of them.

One level: a group is examples and the number of first tokens that all of them have. A prefix holds no labelled token, and
leaves each example one token of its own. Examples are sorted by what they may share, so that those which begin alike
lie side by side; groups are stretches of that order, the division that saves most tokens. (A group within the gap of
another would save more in rare cases, and is not looked for.) Cost: a sort, and a comparison with the others of a window.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from onebase.data.examples import Example
from onebase.data.tokens import IntArray

SHORTEST = 8
"""A prefix of fewer tokens is not worth a node of its own."""
_WINDOW = 512


@dataclass(frozen=True)
class Group:
    """Examples, by their places in the sequence that was given, and how many first tokens they share (0: one alone).

    `first` names the prefix: the first member of the whole group, also where only some of its members are meant.
    """

    members: tuple[int, ...]
    length: int
    first: int


def groups_of(examples: Sequence[Example]) -> list[Group]:
    """Return every example in one group, groups in the order of their first members, and members in theirs."""
    found: list[Group] = []
    for first in range(0, len(examples), _WINDOW):
        found += _in_window(examples, range(first, min(first + _WINDOW, len(examples))))
    return sorted(found, key=lambda group: group.members[0])


def _in_window(examples: Sequence[Example], places: range) -> list[Group]:
    """Return the division into stretches that saves most, by dynamic programming."""
    starts = {i: examples[i].token_ids[: _longest(examples[i])] for i in places}
    order = sorted(places, key=lambda i: starts[i].tobytes())
    alike = np.array([_alike(starts[a], starts[b]) for a, b in pairwise(order)], dtype=np.int64)
    saved, begins = np.zeros(len(order) + 1, dtype=np.int64), [0] * len(order)
    for last in range(len(order)):
        shared = np.append(np.minimum.accumulate(alike[:last][::-1])[::-1], 0)  # of all from the first one to the last
        shared[shared < SHORTEST] = 0
        totals = saved[: last + 1] + np.arange(last, -1, -1) * shared
        begins[last] = last - int(np.argmax(totals[::-1]))  # of equal ones the smallest group
        saved[last + 1] = totals[begins[last]]
    groups, end = [], len(order)
    while end:
        begin = begins[end - 1]
        length = int(alike[begin : end - 1].min()) if end - begin > 1 else 0
        members = tuple(sorted(order[begin:end]))
        groups.append(Group(members, length, members[0]))
        end = begin
    return groups


def _longest(example: Example) -> int:
    """Return how many of an example's first tokens may be shared: those before its first label, and not all."""
    labels = np.flatnonzero(example.labelled)
    return min(len(example.token_ids) - 1, int(labels[0]) if len(labels) else len(example.token_ids))


def _alike(one: IntArray, other: IntArray) -> int:
    """Return how many first tokens two examples share."""
    count = min(len(one), len(other))
    different = np.flatnonzero(one[:count] != other[:count])
    return int(different[0]) if len(different) else count
