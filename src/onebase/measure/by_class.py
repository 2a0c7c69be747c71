"""How well each class is told: how often it occurs, precision, recall and F1. Pure functions on numpy arrays.

What is predicted is what metrics.py says is, so that the mean of these F1 is its macro F1. Called by `judge.TaskScores`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Real, Shaped

from onebase.measure.metrics import actual_classes, predicted_classes


@dataclass(frozen=True)
class ClassScores:
    """The scores of the class `name`, which `n` examples have; None where the examples do not define one.

    precision  the share of the examples predicted as it that are: none without a prediction of it
    recall     the share of the examples of it that are predicted so: none where n is 0
    f1         2 TP / (2 TP + FP + FN): none where it neither occurs nor is predicted
    """

    name: str
    n: int
    precision: float | None
    recall: float | None
    f1: float | None


def scores_by_class(
    probabilities: Real[np.ndarray, "examples classes"],
    targets: Shaped[np.ndarray, "examples ..."],
    names: Sequence[str],
) -> list[ClassScores]:
    """Return the scores of each class; `targets` are class numbers, or a 0 or 1 for every class of an example."""
    actual = actual_classes(targets, len(names))
    predicted = predicted_classes(probabilities, several=targets.ndim == 2)
    hits, guessed, there = (counted.sum(0).tolist() for counted in (predicted & actual, predicted, actual))
    return [
        ClassScores(name, n, _share(hit, guesses), _share(hit, n), _share(2 * hit, guesses + n))
        for name, hit, guesses, n in zip(names, hits, guessed, there, strict=True)
    ]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
