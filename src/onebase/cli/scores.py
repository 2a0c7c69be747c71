"""Scores as people read them: loss and perplexity of tokens, accuracy and calibration of classes, errors of numbers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from onebase.cli import terminal

if TYPE_CHECKING:
    from onebase.measure.evaluate import Scores
    from onebase.measure.judge import TaskScores
    from onebase.measure.metrics import Estimate, SliceScores

    Judged = Scores | TaskScores

_NAMES = {
    "accuracy": "accuracy",
    "macro_f1": "macro F1",
    "auroc": "AUROC",
    "ece": "ECE",
    "brier": "Brier",
    "mse": "MSE",
    "mae": "MAE",
    "r2": "R2",
}
_SHARES = ("accuracy",)
TOKEN_TASKS = ("chat", "text")
"""The tasks that learn tokens, not labels of whole examples."""


def named(scores: "Judged") -> list[tuple[str, str]]:
    """Return each score's name and its value as text, the loss first."""
    values = scores.as_dict()
    shown = [("loss", terminal.loss(scores.loss))]
    if "perplexity" in values:
        return [
            *shown,
            ("perplexity", terminal.perplexity(scores.loss)),
            ("token accuracy", f"{100 * values['token_accuracy']:.2f} %"),
        ]
    return [*shown, *((name, number(key, values[key])) for key, name in _NAMES.items() if key in values)]


def brief(scores: "Judged") -> str:
    """Return the first three scores on one line."""
    return "  ".join(f"{name} {text}" for name, text in named(scores)[:3])


def number(metric: str, value: float) -> str:
    """Return a metric's value as text."""
    return f"{100 * value:.2f} %" if metric in _SHARES else f"{value:.4f}"


def estimate_rows(estimates: "Mapping[str, Estimate]") -> list[tuple[str, str, str]]:
    """Return each metric's name, value and interval."""
    return [
        (name, number(key, found.value), _interval(key, found))
        for key, name in _NAMES.items()
        if (found := estimates.get(key)) is not None
    ]


def slice_table(slices: "Sequence[SliceScores]") -> Any:
    """Return a table of slices with n, the metrics and their intervals: a line a slice, or a metric where that is too wide."""
    keys = [key for key in _NAMES if any(key in one.scores for one in slices)]
    wide = [
        (
            _slice(one),
            f"{one.n:,}",
            *(_with_interval(key, one.scores[key]) if key in one.scores else "-" for key in keys),
        )
        for one in slices
    ]
    head = ("slice", "n", *(_NAMES[key] for key in keys))
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
    return f"{number(metric, found.low)} to {number(metric, found.high)}"


def _with_interval(metric: str, found: "Estimate") -> str:
    return f"{number(metric, found.value)} ({_interval(metric, found)})"
