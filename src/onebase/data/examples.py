"""Examples: token ids with what is to be learned from them, compact, each knowing the row it came from.

An example has labelled tokens (chat, text) or one target for the whole of it (classify, regress). How rows become
examples: building.py. Cost: 5 bytes are kept a token, and the targets.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from onebase.data.tokens import BoolArray, IntArray


@dataclass(frozen=True, slots=True)
class Example:
    """What one forward learns from: labelled[i] says that token i is to be predicted from those before it.

    The first token is never labelled. `values` are the row's other columns, for slices. `target` is what a task on the
    whole example learns: the number of a class, a one for each class that it has, or a number; None in other tasks.
    """

    token_ids: IntArray
    labelled: BoolArray
    place: str
    values: Mapping[str, Any]
    target: Any = None


class Examples(Sequence[Example]):
    """Many examples in flat arrays: example i is the stretch offsets[i] to offsets[i + 1]."""

    def __init__(self, examples: Iterable[Example]) -> None:
        kept = list(examples)
        self.token_ids: IntArray = np.concatenate([np.zeros(0, np.int32), *(e.token_ids for e in kept)], dtype=np.int32)
        self.labelled: BoolArray = np.concatenate([np.zeros(0, np.bool_), *(e.labelled for e in kept)], dtype=np.bool_)
        self.offsets: NDArray[np.int64] = np.cumsum([0, *(len(e.token_ids) for e in kept)], dtype=np.int64)
        self._places = [example.place for example in kept]
        self._values = [example.values for example in kept]
        self.targets: NDArray[Any] | None = None
        if kept and kept[0].target is not None:
            self.targets = np.asarray([example.target for example in kept])
        for array in (self.token_ids, self.labelled, self.offsets):
            array.flags.writeable = False

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> "Examples": ...
    def __getitem__(self, index: int | slice) -> "Example | Examples":
        """Return one example (its arrays are views), or new Examples of a slice."""
        if isinstance(index, slice):
            return Examples(self[i] for i in range(*index.indices(len(self))))
        number = range(len(self))[index]
        stretch = slice(int(self.offsets[number]), int(self.offsets[number + 1]))
        target = None if self.targets is None else self.targets[number]
        return Example(
            self.token_ids[stretch], self.labelled[stretch], self._places[number], self._values[number], target
        )

    @property
    def lengths(self) -> NDArray[np.int64]:
        """Tokens of each example."""
        return np.diff(self.offsets)

    @property
    def token_count(self) -> int:
        """Tokens of all examples."""
        return int(self.offsets[-1])

    @property
    def label_count(self) -> int:
        """Labelled tokens of all examples, or examples where each has a target."""
        return int(self.labelled.sum()) if self.targets is None else len(self)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of lengths, token ids, labels and targets, in order: equal for equal training data."""
        digest = hashlib.sha256(b"onebase examples 1\n")
        for array in (self.offsets.astype("<i8"), self.token_ids.astype("<i4"), np.packbits(self.labelled)):
            digest.update(array.tobytes())
        if self.targets is not None:
            digest.update(self.targets.astype("<f8").tobytes())
        return digest.hexdigest()


@dataclass
class Report:
    """What became of the rows: counts, and the places of those that were dropped, by reason."""

    rows: int = 0
    examples: int = 0
    tokens: int = 0
    labelled_tokens: int = 0
    truncated: int = 0
    """Rows that lost tokens to max_length."""
    windowed: int = 0
    """Rows of plain text that became several windows."""
    split: int = 0
    """Rows that became one example for each assistant turn, because the template rewrites earlier turns."""
    notes: dict[str, int] = field(default_factory=dict)
    """What a user should know about, and in how many rows it was seen."""
    dropped: dict[str, list[str]] = field(default_factory=dict)
    """Reason -> places of the rows that were skipped."""

    @property
    def dropped_rows(self) -> int:
        """Number of rows that were skipped."""
        return sum(len(places) for places in self.dropped.values())

    def note(self, text: str) -> None:
        """Count one row under a note."""
        self.notes[text] = self.notes.get(text, 0) + 1
