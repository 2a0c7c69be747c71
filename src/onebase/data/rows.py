"""Rows: one record of a data file and where it came from; hashing, weighing, splitting.

Here: `Row`, the fault a row can carry, the content hash and what is decided by it (a subsample, a validation
split). Not here: reading files (`reading.py`) and what the columns mean (`shapes.py`).

Everything decided by a hash depends on the row's own content alone: it is the same in any order of the rows, in any
process, and for two rows with the same content.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onebase.errors import DataError, list_problems

_SHOWN_ROWS = 10
CONTENT_ROLES = (
    "messages",
    "tools",
    "prompt",
    "completion",
    "instruction",
    "input",
    "output",
    "conversations",
    "text",
    "system",
)
"""Columns that a model reads or writes; what makes two rows the same. Ids, scores and slices do not."""


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a row cannot be used: `reason` is the same for all rows of its kind, `message` is about this one.

    `todo` is what can be done about it, for lists of rows to say once.
    """

    reason: str
    message: str
    todo: str = ""

    @property
    def told(self) -> str:
        """What is wrong with this row alone, and what can be done."""
        return f"{self.message} {self.todo}".rstrip()


class BadRow(Exception):
    """Raised while one row is worked on; becomes a line of a DataError, or a count where rows may be skipped."""

    def __init__(self, reason: str, message: str, todo: str = "") -> None:
        self.fault = Fault(reason, message, todo)
        super().__init__(self.fault.told)


@dataclass(frozen=True, slots=True)
class Row:
    """One record: its columns, its place ("train.jsonl line 812"), and its fault if it could not be read."""

    values: Mapping[str, Any]
    place: str
    fault: Fault | None = None


def list_faults(faults: Sequence[tuple[str, Fault]], rows: int) -> str:
    """Return what is wrong with some of `rows` rows, the first ten by their places, and then once what can be done."""
    if len(faults) == 1:
        place, fault = faults[0]
        return f"{place}: {fault.told}"
    listed = list_problems(f"{rows} rows", [f"{place}: {fault.message}" for place, fault in faults], shown=_SHOWN_ROWS)
    todos = dict.fromkeys(fault.todo for _, fault in faults[:_SHOWN_ROWS] if fault.todo)
    return "\n  ".join([listed, *todos])


def content_hash(values: Mapping[str, Any], salt: str = "") -> int:
    """Return a 64-bit hash of what a model sees of a row; of all columns where none of them is a known role."""
    content = {key: values[key] for key in CONTENT_ROLES if key in values} or dict(values)
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, separators=(",", ":"), default=str)
    return int.from_bytes(hashlib.blake2b(f"{salt}\n{canonical}".encode(), digest_size=8).digest(), "big")


def weigh(rows: Iterable[Row], weight: float) -> Iterator[Row]:
    """Yield each row floor(weight) times, and once more if its hash falls under the weight's fraction.

    Weight 2 gives each row twice, 0.5 a fixed half of the rows. Copies stand next to each other; shuffling is the
    batches' work. Rows that could not be read come once, so that they are reported.
    """
    copies = int(weight)
    limit = int((weight - copies) * 2**64)
    for row in rows:
        if row.fault:
            yield row
            continue
        for _ in range(copies):
            yield row
        if limit and content_hash(row.values, salt="weight") < limit:
            yield row


def split_by_hash(rows: Iterable[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Return (train, valid), where valid holds about `fraction` of the rows, chosen by content, and at least one.

    Rows with the same content land on the same side, so no row of valid is in train. Of few rows none may be chosen:
    then the one with the lowest hash is. Rows that could not be read stay in train, where they are reported.

    Raises: DataError if `fraction` is not between 0 and 1, or a side would be empty.
    """
    if not 0 < fraction < 1:
        raise DataError(f"the validation fraction must be between 0 and 1, got {fraction}. Use for example 0.05.")
    limit = int(fraction * 2**64)
    train: list[Row] = []
    valid: list[Row] = []
    for row in rows:
        chosen = row.fault is None and content_hash(row.values, salt="valid") < limit
        (valid if chosen else train).append(row)
    if not valid:
        hashes = [content_hash(row.values, salt="valid") if row.fault is None else 2**64 for row in train]
        lowest = min(hashes, default=2**64)
        if any(lowest < other < 2**64 for other in hashes):
            valid = [row for row, own in zip(train, hashes, strict=True) if own == lowest]
            train = [row for row, own in zip(train, hashes, strict=True) if own != lowest]
    if not valid or not train:
        side = "validation" if not valid else "training"
        raise DataError(
            f"splitting {len(train) + len(valid)} rows by hash with fraction {fraction} leaves no {side} row. "
            "Use another fraction, or name a file in data.valid."
        )
    return train, valid
