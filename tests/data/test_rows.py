"""Laws of what is decided by a row's hash."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.data.rows import Fault, Row, content_hash, split_by_hash, weigh
from onebase.errors import DataError


def rows_of(texts):
    return [Row({"text": text, "id": number}, f"row {number}") for number, text in enumerate(texts)]


def texts_of(rows):
    return sorted(row.values["text"] for row in rows)


@given(st.randoms(use_true_random=False), st.floats(0.05, 0.95))
def test_a_split_does_not_depend_on_the_order_of_rows(random, fraction):
    rows = rows_of([str(number) for number in range(300)])
    train, valid = split_by_hash(rows, fraction)
    random.shuffle(rows)
    again_train, again_valid = split_by_hash(rows, fraction)
    assert texts_of(train) == texts_of(again_train)
    assert texts_of(valid) == texts_of(again_valid)
    assert len(train) + len(valid) == 300
    assert abs(len(valid) - 300 * fraction) < 60


@given(st.lists(st.integers(0, 300), max_size=100))
def test_rows_with_the_same_content_land_on_the_same_side_whatever_their_ids(repeated):
    texts = [str(number) for number in [*range(300), *repeated]]
    train, valid = split_by_hash(rows_of(texts), 0.4)
    assert not set(texts_of(train)) & set(texts_of(valid))


def test_a_subsample_is_not_the_validation_split():
    half = list(weigh(rows_of([str(number) for number in range(2000)]), 0.5))
    _, valid = split_by_hash(half, 0.1)
    assert 60 < len(valid) < 140  # one hash for both would give 200


def test_rows_that_could_not_be_read_are_neither_thinned_nor_put_in_valid():
    broken = [Row({}, f"line {number}", Fault("broken", "broken")) for number in range(50)]
    for weight in (0.01, 1, 3):
        assert list(weigh(broken, weight)) == broken
    train, _ = split_by_hash([*broken, *rows_of("abcdefghijklmnop")], 0.5)
    assert train[:50] == broken


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 5])
def test_a_fraction_outside_zero_and_one_is_refused(fraction):
    with pytest.raises(DataError, match="between 0 and 1"):
        split_by_hash(rows_of("ab"), fraction)


def test_a_split_that_leaves_a_side_empty_is_refused():
    with pytest.raises(DataError, match="leaves no validation row"):
        split_by_hash(rows_of("a"), 0.0001)


def test_of_few_rows_one_is_held_out_the_same_in_any_order():
    rows = rows_of("abcdefghij")
    train, valid = split_by_hash(rows, 0.0001)
    assert len(valid) == 1 and len(train) == 9
    assert split_by_hash(rows[::-1], 0.0001)[1] == valid
    with pytest.raises(DataError, match="leaves no validation row"):
        split_by_hash(rows_of("aaa"), 0.0001)


def test_the_order_of_columns_is_no_content():
    one = {"prompt": "a", "completion": "b", "id": 1}
    assert content_hash(one) == content_hash(dict(reversed(one.items())) | {"id": 2})
    assert content_hash(one) != content_hash(one | {"completion": "c"})
    assert content_hash({"x": 1}) != content_hash({"x": 2})
