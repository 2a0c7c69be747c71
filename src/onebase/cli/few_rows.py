"""The few real rows that a check is made on: those asked for, else the run's own."""

from itertools import islice
from typing import TYPE_CHECKING, Any

from onebase.cli.opening import Opened
from onebase.errors import OnebaseError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from onebase.data.rows import Row
    from onebase.train.data import Prepared

_ROLES = ("valid", "test", "train")


def few_rows(opened: Opened, data: str | None, count: int) -> "tuple[Prepared | None, str]":
    """Return at most `count` rows as examples, and what to call them; None where there are none, with the reason.

    Raises:
        DataError: the rows asked for cannot be used.
    """
    if data is not None:
        return _prepared(opened, _read(opened, data), data, count), data
    for role in _ROLES:
        source = opened.sources.get(role)
        if source is None:
            continue
        try:
            return _prepared(opened, _of_run(opened, role, source), source, count), f"the run's data.{role}"
        except (OnebaseError, OSError) as error:  # the run's files may be gone since
            return None, f"the run's data.{role} cannot be read ({error})"
    return None, f"{opened.label} has no rows of its own"


def _of_run(opened: Opened, role: str, source: Any) -> "Iterable[Row]":
    """Return the rows of one part of a run's data; a share of the training rows is held out as it was there."""
    if not isinstance(source, float):
        return _read(opened, source)
    from onebase.data.rows import split_by_hash

    return split_by_hash(_read(opened, opened.sources["train"]), source)[1]


def _read(opened: Opened, source: Any) -> "Iterable[Row]":
    from onebase.data.reading import read_rows

    return read_rows(source, columns=opened.data_settings(source).columns)


def _prepared(opened: Opened, rows: "Iterable[Row]", source: Any, count: int) -> "Prepared":
    from onebase.train.data import prepare

    bank = opened.bank
    settings, virtual = opened.data_settings(source), len(bank.virtual_ids(opened.adapter))
    return prepare(islice(rows, count), settings, opened.task, bank.base, (), virtual)
