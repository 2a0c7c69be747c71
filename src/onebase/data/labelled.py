"""Rows for tasks on whole examples: a text and its label (classify) or its target (regress).

`find_labels` reads what classes there are; `Labelled` makes the examples. A label is a name, a whole number or a truth
value; a list of them means that an example may have several. Texts longer than `max_length` lose their end, and are
counted. All that is wrong with a row is a bad row, with its place.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from onebase.config.labels import Labels
from onebase.config.section import show
from onebase.data.examples import Example, Examples, Report
from onebase.data.rows import BadRow, Fault, Row, list_faults
from onebase.data.shapes import text_of
from onebase.data.tokens import Tokenizer, encode
from onebase.errors import DataError

LARGEST_TARGET = 1e18
_SHOWN_CLASSES = 8
_COMPARED = 200


def find_labels(rows: Iterable[Row], task: str, names: Sequence[str] = ()) -> Labels:
    """Return what rows are labelled with; `names` are the classes in their order, where they are given.

    Otherwise they are those of the rows: numbers in their order, names in the alphabet's.

    Raises:
        DataError: no row has a label, all have the same, or labels of two kinds; the first row that cannot be read.
    """
    if task == "regress":
        return Labels("regression")
    seen = _Seen()
    for row in rows:
        seen.take(row)
    problem = seen.problem(named=bool(names))
    if problem:
        raise DataError(problem if seen.fault is None else f"{seen.fault}\nOf the other rows: {problem}")
    several = seen.lists == {True}
    return Labels(
        "multi_label_classification" if several else "single_label_classification", tuple(names or seen.names)
    )


@dataclass
class _Seen:
    """What the labels of rows are, taken row by row."""

    classes: dict[str, None] = field(default_factory=dict)
    lists: set[bool] = field(default_factory=set)
    kinds: set[bool] = field(default_factory=set)
    """Whether whole numbers among the classes are truth values."""
    values: Mapping[str, Any] = field(default_factory=dict)
    """The columns of the first row that could be read."""
    first: Any = None
    alike: bool = True
    """Whether all rows have what the first has."""
    fault: str | None = None
    """The first row that could not be read, with its place."""

    def take(self, row: Row) -> None:
        """Add what a row's label says; the first fault is kept."""
        if row.fault is not None:
            self.fault = self.fault or f"{row.place}: {row.fault.told}"
            return
        self.values = self.values or row.values
        value = row.values.get("label")
        if value is None:
            return
        self.lists.add(isinstance(value, list))
        self.first = value if self.first is None else self.first
        self.alike = self.alike and value == self.first
        for one in value if isinstance(value, list) else [value]:
            if _is_label(one):
                self.classes[str(one)] = None
            if isinstance(one, int):
                self.kinds.add(isinstance(one, bool))

    @property
    def names(self) -> list[str]:
        """The classes: numbers in their order, also as CSV has them, and names in the alphabet's."""
        numbers = all(re.fullmatch(r"-?[0-9]+", name) for name in self.classes)
        return sorted(self.classes, key=(lambda name: (int(name), name)) if numbers else str)

    def problem(self, *, named: bool) -> str | None:
        """Return what keeps the rows from saying what is learned; where classes are `named`, not all need to be there."""
        if len(self.lists) > 1:
            return (
                "'label' is a list in some rows and a single class in others. Write it one way: a list in every row means "
                "that a row may have several classes."
            )
        if self.first is None:
            return " ".join(_missing("no row has a 'label'", self.values, "label"))
        if named:
            return None
        if not self.classes:
            return (
                "no row's 'label' holds a class: it must be a name, a whole number or a truth value, or a list of them; "
                f"the first is {show(self.first)}. Name another column: data.columns: {{label: COLUMN}}"
            )
        if self.alike or (len(self.classes) < 2 and self.lists == {False}):
            return (
                f"every row has the label {show(self.first)}: with one class there is nothing to learn. Add rows "
                "of other classes, or name them all: data.label_names"
            )
        if len(self.kinds) > 1:
            return (
                "'label' is a truth value in some rows and a whole number in others, which would be different classes. "
                "Write it one way."
            )
        return self._nearly_twice()

    def _nearly_twice(self) -> str | None:
        """Return what to do where two classes differ in nothing but blanks around them."""
        plain: dict[str, str] = {}
        for name in self.classes:
            other = plain.setdefault(name.strip(), name)
            if other != name:
                return (
                    f"labels {show(other)} and {show(name)} differ in nothing but blanks around them. Remove the blanks from "
                    "the rows; if they are different classes, name them all: data.label_names"
                )
        return None


def _missing(what: str, values: Mapping[str, Any], role: str) -> tuple[str, str]:
    """Return the words for a label or target that is not there: which columns are; and how to name the right one."""
    if role in values:
        return f"{what}: it is empty.", f"Fill it in, or name another column: data.columns: {{{role}: COLUMN}}"
    there = f"; the columns are {', '.join(map(show, values))}" if values else ""
    return f"{what}{there}.", f"Name its column: data.columns: {{{role}: COLUMN}}"


def _is_label(value: Any) -> bool:
    return isinstance(value, int) or (isinstance(value, str) and value.strip() != "")


@dataclass(frozen=True)
class Labelled:
    """The way of the tasks classify and regress; where nothing is `wanted`, rows to be labelled need no label."""

    tokenizer: Tokenizer
    labels: Labels
    max_length: int | None
    report: Report
    wanted: bool = True

    def make(self, rows: Sequence[Row]) -> Iterator[tuple[Row, list[Example] | Fault]]:
        """Yield each row with its example, or with why it has none."""
        read = [self._read(row) for row in rows]
        texts = [outcome[0] for outcome in read if not isinstance(outcome, Fault)]
        whole = iter(encode(texts, self.tokenizer, special=True))
        for row, outcome in zip(rows, read, strict=True):
            if isinstance(outcome, Fault):
                yield row, outcome
                continue
            text, target, rest = outcome
            ids = next(whole).token_ids
            if self.max_length is not None and len(ids) > self.max_length:
                self.report.truncated += 1
                ids = self._cut(text)
            if not len(ids):
                yield row, Fault("a text without tokens", "the tokenizer makes no token of the text.")
                continue
            yield row, [Example(ids, np.zeros(len(ids), dtype=np.bool_), row.place, rest, target)]

    def _cut(self, text: str) -> Any:
        """Return the first tokens of a text, with what the tokenizer puts at both ends."""
        cut = self.tokenizer(text, truncation=True, max_length=self.max_length, verbose=False)
        return np.asarray(cut["input_ids"], dtype=np.int32)

    def _read(self, row: Row) -> tuple[str, Any, dict[str, Any]] | Fault:
        if row.fault:
            return row.fault
        try:
            text, rest = text_of(row.values)
            if not self.wanted:
                return text, 0, rest
            if self.labels.problem == "regression":
                if rest.get("target") is None:
                    raise BadRow("no target", *_missing("'target' is missing", row.values, "target"))
                return text, _number(rest["target"]), rest
            if rest.get("label") is None:
                raise BadRow("no label", *_missing("'label' is missing", row.values, "label"))
            return text, self._classes(rest["label"]), rest
        except BadRow as bad:
            return bad.fault

    def _classes(self, value: Any) -> Any:
        """Return the number of a row's class, or a one for each class that it has."""
        several = self.labels.problem == "multi_label_classification"
        if several != isinstance(value, list):
            raise BadRow(
                "a label of the wrong type",
                f"'label' must be {'a list of classes' if several else 'one class'}, got {type(value).__name__}.",
            )
        if not several:
            return self._class(value)
        target = np.zeros(self.labels.outputs, dtype=np.float32)
        for one in value:
            number = self._class(one)
            if target[number]:
                raise BadRow(
                    "a class twice",
                    f"'label' holds {show(one)} twice.",
                    "Write the names or numbers of a row's classes, each once, not a 0 or 1 for every class.",
                )
            target[number] = 1
        return target

    def _class(self, value: Any) -> int:
        names = self.labels.names
        if not _is_label(value):
            raise BadRow("a label of the wrong type", f"'label' must be a name or a whole number, got {show(value)}.")
        if str(value) in names:
            return names.index(str(value))
        close = difflib.get_close_matches(str(value)[:_COMPARED], names, 1)  # its time grows with the square
        some = ", ".join(map(_short, names[:_SHOWN_CLASSES])) + (", ..." if len(names) > _SHOWN_CLASSES else "")
        raise BadRow(
            "an unknown label",
            f"label {show(str(value))} is none of the {len(names)} classes that are learned ({some})"
            f"{f'; closest is {show(close[0])}' if close else ''}.",
            "Correct it, or leave the row out; a training can also learn it from rows in data.train, or leave such rows out "
            "with data.on_bad_row: skip.",
        )


def _short(name: str) -> str:
    return name if len(name) <= 40 else name[:37] + "..."


def _number(value: Any) -> float:
    """Return a row's target."""
    try:
        number = float("nan") if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        raise BadRow("a target that is no number", f"'target' must be a number, got {show(value)}.") from None
    if not math.isfinite(number):
        raise BadRow("a target that is no number", f"'target' must be a finite number, got {show(value)}.")
    if abs(number) > LARGEST_TARGET:
        raise BadRow(
            "a target that is too large",
            f"'target' must be at most {LARGEST_TARGET:g} in size, for its square must be a number of fp32, got {show(value)}.",
            "Scale the targets.",
        )
    return number


def examples_to_label(
    rows: Sequence[Row], tokenizer: Tokenizer, labels: Labels, max_length: int | None
) -> tuple[Examples, int]:
    """Return one example a row, whose target says nothing, and how many rows lost their end to `max_length`.

    Raises:
        DataError: rows without a text, with their places.
    """
    report = Report()
    way = Labelled(tokenizer, labels, max_length, report, wanted=False)
    made, faults = list[Example](), list[tuple[str, Fault]]()
    for row, outcome in way.make(rows):
        if isinstance(outcome, Fault):
            faults.append((row.place, outcome))
        else:
            made += outcome
    if faults:
        raise DataError(list_faults(faults, len(rows)))
    return Examples(made), report.truncated
