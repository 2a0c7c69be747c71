"""Metrics of classes, labels and numbers, each with a bootstrap interval, and the slices that they are taken on.

Pure functions on numpy arrays: probabilities or predictions on one side, targets on the other. Whoever has a model's
outputs calls them; no tensor, no settings and no file is seen here.

Every metric is written once, as a function of how often each example counts. Its plain value is the one where every
example counts once; a bootstrap resample is another column of counts. So 1,000 resamples cost a few matrix products
and, for AUROC, one sort a class: 2,000 examples of 25 classes take about half a second on one core.

A metric that the examples do not define is left out: AUROC where no class has both positives and negatives, R2 where
all targets are equal, a multi-label F1 where no label occurs and none is predicted. No metric is ever NaN.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal

import numpy as np
from jaxtyping import Bool, Float64, Int, Int64, Real, Shaped

from onebase.errors import ConfigError, DataError, list_problems

CALIBRATION_BINS = 15
NO_VALUE = "(none)"
"""The name of the slice of rows that have no value in a column."""

Kind = Literal["class", "multi_label", "number"]
Counts = Float64[np.ndarray, "examples resamples"]
Values = Float64[np.ndarray, " resamples"]
Metric = Callable[[Counts], Values]
"""Return the metric for each column of counts, NaN where it is undefined."""

# Larger chunks fall out of the caches: cumulative sums of 2,000 x 1,000 counts at once take six times as long.
_CHUNK_COUNTS = 1 << 18
_FEWEST_RESAMPLES = 100


@dataclass(frozen=True)
class Estimate:
    """A metric on the examples at hand, and the interval in which it lies for other examples of the same kind."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class SliceScores:
    """The metrics of the `n` examples whose `column` holds `value`."""

    column: str
    value: str
    n: int
    scores: Mapping[str, Estimate]


def class_scores(
    probabilities: Real[np.ndarray, "examples classes"], targets: Int[np.ndarray, " examples"]
) -> dict[str, float]:
    """Return accuracy, macro_f1, auroc, ece and brier of one class an example; the first of equal probabilities wins.

    accuracy  the share of examples whose most probable class is the target
    macro_f1  the mean of 2 TP / (2 TP + FP + FN) over the classes that are a target or a prediction
    auroc     the mean, over the classes that are some targets and not all, of the area under the curve of that class
              against the rest; with two classes, that of class 1
    ece       the expected calibration error of the most probable class (arXiv:1706.04599 eq. 3, 15 bins)
    brier     the mean over examples of the sum over classes of (probability - target)^2, from 0 to 2 (Brier, Monthly
              Weather Review 78, 1950, eq. 2): for two classes twice the score that counts class 1 alone

    Raises:
        DataError: no examples, a row that is no distribution, or a target that is no class.
    """
    return _plain(_class_metrics(probabilities, targets), len(targets))


def multi_label_scores(
    probabilities: Real[np.ndarray, "examples classes"], targets: Shaped[np.ndarray, "examples classes"]
) -> dict[str, float]:
    """Return accuracy, macro_f1, auroc, ece and brier of any number of labels an example, predicted above 0.5.

    accuracy  the share of examples with every label right
    macro_f1  the mean of 2 TP / (2 TP + FP + FN) over the labels that occur or are predicted
    auroc     the mean of the labels' areas under the curve, over those that some examples have and not all
    ece       the expected calibration error of all decisions, each with the probability of what was decided
    brier     the mean over examples and labels of (probability - target)^2

    Raises:
        DataError: no examples, or a probability or target out of range.
    """
    return _plain(_multi_label_metrics(probabilities, targets), len(targets))


def number_scores(
    predictions: Real[np.ndarray, " examples"], targets: Real[np.ndarray, " examples"]
) -> dict[str, float]:
    """Return mse, mae and r2 = 1 - sum (target - prediction)^2 / sum (target - mean target)^2.

    Raises:
        DataError: no examples, or a number that is not finite.
    """
    return _plain(_number_metrics(predictions, targets), len(targets))


def predicted_classes(
    probabilities: Real[np.ndarray, "examples classes"], *, several: bool
) -> Bool[np.ndarray, "examples classes"]:
    """Return which classes each example is predicted to have: the first most probable one, or of `several` all above 0.5."""
    most = probabilities.argmax(1)[:, None] == np.arange(probabilities.shape[1])
    predicted: Bool[np.ndarray, "examples classes"] = probabilities > 0.5 if several else most
    return predicted


def actual_classes(targets: Shaped[np.ndarray, "examples ..."], classes: int) -> Bool[np.ndarray, "examples classes"]:
    """Return which classes each example has, by the number of its one class or by a 0 or 1 for every class."""
    actual: Bool[np.ndarray, "examples classes"]
    actual = targets == 1 if targets.ndim == 2 else targets[:, None] == np.arange(classes)
    return actual


def with_intervals(
    kind: Kind,
    outputs: Real[np.ndarray, "examples ..."],
    targets: Shaped[np.ndarray, "examples ..."],
    *,
    resamples: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> dict[str, Estimate]:
    """Return each metric with its bootstrap percentile interval over examples.

    The interval says what other examples would change, not what another training would. Resamples in which a metric is
    undefined (a class that is not drawn) are left out of its interval. Equal seeds draw equal examples, so that two
    adapters measured on the same rows are resampled alike. Noise in a bin only adds to ECE, and a resample has more of
    it: the interval of a well calibrated model lies above its value, and may not hold it.

    Raises:
        ConfigError: fewer than 100 resamples, or a level that is not between 0 and 1.
        DataError: as the plain metrics.

    Source: Efron, Annals of Statistics 7, 1979; the percentile interval: Efron and Tibshirani, 1993, ch. 13.
    """
    if resamples < _FEWEST_RESAMPLES:
        raise ConfigError(f"resamples: must be at least {_FEWEST_RESAMPLES} for an interval, got {resamples}.")
    if not 0 < level < 1:
        raise ConfigError(f"level: must be between 0 and 1, such as 0.95, got {level}.")
    metrics = _METRICS[kind](outputs, targets)
    examples = len(targets)
    found: dict[str, list[Values]] = {name: [] for name in metrics}
    step = max(1, _CHUNK_COUNTS // examples)
    for start in range(0, resamples, step):
        numbers = range(start, min(start + step, resamples))
        drawn = [np.bincount(resample(examples, seed, number), minlength=examples) for number in numbers]
        counts = np.stack(drawn, axis=1).astype(np.float64)
        for name, metric in metrics.items():
            found[name].append(metric(counts))
    tails = ((1 - level) / 2, (1 + level) / 2)
    estimates = {}
    for name, value in _plain(metrics, examples).items():
        # A metric that the examples define is defined in at least half of their resamples: some are left.
        low, high = np.nanquantile(np.concatenate(found[name]), tails)
        estimates[name] = Estimate(value, float(low), float(high))
    return estimates


def resample(examples: int, seed: int, number: int) -> Int64[np.ndarray, " examples"]:
    """Return which examples resample `number` holds: as many as there are, with replacement, by a generator of its own."""
    return np.random.default_rng([seed, number]).integers(0, examples, examples)


def slices_of(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[str], *, option: str = "eval.slices"
) -> dict[str, list[tuple[str, Int64[np.ndarray, " members"]]]]:
    """Return, for each column, its values as text and the numbers of the rows that have them, the most frequent first.

    Values that are equally frequent stand in the order of their text. Rows without the column, or with null in it, form
    a slice of their own, '(none)'. `option` is where the columns were named, for the error.

    Raises:
        ConfigError: no row has one of the columns.
    """
    present = {column: None for row in rows for column in row}
    problems = []
    for column in dict.fromkeys(columns):
        if column not in present:
            close = get_close_matches(column, present, n=1)
            closest = f"; closest is '{close[0]}'" if close else ""
            there = ", ".join(f"'{name}'" for name in present) or "none"
            problems.append(f"no row has the column '{column}'{closest}. The columns are: {there}.")
    if problems:
        message = problems[0] if len(problems) == 1 else list_problems(f"{len(rows)} rows", problems)
        raise ConfigError(f"{option}: {message}")
    return {column: _slices_of_column(rows, column) for column in columns}


def _slices_of_column(
    rows: Sequence[Mapping[str, Any]], column: str
) -> list[tuple[str, Int64[np.ndarray, " members"]]]:
    members: defaultdict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        value = row.get(column)
        members[NO_VALUE if value is None else str(value)].append(number)
    ordered = sorted(members.items(), key=lambda item: (-len(item[1]), item[0]))
    return [(value, np.asarray(numbers, dtype=np.int64)) for value, numbers in ordered]


def _plain(metrics: Mapping[str, Metric], examples: int) -> dict[str, float]:
    """Return the metrics in which every example counts once, without those that are undefined."""
    once = np.ones((examples, 1))
    values = {name: float(metric(once)[0]) for name, metric in metrics.items()}
    return {name: value for name, value in values.items() if not np.isnan(value)}


# --- what each kind is measured by


def _class_metrics(
    probabilities: Real[np.ndarray, "examples classes"], targets: Int[np.ndarray, " examples"]
) -> dict[str, Metric]:
    probabilities = _checked_probabilities(probabilities)
    classes = probabilities.shape[1]
    _refuse_first(np.abs(probabilities.sum(1) - 1) > 1e-3, probabilities.sum(1), "probabilities must sum to 1")
    _refuse_first((targets < 0) | (targets >= classes), targets, f"a target must be a class from 0 to {classes - 1}")
    predicted, actual = predicted_classes(probabilities, several=False), actual_classes(targets, classes)
    right = (predicted & actual).any(1)
    against_rest = slice(1, 2) if classes == 2 else slice(None)
    return {
        "accuracy": _mean(right.astype(np.float64)),
        "macro_f1": _macro_f1(predicted, actual),
        "auroc": _macro_auroc(probabilities[:, against_rest], actual[:, against_rest]),
        "ece": _calibration_error(probabilities.max(1)[:, None], right[:, None]),
        "brier": _mean(np.square(probabilities - actual).sum(1)),
    }


def _multi_label_metrics(
    probabilities: Real[np.ndarray, "examples classes"], targets: Shaped[np.ndarray, "examples classes"]
) -> dict[str, Metric]:
    probabilities = _checked_probabilities(probabilities)
    _refuse_first((targets != 0) & (targets != 1), targets, "a label's target must be 0 or 1")
    predicted, actual = predicted_classes(probabilities, several=True), actual_classes(targets, probabilities.shape[1])
    right = predicted == actual
    return {
        "accuracy": _mean(right.all(1).astype(np.float64)),
        "macro_f1": _macro_f1(predicted, actual),
        "auroc": _macro_auroc(probabilities, actual),
        "ece": _calibration_error(np.where(predicted, probabilities, 1 - probabilities), right),
        "brier": _mean(np.square(probabilities - actual).mean(1)),
    }


def _number_metrics(
    predictions: Real[np.ndarray, " examples"], targets: Real[np.ndarray, " examples"]
) -> dict[str, Metric]:
    predictions, targets = predictions.astype(np.float64), targets.astype(np.float64)
    _refuse_empty(targets)
    _refuse_first(~np.isfinite(predictions), predictions, "a prediction must be a finite number")
    _refuse_first(~np.isfinite(targets), targets, "a target must be a finite number")
    errors = predictions - targets
    return {"mse": _mean(np.square(errors)), "mae": _mean(np.abs(errors)), "r2": _explained(errors, targets)}


_METRICS: dict[Kind, Callable[[Any, Any], dict[str, Metric]]] = {
    "class": _class_metrics,
    "multi_label": _multi_label_metrics,
    "number": _number_metrics,
}


def _checked_probabilities(
    probabilities: Real[np.ndarray, "examples classes"],
) -> Float64[np.ndarray, "examples classes"]:
    probabilities = probabilities.astype(np.float64)
    _refuse_empty(probabilities)
    inside = (probabilities >= 0) & (probabilities <= 1 + 1e-6)  # fp32 rounds up; NaN is not inside either
    _refuse_first(~inside, probabilities, "a probability must be a number from 0 to 1")
    return probabilities


def _refuse_empty(values: Shaped[np.ndarray, "examples ..."]) -> None:
    if not values.size:
        raise DataError(f"{len(values)} examples: there is nothing to measure.")


def _refuse_first(
    wrong: Bool[np.ndarray, "examples ..."], values: Shaped[np.ndarray, "examples ..."], rule: str
) -> None:
    """Raise a DataError that shows the first wrong value, and how many examples have one, if there is any."""
    if wrong.any():
        place = tuple(int(axis[0]) for axis in np.nonzero(wrong))
        such = np.unique(np.nonzero(wrong)[0]).size
        raise DataError(f"example {place[0]}: {rule}, got {values[place]} (the first of {such} such examples).")


# --- metrics as functions of counts


def _mean(values: Float64[np.ndarray, " examples"]) -> Metric:
    return lambda counts: values @ counts / counts.sum(0)


def _macro_f1(predicted: Bool[np.ndarray, "examples classes"], actual: Bool[np.ndarray, "examples classes"]) -> Metric:
    """F1 of a class = 2 TP / (predicted + actual); the mean is over classes where the denominator is not zero."""
    hits = (predicted & actual).astype(np.float64).T
    both = predicted.astype(np.float64).T + actual.T

    def _weighted(counts: Counts) -> Values:
        denominators = both @ counts
        f1 = _quotient(2 * (hits @ counts), denominators)
        return _quotient(np.nansum(f1, axis=0), (denominators > 0).sum(0))

    return _weighted


def _macro_auroc(
    scores: Float64[np.ndarray, "examples classes"], actual: Bool[np.ndarray, "examples classes"]
) -> Metric:
    columns = [_auroc(scores[:, column], actual[:, column]) for column in range(scores.shape[1])]

    def _weighted(counts: Counts) -> Values:
        total = np.zeros(counts.shape[1])
        defined = np.zeros(counts.shape[1])
        for column in columns:
            areas = column(counts)
            total += np.nan_to_num(areas)
            defined += ~np.isnan(areas)
        return _quotient(total, defined)

    return _weighted


def _auroc(scores: Float64[np.ndarray, " examples"], actual: Bool[np.ndarray, " examples"]) -> Metric:
    """The share of (positive, negative) pairs in which the positive scores higher, ties counting half.

    A positive's rank is the count of all examples below it and half the count of those at its own score. Summed over
    positives, the part that comes from other positives is P^2 / 2, by symmetry; the rest are the pairs:

        AUROC = (sum over positives of count * rank - P^2 / 2) / (P * N)

    Ranks are differences of one cumulative sum. All sums are of whole and half numbers, so they are exact.
    Source: Mann and Whitney, Annals of Mathematical Statistics 18, 1947; Hanley and McNeil, Radiology 143, 1982.
    """
    order = np.argsort(scores, kind="stable")
    positives = np.flatnonzero(actual)
    below = np.searchsorted(scores, scores[positives], side="left", sorter=order)
    up_to = np.searchsorted(scores, scores[positives], side="right", sorter=order)

    def _weighted(counts: Counts) -> Values:
        if not 0 < len(positives) < len(actual):
            return np.full(counts.shape[1], np.nan)
        cumulative = np.zeros((len(counts) + 1, counts.shape[1]))
        np.cumsum(counts[order], axis=0, out=cumulative[1:])
        ours = counts[positives]
        positive = ours.sum(0)
        ranks = (cumulative[below] + cumulative[up_to]) / 2
        pairs = (ours * ranks).sum(0) - positive**2 / 2
        return _quotient(pairs, positive * (cumulative[-1] - positive))

    return _weighted


def _calibration_error(
    confidences: Float64[np.ndarray, "examples decisions"], right: Bool[np.ndarray, "examples decisions"]
) -> Metric:
    """The sum over bins of |bin| / n * |accuracy(bin) - mean confidence(bin)|, bins ((m - 1) / 15, m / 15].

    |bin| cancels: what is summed is |sum over the bin of right - confidence|.
    Source: Guo et al., arXiv:1706.04599 eq. 3.
    """
    examples, decisions = confidences.shape
    bins = np.searchsorted(np.linspace(0, 1, CALIBRATION_BINS + 1)[1:-1], confidences, side="left")
    gaps = np.zeros((CALIBRATION_BINS, examples))
    np.add.at(gaps, (bins, np.arange(examples)[:, None]), right - confidences)
    return lambda counts: np.abs(gaps @ counts).sum(0) / (decisions * counts.sum(0))


def _explained(errors: Float64[np.ndarray, " examples"], targets: Float64[np.ndarray, " examples"]) -> Metric:
    """R2; undefined where the targets that count are all equal, which is told exactly and not from a rounded sum."""
    column = targets[:, None]

    def _weighted(counts: Counts) -> Values:
        drawn = counts > 0
        varies = np.where(drawn, column, -np.inf).max(0) > np.where(drawn, column, np.inf).min(0)
        means = targets @ counts / counts.sum(0)
        spread = (np.square(column - means) * counts).sum(0)
        return 1 - _quotient(np.square(errors) @ counts, np.where(varies, spread, 0))

    return _weighted


def _quotient(above: Shaped[np.ndarray, "..."], below: Shaped[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
    """Return above / below, NaN where below is zero."""
    quotients = np.full(np.shape(above), np.nan)
    np.divide(above, below, out=quotients, where=below > 0)
    return quotients
