"""Scores as people read them: loss and perplexity of tokens, accuracy and calibration of classes, errors of numbers."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onebase.cli import terminal
from onebase.errors import VerificationError
from onebase.measure.naming import METRICS, shown

if TYPE_CHECKING:
    from onebase.measure.by_class import ClassScores
    from onebase.measure.evaluate import Scores
    from onebase.measure.judge import TaskScores
    from onebase.measure.metrics import Estimate, SliceScores

    Judged = Scores | TaskScores

TOKEN_TASKS = ("chat", "text")
"""The tasks that learn tokens, not labels of whole examples."""


def check_number(loss: float, label: str, data: str) -> None:
    """Raise unless a loss is a number, where `label` says whose it is.

    Raises:
        VerificationError: it is NaN or infinite; what can be done.
    """
    if not math.isfinite(loss):
        raise VerificationError(
            f"{label}: the loss on {data} is {loss}, no number: weights are damaged, or too large. Measure the base alone "
            "(--base-only); if that has a loss, train the adapter again with a lower train.learning_rate."
        )


def named(scores: "Judged") -> list[tuple[str, str]]:
    """Return each score's name and its value as text, the loss first."""
    values = scores.as_dict()
    loss = ("loss", terminal.loss(scores.loss))
    if "perplexity" in values:
        return [
            loss,
            ("perplexity", terminal.perplexity(scores.loss)),
            ("token accuracy", f"{100 * values['token_accuracy']:.2f} %"),
        ]
    return [loss, *((name, shown(key, values[key])) for key, name in METRICS.items() if key in values)]


def brief(scores: "Judged") -> str:
    """Return the first three scores on one line."""
    return "  ".join(f"{name} {text}" for name, text in named(scores)[:3])


def estimate_rows(estimates: "Mapping[str, Estimate]") -> list[tuple[str, str, str]]:
    """Return each metric's name, value and interval."""
    return [
        (name, shown(key, found.value), _interval(key, found))
        for key, name in METRICS.items()
        if (found := estimates.get(key)) is not None
    ]


def class_table(classes: "Sequence[ClassScores]") -> Any:
    """Return a table of the classes with n, precision, recall and F1."""
    rows = [
        (
            one.name,
            f"{one.n:,}",
            *("-" if value is None else f"{value:.4f}" for value in (one.precision, one.recall, one.f1)),
        )
        for one in classes
    ]
    return terminal.table(("class", "n", "precision", "recall", "F1"), rows, fold=("class",))


def slice_table(slices: "Sequence[SliceScores]") -> Any:
    """Return a table of slices with n, the metrics and their intervals: a line a slice, or a metric where that is too wide."""
    keys = [key for key in METRICS if any(key in one.scores for one in slices)]
    wide = [
        (
            _slice(one),
            f"{one.n:,}",
            *(_with_interval(key, one.scores[key]) if key in one.scores else "-" for key in keys),
        )
        for one in slices
    ]
    head = ("slice", "n", *(METRICS[key] for key in keys))
    if terminal.fits(head, wide):
        return terminal.table(head, wide)
    long = [
        ("" if place else _slice(one), name, f"{one.n:,}", value, interval)
        for one in slices
        for place, (name, value, interval) in enumerate(estimate_rows(one.scores))
    ]
    return terminal.table(("slice", "metric", "n", "value", "95 % interval"), long, left=2, fold=("slice",))


def _slice(one: "SliceScores") -> str:
    return f"{one.column} = {one.value}"


def _interval(metric: str, found: "Estimate") -> str:
    return f"{shown(metric, found.low)} to {shown(metric, found.high)}"


def _with_interval(metric: str, found: "Estimate") -> str:
    return f"{shown(metric, found.value)} ({_interval(metric, found)})"
