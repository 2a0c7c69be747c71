"""Rows with labels: which classes there are, what becomes of a row, and every way in which one can be wrong."""

from typing import Any

import numpy as np
import pytest

from onebase.config.labels import Labels
from onebase.data.building import build_examples
from onebase.data.labelled import find_labels
from onebase.data.reading import read_rows
from onebase.errors import DataError
from tests.data.tiny import byte_tokenizer

ONE = Labels("single_label_classification", ("cat", "dog"))
SEVERAL = Labels("multi_label_classification", ("cat", "dog"))
NUMBER = Labels("regression")


def rows_of(*values: Any, name: str = "label") -> Any:
    return list(read_rows([{"text": "a text", name: value} for value in values]))


@pytest.mark.parametrize(
    ("values", "names", "problem"),
    [
        (["dog", "cat", "dog"], ("cat", "dog"), "single_label_classification"),
        ([10, 9, 2], ("2", "9", "10"), "single_label_classification"),
        (["10", "9", "-2"], ("-2", "9", "10"), "single_label_classification"),
        ([True, False], ("False", "True"), "single_label_classification"),
        ([["dog"], [], ["cat", "dog"]], ("cat", "dog"), "multi_label_classification"),
        ([["dog"], []], ("dog",), "multi_label_classification"),
    ],
)
def test_the_classes_are_those_of_the_rows_in_their_order(values, names, problem) -> None:
    assert find_labels(rows_of(*values), "classify") == Labels(problem, names)


def test_classes_that_are_named_keep_their_order_and_numbers_need_no_names() -> None:
    assert find_labels(rows_of("cat"), "classify", ["dog", "cat"]).names == ("dog", "cat")
    assert find_labels(rows_of("cat"), "regress") == NUMBER


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (["dog", "dog"], r"every row has the label 'dog': .* nothing to learn"),
        (
            [None, None],
            r"no row has a 'label': it is empty\. Fill it in, or name another column: data\.columns: \{label: COLUMN\}",
        ),
        ([1.0, 0.0], r"no row's 'label' holds a class: .* the first is 1\.0\. Name another column"),
        ([[0.0, 1.0], []], r"no row's 'label' holds a class: .* the first is \[0\.0, 1\.0\]"),
        ([[], []], r"no row's 'label' holds a class: .* the first is \[\]"),
        (["dog", ["cat"]], r"a list in some rows and a single class in others"),
        ([["dog", "cat"], ["dog", "cat"]], r"every row has the label \['dog', 'cat'\]: .* nothing to learn"),
        ([True, 0], r"a truth value in some rows and a whole number in others"),
        (["dog", "cat", "dog "], r"labels 'dog' and 'dog ' differ in nothing but blanks"),
    ],
)
def test_rows_without_classes_to_learn_are_refused(values, said) -> None:
    with pytest.raises(DataError, match=said):
        find_labels(rows_of(*values), "classify")


def test_rows_that_cannot_be_read_are_told_before_what_the_others_lack(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a", "label":\n')
    with pytest.raises(DataError, match=r"rows\.jsonl line 1: not valid JSON(?s:.*)no row has a 'label'"):
        find_labels(read_rows(path), "classify")


def test_a_long_label_is_told_in_short() -> None:
    with pytest.raises(DataError) as told:
        build_examples(rows_of("z" * 50_000), byte_tokenizer(), task=ONE)
    assert len(str(told.value)) < 500


def test_a_label_that_is_missing_is_told_with_the_columns_that_are_there() -> None:
    rows = rows_of("dog", "cat", name="kind")
    there, todo = r"; the columns are 'text', 'kind'\.", r"Name its column: data\.columns: \{%s: COLUMN\}"
    with pytest.raises(DataError, match=rf"no row has a 'label'{there} {todo % 'label'}"):
        find_labels(rows, "classify")
    for labels, name in ((ONE, "label"), (NUMBER, "target")):
        with pytest.raises(DataError, match=rf"row 1: '{name}' is missing{there} {todo % name}"):
            build_examples(rows[:1], byte_tokenizer(), task=labels)


def test_a_row_becomes_its_tokens_and_the_number_of_its_class() -> None:
    tokenizer = byte_tokenizer(bos=True)
    examples, report = build_examples(rows_of("dog", "cat"), tokenizer, task=ONE)
    assert examples.targets is not None and examples.targets.tolist() == [1, 0]
    assert examples[0].token_ids.tolist() == tokenizer("a text")["input_ids"]
    assert examples.label_count == 2 and not examples.labelled.any() and report.labelled_tokens == 2
    several, _ = build_examples(rows_of(["dog", "cat"], []), tokenizer, task=SEVERAL)
    assert several.targets is not None and several.targets.tolist() == [[1, 1], [0, 0]]
    numbers, _ = build_examples(rows_of(3, 2.5, "1.5", name="target"), tokenizer, task=NUMBER)
    assert numbers.targets is not None and np.allclose(numbers.targets, [3, 2.5, 1.5])


def test_a_long_text_loses_its_end_and_is_counted() -> None:
    examples, report = build_examples(rows_of("dog", "cat"), byte_tokenizer(), task=ONE, max_length=4)
    assert examples.lengths.tolist() == [4, 4] and report.truncated == 2


@pytest.mark.parametrize(
    ("labels", "name", "value", "said"),
    [
        (ONE, "label", "dgo", r"label 'dgo' is none of the 2 classes that are learned \(cat, dog\); closest is 'dog'"),
        (ONE, "label", None, r"'label' is missing"),
        (ONE, "label", "  ", r"'label' must be a name or a whole number, got '  '"),
        (ONE, "label", ["dog"], r"'label' must be one class, got list"),
        (ONE, "label", 1.5, r"'label' must be a name or a whole number, got 1\.5"),
        (SEVERAL, "label", ["dog", "cat", "dog"], r"'label' holds 'dog' twice\. .* not a 0 or 1 for every class"),
        (SEVERAL, "label", "dog", r"'label' must be a list of classes, got str"),
        (NUMBER, "target", "tall", r"'target' must be a number, got 'tall'"),
        (NUMBER, "target", float("nan"), r"'target' must be a finite number, got nan"),
        (NUMBER, "target", float("inf"), r"'target' must be a finite number, got inf"),
        (NUMBER, "target", True, r"'target' must be a finite number, got true"),
        (NUMBER, "target", None, r"'target' is missing"),
        (NUMBER, "target", 10**400, r"'target' must be a number, got 1000"),
        (NUMBER, "target", 1e39, r"'target' must be at most 1e\+18 in size, .* got 1e\+39"),
    ],
)
def test_a_row_that_says_nothing_to_learn_is_a_bad_row_with_its_place(labels, name, value, said) -> None:
    good = {"label": "dog" if labels is ONE else ["dog"], "target": 1.0}[name]
    with pytest.raises(DataError, match=rf"row 2: {said}"):
        build_examples(rows_of(good, value, name=name), byte_tokenizer(), task=labels)
    kept, report = build_examples(rows_of(good, value, name=name), byte_tokenizer(), task=labels, on_bad_row="skip")
    assert len(kept) == 1 and report.dropped_rows == 1


def test_targets_are_a_part_of_what_data_are() -> None:
    prints = {build_examples(rows_of(*v), byte_tokenizer(), task=ONE)[0].fingerprint for v in (["dog"], ["cat"])}
    assert len(prints) == 2
