"""Segments say who owns which rows, whatever the lengths."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase.ops.segments import NO_OWNER, Segments, bucket_of

PARTS = st.lists(st.tuples(st.integers(0, 5), st.integers(NO_OWNER, 3)), max_size=40)


@given(PARTS)
def test_every_row_keeps_its_owner(parts):
    segments = Segments.of([length for length, _ in parts], [owner for _, owner in parts])
    expected = [owner for length, owner in parts for _ in range(length)]
    found = [owner for start, end, owner in segments for _ in range(start, end)]
    assert found == expected
    assert segments.row_count == len(expected)


@given(PARTS)
def test_neighbours_of_one_owner_are_one_segment_and_the_spans_follow_each_other(parts):
    spans = list(Segments.of([length for length, _ in parts], [owner for _, owner in parts]))
    assert all(end > start for start, end, _ in spans)
    assert all(before[1] == after[0] and before[2] != after[2] for before, after in itertools.pairwise(spans))


@given(PARTS)
def test_the_tensors_have_a_bucketed_size_and_unused_places_own_nothing(parts):
    segments = Segments.of([length for length, _ in parts], [owner for _, owner in parts])
    size = segments.owners.shape[0]
    assert size == bucket_of(len(list(segments)))
    assert segments.offsets.shape == (size + 1,)
    assert (segments.offsets.diff() >= 0).all()
    used = len(list(segments))
    assert (segments.owners[used:] == NO_OWNER).all()
    assert segments.offsets.dtype == segments.owners.dtype == torch.int64


@given(st.integers(0, 5000))
def test_a_bucket_is_the_smallest_power_of_two_from_four_that_fits(count):
    size = bucket_of(count)
    assert size >= max(4, count)
    assert size == 4 or size < 2 * count
    assert size & (size - 1) == 0


def test_a_length_without_an_owner_raises():
    with pytest.raises(ValueError, match="2 lengths but 1 owners"):
        Segments.of([1, 2], [0])
