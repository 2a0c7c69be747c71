"""From data settings to examples: reading, splitting and tokenising, with a report of what became of the rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from onebase.config.labels import Labels
from onebase.config.settings import DEFAULT_MAX_LENGTH, SHORTEST_MAX_LENGTH, DataPart, DataSettings
from onebase.data.building import build_examples
from onebase.data.examples import Examples, Report
from onebase.data.labelled import find_labels
from onebase.data.reading import read_rows
from onebase.data.rows import Row, split_by_hash
from onebase.errors import ConfigError, DataError, ModelError
from onebase.measure.judge import members_of

WHOLE_EXAMPLES = ("classify", "regress")
"""The tasks whose labels are of whole examples."""


class Reader(Protocol):
    """What rows are read for: a base, or its tokenizer alone where nothing is computed."""

    @property
    def name(self) -> str:
        """What the user called the model."""

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, or None."""

    @property
    def max_length(self) -> int | None:
        """The most tokens that it takes, where it says."""

    @property
    def embedding_rows(self) -> int | None:
        """How many token ids it knows; None where its weights are not open."""

    @property
    def labels(self) -> Labels | None:
        """What its head for whole examples predicts; None without one."""


@dataclass(frozen=True)
class Prepared:
    """Examples of one part of the data, what became of its rows, and the names of the files they came from."""

    examples: Examples
    report: Report
    files: tuple[str, ...]


@dataclass(frozen=True)
class TrainingData:
    """What a run learns from and is evaluated on."""

    train: Prepared
    valid: Prepared | None


def labels_in(settings: DataSettings, task: str) -> Labels | None:
    """Return what the rows to learn from are labelled with; None where a task has no labels of whole examples.

    Raises:
        DataError: there are no labels, or a single class.
    """
    if task not in WHOLE_EXAMPLES:
        return None
    return find_labels(_rows(settings.train, settings), task, settings.label_names or ())


def load_data(
    settings: DataSettings, task: str, base: Reader, virtual_tokens: int = 0, slices: Sequence[str] = ()
) -> TrainingData:
    """Return the training and validation examples that the settings name, all rows checked.

    `virtual_tokens` are the adapter's own before every example; they count into its length. `slices` are the columns by
    which a run without test rows is going to be measured.

    Raises:
        DataError: a file or rows that cannot be used.
        ConfigError: no row has one of the columns, or it has too many values for slices.
    """

    def made(rows: Iterable[Row], names: tuple[str, ...]) -> Prepared:
        return prepare(rows, settings, task, base, names, virtual_tokens)

    rows: Iterable[Row] = _rows(settings.train, settings)
    names = _names(settings.train)
    if isinstance(settings.valid, float):
        rows, held_out = split_by_hash(rows, settings.valid)
        held_out = list({row.place: row for row in held_out}.values())  # a weight counts in training alone
        valid = made(held_out, tuple(f"{name} ({settings.valid:g} held out)" for name in names))
    elif settings.valid is not None:
        valid = made(_rows(settings.valid, settings), _names(settings.valid))
    else:
        valid = None
    train = _varied(made(rows, names))
    if settings.test is None and slices:
        members_of((valid or train).examples, slices)
    return TrainingData(train, valid)


def _varied(train: Prepared) -> Prepared:
    """Return what is learned from, if there is something to learn: numbers that are not all the same.

    Raises:
        DataError: they are.
    """
    targets = train.examples.targets
    if targets is not None and np.issubdtype(targets.dtype, np.floating) and targets.ndim == 1 and np.ptp(targets) == 0:
        raise DataError(
            f"{', '.join(train.files)}: every row has the 'target' {targets[0]:g}, so there is nothing to learn. Add rows with "
            "other targets, or name another column: data.columns: {target: COLUMN}"
        )
    return train


def load_rows(source: Any, settings: DataSettings, task: str, base: Reader, virtual_tokens: int = 0) -> Prepared:
    """Return the examples of another source (a path, rows) under a run's data settings, for `load_data`'s adapter.

    Raises:
        DataError: a file or rows that cannot be used.
    """
    names = (Path(source).name,) if isinstance(source, str | Path) else ("rows",)
    return prepare(read_rows(source, columns=settings.columns), settings, task, base, names, virtual_tokens)


def prepare(
    rows: Iterable[Row],
    settings: DataSettings,
    task: str,
    base: Reader,
    files: tuple[str, ...],
    virtual_tokens: int = 0,
) -> Prepared:
    """Return rows as examples under the data settings, behind an adapter's virtual tokens.

    Raises:
        DataError: rows that cannot be used.
        ModelError: the tokenizer has tokens that the model does not know.
    """
    if base.tokenizer is None:
        raise ConfigError(f"{base.name} has no tokenizer, so task {task!r} cannot read its rows. Choose another model.")
    classes = base.labels if task in WHOLE_EXAMPLES else None
    if classes is None and task in WHOLE_EXAMPLES:
        raise ConfigError(
            f"task: {base.name} has no head for task {task!r}. Open it with labels: load(name, labels=...)"
        )
    examples, report = build_examples(
        rows,
        base.tokenizer,
        task=classes or task,
        max_length=max_length_of(settings, base, virtual_tokens),
        labels=settings.labels,
        system=settings.system,
        template=settings.template,
        on_bad_row=settings.on_bad_row,
    )
    largest, rows_known = int(examples.token_ids.max(initial=0)), base.embedding_rows
    if rows_known is not None and largest >= rows_known:
        raise ModelError(
            f"{base.name}: its tokenizer gave token id {largest}, but its embedding has {rows_known} rows, so ids up to "
            f"{rows_known - 1}. Were tokens added to the tokenizer alone? Resize the model's embeddings and save both "
            "together, or use the tokenizer that came with the model."
        )
    return Prepared(examples, report, files)


def max_length_of(settings: DataSettings, base: Reader, virtual_tokens: int = 0) -> int:
    """Return the most tokens of an example beside the virtual ones: as set, or the model's limit, at most the default.

    Raises:
        ConfigError: more than the model can take, or so few that virtual tokens leave no room.
    """
    limit = base.max_length
    whole = settings.max_length or min(limit or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if limit is not None and whole > limit:
        raise ConfigError(f"data.max_length: {base.name} takes at most {limit} tokens, got {whole}.")
    if virtual_tokens and whole - virtual_tokens < SHORTEST_MAX_LENGTH:
        raise ConfigError(
            f"data.max_length: {whole} tokens with {virtual_tokens} virtual ones (adapter.num_virtual_tokens) leave "
            f"{max(whole - virtual_tokens, 0)} for an example, at least {SHORTEST_MAX_LENGTH} are needed."
        )
    return whole - virtual_tokens


def _rows(parts: Sequence[DataPart], settings: DataSettings) -> Iterable[Row]:
    source = [part.path if part.weight == 1 else {"path": part.path, "weight": part.weight} for part in parts]
    return read_rows(source, columns=settings.columns)


def _names(parts: Sequence[DataPart]) -> tuple[str, ...]:
    return tuple(part.path if part.on_hub else Path(part.path).name for part in parts)
