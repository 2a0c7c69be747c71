"""The few real rows that a check is made on: those asked for, else the run's own."""

from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any

from onebase.cli.opening import Opened
from onebase.errors import OnebaseError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from onebase.data.examples import Examples
    from onebase.data.rows import Row

_ROLES = ("valid", "test", "train")
_MOST_TOKENS = 8192


@dataclass(frozen=True)
class FewRows:
    """Rows and the examples made of them, and what to call them: where they are from, or why there are none."""

    rows: "Sequence[Row]"
    examples: "Examples | None"
    said: str

    @property
    def sequences(self) -> list[list[int]]:
        """The token ids of each example."""
        return [] if self.examples is None else [example.token_ids.tolist() for example in self.examples]


def few_rows(opened: Opened, data: str | None, count: int) -> FewRows:
    """Return at most `count` rows of at most some 8,000 tokens, from a file, else from the run's own data.

    Raises:
        DataError: the rows asked for cannot be used.
    """
    if data is not None:
        return _prepared(opened, _read(opened, data), data, count, data)
    for role in _ROLES:
        source = opened.sources.get(role)
        if source is None:
            continue
        try:
            return _prepared(opened, _of_run(opened, role, source), source, count, f"the run's data.{role}")
        except (OnebaseError, OSError) as error:  # the run's files may be gone since
            return FewRows((), None, f"the run's data.{role} cannot be read ({error})")
    return FewRows((), None, f"{opened.label} has no rows of its own")


def _of_run(opened: Opened, role: str, source: Any) -> "Iterable[Row]":
    """Return the rows of one part of a run's data; a share of the training rows is held out as it was there."""
    if not isinstance(source, float):
        return _read(opened, source)
    from onebase.data.rows import split_by_hash

    return split_by_hash(_read(opened, opened.sources["train"]), source)[1]


def _read(opened: Opened, source: Any) -> "Iterable[Row]":
    from onebase.data.reading import read_rows

    return read_rows(source, columns=opened.data_settings(source).columns)


def _prepared(opened: Opened, rows: "Iterable[Row]", source: Any, count: int, said: str) -> FewRows:
    from onebase.train.data import prepare

    bank, kept = opened.bank, list(islice(rows, count))
    settings, virtual = opened.data_settings(source), len(bank.virtual_ids(opened.adapter))
    examples = prepare(kept, settings, opened.task, bank.base, (), virtual).examples
    fit = [n for n, tokens in enumerate(examples.lengths.cumsum().tolist()) if n < count and tokens <= _MOST_TOKENS]
    examples = examples[: max(len(fit), 1)]
    places = {example.place for example in examples}
    return FewRows([row for row in kept if row.place in places], examples, said)
