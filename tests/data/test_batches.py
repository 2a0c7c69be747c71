"""Order, batches and cuts depend on seed, epoch and step alone, and lose nothing."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase.data.batches import (
    Front,
    batch_of_step,
    epoch_order,
    flatten,
    micro_batches,
    steps_per_epoch,
)
from tests import tiny

COUNTS, SIZES, SEEDS = st.integers(1, 60), st.integers(1, 20), st.integers(0, 2**31)


@given(COUNTS, SIZES, SEEDS, st.integers(0, 3), st.booleans())
def test_an_epoch_visits_each_example_once(count, size, seed, epoch, shuffle):
    steps = steps_per_epoch(count, size)
    batches = [batch_of_step(count, epoch * steps + s, size, seed, shuffle) for s in range(steps)]
    assert sorted(np.concatenate(batches).tolist()) == list(range(count))
    assert all(len(batch) == size for batch in batches[:-1])
    assert 1 <= len(batches[-1]) <= size
    if not shuffle:
        assert np.concatenate(batches).tolist() == list(range(count))


@given(COUNTS, SIZES, SEEDS, st.permutations(range(8)))
def test_a_step_has_its_batch_whichever_steps_were_asked_for_before(count, size, seed, order):
    straight = [batch_of_step(count, step, size, seed).tolist() for step in range(8)]
    torch.rand(3)
    assert {step: batch_of_step(count, step, size, seed).tolist() for step in order} == dict(enumerate(straight))


@given(SEEDS, st.integers(0, 5))
def test_epochs_and_seeds_have_orders_of_their_own(seed, epoch):
    order = epoch_order(50, seed, epoch, True).tolist()
    assert order != list(range(50))
    assert order != epoch_order(50, seed, epoch + 1, True).tolist()
    assert order != epoch_order(50, seed + 1, epoch, True).tolist()


def test_every_place_is_as_likely_for_every_example():
    places = np.array([np.argsort(epoch_order(10, seed, 0, True)) for seed in range(2000)])
    counts = np.array([[(places[:, example] == place).sum() for place in range(10)] for example in range(10)])
    assert abs(counts - 200).max() < 5 * np.sqrt(2000 * 0.1 * 0.9)
    neighbours = np.mean([(places[:, i + 1] > places[:, i]).mean() for i in range(9)])
    assert abs(neighbours - 0.5) < 0.02


@given(st.lists(st.integers(1, 30), max_size=20), st.integers(1, 60))
def test_cuts_are_in_order_lose_nothing_and_are_as_few_as_order_allows(lengths, budget):
    batches = list(micro_batches(tiny.examples_of(*lengths), range(len(lengths)), budget, None))
    assert [number for batch in batches for number in batch.examples] == list(range(len(lengths)))
    tokens = [batch.layout.token_count for batch in batches]
    assert all(count <= budget or len(one.examples) == 1 for count, one in zip(tokens, batches, strict=True))
    after = [lengths[batch.examples[0]] for batch in batches[1:]]
    assert all(count + length > budget for count, length in zip(tokens, after, strict=False))


@given(st.lists(st.integers(1, 25), min_size=1, max_size=8), st.integers(1, 40), st.sampled_from([None, "a"]))
def test_a_flat_batch_holds_the_examples_tokens_and_predicts_every_label_from_the_token_before(lengths, budget, owner):
    examples = tiny.examples_of(*lengths)
    numbers = list(range(len(lengths)))[::-1]
    batches = list(micro_batches(examples, numbers, budget, owner))
    assert [number for batch in batches for number in batch.examples] == numbers
    pairs = []
    for batch in batches:
        starts = batch.layout.starts
        assert batch.layout.token_count == len(batch.token_ids)
        assert batch.token_ids.dtype == torch.int64
        assert batch.label_count == len(batch.label_rows) == sum(n.labels for n in batch.layout.nodes)
        ends = (*starts[1:], len(batch.token_ids))
        seen = 0
        for start, end, node, number in zip(starts, ends, batch.layout.nodes, batch.examples, strict=True):
            example = examples[number]
            assert (node.owner, node.example, node.length) == (owner, number, len(example.token_ids))
            assert batch.token_ids[start:end].tolist() == example.token_ids.tolist()
            rows = batch.label_rows[seen : seen + node.labels]
            assert (start + np.flatnonzero(example.labelled) - 1).tolist() == rows.tolist()
            assert batch.label_ids[seen : seen + node.labels].tolist() == example.token_ids[example.labelled].tolist()
            seen += node.labels
            pairs.append(number)
    assert pairs == numbers


def test_an_example_without_labels_takes_part_without_being_predicted():
    examples = tiny.examples_of(1, 5)
    batch = flatten(list(examples), [0, 1], "a")
    assert [node.labels for node in batch.layout.nodes] == [0, batch.label_count]
    assert (batch.label_rows >= 1).all()


def test_no_numbers_are_no_batches():
    assert list(micro_batches(tiny.examples_of(3), [], 10, None)) == []


@pytest.mark.parametrize(
    "numbers", [range(2, 5), np.arange(2, 5), [2, 3, 4], (2, 3, 4)], ids=["range", "array", "list", "tuple"]
)
def test_numbers_come_in_any_sequence(numbers):
    batches = list(micro_batches(tiny.examples_of(3, 3, 3, 3, 3), numbers, 6, "a"))
    assert [batch.examples for batch in batches] == [(2, 3), (4,)]
    assert all(isinstance(number, int) for batch in batches for number in batch.examples)


def test_virtual_tokens_stand_before_every_example_and_shift_what_is_predicted():
    examples = tiny.examples_of(5, 3, 4)
    plain = flatten(list(examples), range(3), "one")
    for shared in (True, False):
        batch = flatten(list(examples), range(3), "one", Front((61, 62), shared))
        whole = [batch.layout.ancestor_rows(i) + rows_of(batch, i) for i in range(len(batch.layout.nodes))]
        lines = [batch.token_ids[rows].tolist() for rows in whole[-3:]]
        assert lines == [[61, 62, *e.token_ids.tolist()] for e in examples]
        assert batch.layout.token_count == 12 + (2 if shared else 6)
        assert torch.equal(batch.label_ids, plain.label_ids)
        assert torch.equal(batch.token_ids[batch.label_rows + 1], plain.label_ids)
        assert batch.examples == (0, 1, 2)
        assert [n.example for n in batch.layout.nodes][-3:] == [0, 1, 2]
        assert sum(n.labels for n in batch.layout.nodes) == plain.label_count
        assert {n.owner for n in batch.layout.nodes} == {"one"}


def rows_of(batch, index):
    start = batch.layout.starts[index]
    return list(range(start, start + batch.layout.nodes[index].length))


@pytest.mark.parametrize("shared", [True, False])
def test_virtual_tokens_count_into_the_budget_as_often_as_they_are_computed(shared):
    examples = tiny.examples_of(5, 3, 4, 12, 1)
    batches = list(micro_batches(examples, range(5), 14, "one", Front((61, 62), shared)))
    counts = [batch.layout.token_count for batch in batches]
    assert counts == ([14, 14, 3] if shared else [12, 6, 14, 3])
    assert [n for batch in batches for n in batch.examples] == list(range(5))
