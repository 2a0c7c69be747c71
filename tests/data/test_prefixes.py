"""Groups of examples that begin alike: they save as much as can be saved, and share nothing that they must not."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.data.batches import Front, flatten, micro_batches
from onebase.data.examples import Example, Examples
from onebase.data.prefixes import SHORTEST, groups_of

SHARED = Front((), shared=True)


def example(ids, first_label, number=0):
    labelled = np.arange(len(ids)) >= first_label
    return Example(np.array(ids, np.int32), labelled, f"row {number}", {})


@st.composite
def alike(draw):
    """Return examples that begin with one of a few stems, cut somewhere, with ends of their own."""
    made = []
    for number in range(draw(st.integers(1, 6))):
        stem = [draw(st.integers(0, 1))] * 4 + list(range(10, 10 + draw(st.integers(0, 20))))
        ids = stem + draw(st.lists(st.integers(50, 53), min_size=1, max_size=4))
        made.append(example(ids, draw(st.integers(1, len(ids) - 1)), number))
    return made


def saved(members):
    """Return how many tokens a group saves: all but one of its members leave the longest allowed prefix away."""
    length = 0
    while all(length < len(e.token_ids) - 1 and not e.labelled[length] for e in members):
        if len({int(e.token_ids[length]) for e in members}) > 1:
            break
        length += 1
    return (len(members) - 1) * length if length >= SHORTEST else 0


def sets_of(places):
    """Yield every subset of two places or more."""
    return (chosen for size in range(2, len(places) + 1) for chosen in combinations(places, size))


def most(examples, places):
    """Return the most that any division into groups saves, by trying them all."""
    if not places:
        return 0
    rest = places[1:]
    return max(
        saved([examples[i] for i in (places[0], *chosen)]) + most(examples, [i for i in rest if i not in chosen])
        for size in range(len(rest) + 1)
        for chosen in combinations(rest, size)
    )


@given(alike())
def test_groups_save_no_less_than_any_one_group_would_and_share_what_they_may(examples):
    groups = groups_of(examples)
    assert sorted(place for group in groups for place in group.members) == list(range(len(examples)))
    found = sum((len(g.members) - 1) * g.length for g in groups)
    one = max((saved([examples[i] for i in chosen]) for chosen in sets_of(range(len(examples)))), default=0)
    assert one <= found <= most(examples, list(range(len(examples))))
    for group in groups:
        assert group.length == 0 or (group.length >= SHORTEST and len(group.members) > 1)
        assert list(group.members) == sorted(group.members)
        for place in group.members:
            one, first = examples[place], examples[group.members[0]]
            assert one.token_ids[: group.length].tolist() == first.token_ids[: group.length].tolist()
            assert not one.labelled[: group.length].any() and len(one.token_ids) > group.length
    assert all(g.first == g.members[0] for g in groups)
    assert [g.members[0] for g in groups] == sorted(g.members[0] for g in groups)


@given(alike(), st.integers(1, 80), st.integers(0, 3))
def test_batches_hold_every_example_once_within_the_budget_with_its_own_labels(examples, budget, virtual):
    data, front = Examples(examples), Front(tuple(range(90, 90 + virtual)), shared=True)
    batches = list(micro_batches(data, range(len(data)), budget, "a", front))
    assert sorted(n for batch in batches for n in batch.examples) == list(range(len(data)))
    for batch in batches:
        layout, seen = batch.layout, 0
        assert layout.token_count == len(batch.token_ids)
        assert layout.token_count <= budget or len(batch.examples) == 1
        for leaf, number in zip(layout.leaves, batch.examples, strict=True):
            start, node = layout.starts[leaf], layout.nodes[leaf]
            rows = [*layout.ancestor_rows(leaf), *range(start, start + node.length)]
            assert batch.token_ids[rows].tolist() == [*front.token_ids, *data[number].token_ids.tolist()]
            labels = np.flatnonzero(data[number].labelled)
            assert batch.label_ids[seen : seen + node.labels].tolist() == data[number].token_ids[labels].tolist()
            assert batch.label_rows[seen : seen + node.labels].tolist() == [rows[virtual + i - 1] for i in labels]
            seen += node.labels
        assert seen == batch.label_count


def test_a_label_right_behind_the_prefix_is_predicted_by_the_prefix():
    examples = [example([*range(10), last], 10) for last in (50, 51)]
    batch = flatten(examples, range(2), "a", SHARED)
    assert [n.length for n in batch.layout.nodes] == [10, 1, 1]
    assert batch.label_rows.tolist() == [9, 9] and batch.label_ids.tolist() == [50, 51]


def test_examples_that_share_nothing_stay_in_their_order():
    examples = Examples([example([n] * 12, 3, n) for n in range(5)])
    batches = list(micro_batches(examples, [3, 1, 4, 0, 2], 30, "a", SHARED))
    assert [batch.examples for batch in batches] == [(3, 1), (4, 0), (2,)]


@pytest.mark.parametrize("count", [700, 1300])
def test_many_examples_are_grouped_within_their_windows(count):
    stems = [[s] * 30 for s in range(3)]
    examples = [example([*stems[n % 3], 40 + n % 7, n % 5], 31, n) for n in range(count)]
    groups = groups_of(examples)
    assert sum(len(group.members) for group in groups) == count
    assert all(group.length >= 30 for group in groups if len(group.members) > 1)
    computed = sum(group.length + sum(32 - group.length for _ in group.members) for group in groups)
    assert computed < 3 * count


def test_two_prompts_are_two_groups_and_each_gets_all_that_it_shares():
    prompts = [list(range(20)), [*range(12), *range(30, 50)]]
    examples = [example([*prompts[n % 2], 60 + n], 20, n) for n in range(6)]
    assert [(g.members, g.length) for g in groups_of(examples)] == [((0, 2, 4), 20), ((1, 3, 5), 20)]
