"""From rows to examples: shape (`shapes.py`), rendering (`chat.py`) or text (`text.py`), tokens and labels (`tokens.py`).

Classes and numbers of whole examples: labelled.py. Everything is checked here, before the first step of a training: all
bad rows are reported at once, or counted by reason where they may be skipped.

Cost: 8,000 chat rows of 60 tokens take about 2 s, of which the tokenizer takes 1.1 s and jinja 0.6 s.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from onebase.config.labels import Labels
from onebase.config.settings import SHORTEST_MAX_LENGTH
from onebase.data.chat import Renderer, Rendering
from onebase.data.examples import Example, Examples, Report
from onebase.data.labelled import Labelled
from onebase.data.rows import BadRow, Fault, Row, list_faults
from onebase.data.shapes import conversation_of, text_of
from onebase.data.text import text_windows
from onebase.data.tokens import Encoded, Tokenizer, encode, special_ids, token_span, turn_end
from onebase.errors import ConfigError, DataError

_CHUNK_ROWS = 1000


@dataclass(frozen=True)
class _Chat:
    """The way of task chat: what all rows share while they become examples."""

    tokenizer: Tokenizer
    renderer: Renderer
    labels: str
    system: str | None
    max_length: int | None
    specials: frozenset[int]
    report: Report

    def make(self, rows: Sequence[Row]) -> Iterator[tuple[Row, list[Example] | Fault]]:
        """Yield each row with its examples, or with why it has none."""
        rendered = [self._rendered(row) for row in rows]
        texts = [rendering.text for outcome in rendered if not isinstance(outcome, Fault) for rendering in outcome[0]]
        encoded = iter(encode(texts, self.tokenizer))
        for row, outcome in zip(rows, rendered, strict=True):
            if isinstance(outcome, Fault):
                yield row, outcome
                continue
            renderings, rest = outcome
            tokens = [next(encoded) for _ in renderings]
            try:
                yield row, self._examples(row, renderings, tokens, rest)
            except BadRow as bad:
                yield row, bad.fault

    def _rendered(self, row: Row) -> tuple[list[Rendering], dict[str, Any]] | Fault:
        if row.fault:
            return row.fault
        try:
            conversation, keeps_own = conversation_of(row.values, self.system)
            renderings = self.renderer.renderings(conversation, self.labels)
        except BadRow as bad:
            return bad.fault
        if keeps_own:
            self.report.note("the row keeps its own system message; data.system is for rows without one")
        return renderings, conversation.rest

    def _examples(
        self, row: Row, renderings: list[Rendering], tokens: list[Encoded], rest: dict[str, Any]
    ) -> list[Example]:
        made, cut, ended = [], False, True
        for rendering, encoded in zip(renderings, tokens, strict=True):
            labelled = np.zeros(len(encoded.token_ids), dtype=np.bool_)
            for span in rendering.spans:
                first, last = token_span(encoded, span, self.tokenizer)
                last, has_end = turn_end(encoded, (first, last), self.specials, self.tokenizer)
                labelled[first:last] = True
                ended = ended and has_end
            labelled[:1] = False
            cut = cut or (self.max_length is not None and len(labelled) > self.max_length)
            if labelled[: self.max_length].any():
                ids = encoded.token_ids[: self.max_length]
                made.append(Example(ids, labelled[: self.max_length], row.place, rest))
        if not made:
            longest = min(len(encoded.token_ids) for encoded in tokens)
            raise BadRow(
                "all labels are cut off by max_length",
                f"all labels are cut off: the row has {longest} tokens, max_length is {self.max_length}, and no "
                "assistant turn starts within it.",
                "Raise data.max_length, or shorten the row.",
            )
        self.report.truncated += cut
        self.report.split += len(renderings) > 1
        if not ended:
            self.report.note("no end token closes the assistant turn, so the model does not learn where to stop")
        return made


@dataclass(frozen=True)
class _Text:
    """The way of task text."""

    tokenizer: Tokenizer
    max_length: int | None
    report: Report

    def make(self, rows: Sequence[Row]) -> Iterator[tuple[Row, list[Example] | Fault]]:
        """Yield each row with its windows, or with why it has none."""
        read = [self._text(row) for row in rows]
        texts = [outcome[0] for outcome in read if not isinstance(outcome, Fault)]
        windows = text_windows(texts, self.tokenizer, self.max_length)
        for row, outcome in zip(rows, read, strict=True):
            if isinstance(outcome, Fault):
                yield row, outcome
                continue
            made = [Example(ids, labelled, row.place, outcome[1]) for ids, labelled in next(windows) if labelled.any()]
            if not made:
                yield row, Fault("a text of one token", "the text has a single token, which nothing predicts.")
                continue
            self.report.windowed += len(made) > 1
            yield row, made

    def _text(self, row: Row) -> tuple[str, dict[str, Any]] | Fault:
        try:
            return row.fault or text_of(row.values)
        except BadRow as bad:
            return bad.fault


def build_examples(
    rows: Iterable[Row],
    tokenizer: Any,
    *,
    task: str | Labels = "chat",
    max_length: int | None = None,
    labels: str = "all",
    system: str | None = None,
    template: str | PathLike[str] | None = None,
    on_bad_row: str = "error",
) -> tuple[Examples, Report]:
    """Return the examples of all rows in their order, and what became of the rows.

    `task` is "chat", "text", or the labels of whole examples. `template` is jinja text, or the path (not a string) of a
    file that holds it. Longer chat rows and rows with labels lose their end, longer texts are cut into windows.

    Raises: DataError with the first ten bad rows and their number, unless `on_bad_row` is "skip"; if no row is left;
    if the chat template cannot be used at all.
    """
    if isinstance(task, str):
        _check_choice("task", task, ("chat", "text"))
    _check_choice("data.labels", labels, ("all", "last"))
    _check_choice("data.on_bad_row", on_bad_row, ("error", "skip"))
    if max_length is not None and max_length < SHORTEST_MAX_LENGTH:
        raise ConfigError(f"data.max_length: must be at least {SHORTEST_MAX_LENGTH} tokens, got {max_length}.")
    report = Report()
    way: _Chat | _Text | Labelled
    if isinstance(task, Labels):
        way = Labelled(tokenizer, task, max_length, report)
    elif task == "chat":
        text = read_template(template) if isinstance(template, PathLike) else template
        renderer = Renderer(tokenizer, text, report.notes)
        way = _Chat(tokenizer, renderer, labels, system, max_length, special_ids(tokenizer), report)
    else:
        way = _Text(tokenizer, max_length, report)
    made: list[Example] = []
    faults: list[tuple[str, Fault]] = []
    stream = iter(rows)
    while chunk := list(islice(stream, _CHUNK_ROWS)):
        report.rows += len(chunk)
        for row, outcome in way.make(chunk):
            if isinstance(outcome, Fault):
                faults.append((row.place, outcome))
            else:
                made += outcome
    _settle_faults(faults, report, on_bad_row)
    examples = Examples(made)
    report.examples, report.tokens, report.labelled_tokens = len(examples), examples.token_count, examples.label_count
    return examples, report


def read_template(path: str | PathLike[str]) -> str:
    """Return the jinja text of a chat template file.

    Raises: DataError if it cannot be read.
    """
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"data.template: {path} cannot be read: {error}.") from None


def _settle_faults(faults: list[tuple[str, Fault]], report: Report, on_bad_row: str) -> None:
    if not report.rows:
        raise DataError("there are no rows.")
    for place, fault in faults:
        report.dropped.setdefault(fault.reason, []).append(place)
    if not faults or (on_bad_row == "skip" and len(faults) < report.rows):
        return
    told = list_faults(faults, report.rows)
    if on_bad_row == "skip":
        raise DataError(f"no row is left\n{told}")
    if len(faults) > 1 and "data.on_bad_row" not in told:
        told += "\n  Leave such rows out; a training does it with data.on_bad_row: skip, and counts them."
    raise DataError(told)


def _check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{name}: must be one of {', '.join(choices)}, got {value!r}.")
