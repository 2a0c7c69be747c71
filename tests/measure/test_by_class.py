"""Scores by class are scikit-learn's, and their mean F1 is the macro F1."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import precision_recall_fscore_support

from onebase.measure.by_class import scores_by_class
from onebase.measure.metrics import class_scores, multi_label_scores
from tests.measure.test_metrics import classified, labelled

NAMES = ("a", "b", "c", "d", "e")


def check(probabilities, targets, decided, macro):
    classes = probabilities.shape[1]
    found = scores_by_class(probabilities, targets, NAMES[:classes])
    kinds = None if targets.ndim == 2 else list(range(classes))
    expected = precision_recall_fscore_support(targets, decided, labels=kinds, zero_division=np.nan)
    assert [one.name for one in found] == [*NAMES[:classes]]
    assert [one.n for one in found] == expected[3].tolist()
    for wanted, name in zip(expected, ("precision", "recall", "f1"), strict=False):
        values = [getattr(one, name) for one in found]
        assert [value is None for value in values] == np.isnan(wanted).tolist()
        assert [math.nan if value is None else value for value in values] == pytest.approx(wanted.tolist(), nan_ok=True)
    defined = [one.f1 for one in found if one.f1 is not None]
    assert macro.get("macro_f1") == (pytest.approx(sum(defined) / len(defined)) if defined else None)


@given(case=classified())
def test_classes_are_told_as_scikit_learn_tells_them(case):
    probabilities, targets = case
    check(probabilities, targets, probabilities.argmax(1), class_scores(probabilities, targets))


@given(case=labelled().filter(lambda case: case[0].shape[1] > 1))
def test_several_classes_an_example_are_told_as_scikit_learn_tells_them(case):
    probabilities, targets = case
    check(probabilities, targets, (probabilities > 0.5).astype(int), multi_label_scores(probabilities, targets))


@given(rows=st.integers(1, 5))
def test_a_class_that_neither_occurs_nor_is_predicted_has_no_scores(rows):
    (first, second) = scores_by_class(np.tile([1.0, 0.0], (rows, 1)), np.zeros(rows, dtype=int), ("a", "b"))
    assert (first.n, first.precision, first.recall, first.f1) == (rows, 1, 1, 1)
    assert (second.n, second.precision, second.recall, second.f1) == (0, None, None, None)
