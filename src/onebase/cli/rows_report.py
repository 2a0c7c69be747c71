"""What became of the rows, as `train` and `preview` show it: counts, and everything that was cut, dropped or seen twice."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from onebase.cli import terminal

if TYPE_CHECKING:
    from rich.console import Console

    from onebase.data.examples import Report
    from onebase.train.data import Prepared, TrainingData

_SHOWN_PLACES = 3


def show_rows(out: "Console", data: "TrainingData") -> None:
    """Print the counts of both parts as a table, and below it what a user should know of them."""
    there = _parts(data)
    whole = data.train.examples.targets is not None
    counts = [
        (_whole_label(data) if whole and label == _TOKENS else label, *(count(part) for part in there.values()))
        for label, count in _COUNTS
    ]
    out.print(terminal.table(("data", *there), counts))
    for remark in remarks_on(data):
        out.print(terminal.warning(remark), soft_wrap=True)


def counts_of(data: "TrainingData") -> dict[str, dict[str, Any]]:
    """Return what `show_rows` shows, for scripts: the counts of each part that there is."""
    return {name: _plain_counts(part) for name, part in _parts(data).items()}


def class_counts(data: "TrainingData", names: Sequence[str]) -> dict[str, dict[str, int]]:
    """Return how many examples of each part have each of these classes."""
    from onebase.measure.metrics import actual_classes

    counts = {}
    for label, part in _parts(data).items():
        targets = part.examples.targets
        assert targets is not None, "examples with classes have targets"
        counts[label] = dict(zip(names, actual_classes(targets, len(names)).sum(0).tolist(), strict=True))
    return counts


def class_table(data: "TrainingData", names: Sequence[str]) -> terminal.Trimmed:
    """Return a table of how many examples of each part have each of these classes."""
    counts = class_counts(data, names)
    rows = [(name, *(f"{part[name]:,}" for part in counts.values())) for name in names]
    return terminal.table(("class", *counts), rows, fold=("class",))


def remarks_on(data: "TrainingData") -> list[str]:
    """Return what a user should know of the rows, a line each."""
    remarks = [f"{name}: {line}" for name, part in _parts(data).items() for line in _remarks(part.report)]
    return remarks if data.valid is None else [*remarks, *_both(data)]


def _parts(data: "TrainingData") -> dict[str, "Prepared"]:
    """Return the parts of the data that there are."""
    return {"train": data.train} if data.valid is None else {"train": data.train, "valid": data.valid}


def _plain_counts(part: "Prepared") -> dict[str, Any]:
    lengths = part.examples.lengths
    return {
        "files": list(part.files),
        "rows": part.report.rows,
        "examples": part.report.examples,
        "tokens": part.report.tokens,
        "labelled_tokens": part.report.labelled_tokens,
        "mean_tokens": float(lengths.mean()),
        "most_tokens": int(lengths.max()),
        "truncated_rows": part.report.truncated,
        "dropped_rows": part.report.dropped_rows,
        "dropped": dict(part.report.dropped),
    }


def _examples_per_row(part: "Prepared") -> str:
    return f"{part.report.examples:,}"


def _lengths(part: "Prepared") -> str:
    lengths = part.examples.lengths
    return f"{lengths.mean():.0f} / {lengths.max():,}"


def _labelled(part: "Prepared") -> str:
    targets = part.examples.targets
    if targets is not None:
        return _spread(targets)
    return f"{part.report.labelled_tokens:,} ({terminal.percent(part.report.labelled_tokens / part.report.tokens)})"


def _whole_label(data: "TrainingData") -> str:
    """Return what `_spread` counts."""
    targets = data.train.examples.targets
    assert targets is not None, "a token task counts labelled tokens"
    if targets.ndim == 2:
        return "classes / an example, mean"
    return "labels, mean / deviation" if targets.dtype.kind == "f" else "classes / share of the largest"


def _spread(targets: Any) -> str:
    """Return how the labels of whole examples are spread: how many classes and the largest's share, or mean and deviation."""
    import numpy as np

    if targets.ndim == 2:
        return f"{int((targets.sum(0) > 0).sum())} / {targets.sum(1).mean():.1f}"
    if targets.dtype.kind == "f":
        return f"{targets.mean():.4g} / {targets.std():.3g}"
    counts = np.bincount(targets)
    return f"{int((counts > 0).sum())} / {terminal.percent(counts.max() / len(targets))}"


_TOKENS = "labelled tokens"
_COUNTS = (
    ("files", lambda part: ", ".join(part.files)),
    ("rows", lambda part: f"{part.report.rows:,}"),
    ("examples", _examples_per_row),
    ("tokens", lambda part: f"{part.report.tokens:,}"),
    (_TOKENS, _labelled),
    ("tokens an example, mean / most", _lengths),
    ("truncated rows", lambda part: f"{part.report.truncated:,}"),
    ("dropped rows", lambda part: f"{part.report.dropped_rows:,}"),
)


def _remarks(report: "Report") -> Iterator[str]:
    """Yield what a user should know of one part."""
    if report.truncated:
        yield f"{terminal.counted(report.truncated, 'row')} truncated to data.max_length"
    if report.windowed:
        yield f"{terminal.counted(report.windowed, 'text')} cut into windows of data.max_length"
    if report.split:
        yield (
            f"{terminal.counted(report.split, 'row')} became one example for each assistant turn, because the chat "
            "template rewrites earlier turns"
        )
    for reason, places in report.dropped.items():
        yield f"{terminal.counted(len(places), 'row')} dropped: {reason} ({_some(places)})"
    for note, rows in report.notes.items():
        yield f"{note} ({terminal.counted(rows, 'row')})"


def _both(data: "TrainingData") -> Iterator[str]:
    """Yield that rows stand in train and valid, if any do."""
    from onebase.data.check import overlap

    assert data.valid is not None
    twice = overlap(data.train.examples, data.valid.examples)
    if twice:
        places = [f"{valid} = {train}" for valid, train in twice]
        some = terminal.counted(len(twice), "row")
        yield f"{some} of valid {'is' if len(twice) == 1 else 'are'} in train too, token for token ({_some(places)})"


def _some(places: Sequence[str]) -> str:
    shown = "; ".join(places[:_SHOWN_PLACES])
    return shown if len(places) <= _SHOWN_PLACES else f"{shown}; ..."
