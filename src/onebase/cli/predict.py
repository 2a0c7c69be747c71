"""`onebase predict`: an answer for every row of a file, as JSONL."""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from onebase.cli import terminal
from onebase.cli.counting import counting
from onebase.cli.opening import Opened, open_adapter_or_model
from onebase.errors import ConfigError

if TYPE_CHECKING:
    from onebase.data.rows import Row

COLUMN = "prediction"
_ANSWER_ROLES = ("completion", "output")


def predict(
    adapter: Annotated[str, typer.Argument(help="An adapter's folder or a run's; a model, to ask it alone.")],
    data: Annotated[
        str, typer.Option(help="The rows to answer: in the shapes of training rows, answers may be missing.")
    ],
    out: Annotated[
        Path | None, typer.Option(help="Where the JSONL goes, written whole or not at all. Default: standard output.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="Another name or place of the adapter's base.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 256,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the likeliest token; above, tokens are drawn.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Decides what is drawn.")] = 0,
    allow_base_mismatch: Annotated[
        bool, typer.Option("--allow-base-mismatch", help="Accept a base that the adapter was not trained on.")
    ] = False,
) -> None:
    """Answer every row of a file, as JSONL.

    A line holds the row's own columns, and its answer under 'prediction'.
    """
    from onebase.files.atomic import write_file
    from onebase.measure.generate import end_ids, generate

    if out is not None:
        _check_place(out)
    opened = open_adapter_or_model(adapter, model=model, allow_base_mismatch=allow_base_mismatch)
    asking = opened.asking()
    rows = _rows(opened, data)
    prompts = asking.of_rows(rows)
    with counting(f"answers by {adapter}", len(rows), "rows") as advance:
        done = _Done(end_ids(opened.bank.base), max_new_tokens, advance)
        answers = generate(
            opened.bank,
            opened.adapter,
            prompts,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
            on_token=done.take,
        )
    lines = "".join(_line(row.values, asking.text_of(ids)) for row, ids in zip(rows, answers, strict=True))
    if out is None:
        sys.stdout.write(lines)
    else:
        write_file(out, lines, writing="the answers")
        terminal.say(f"{terminal.counted(len(rows), 'answer')} in {out}")
    cut = sum(len(ids) == max_new_tokens and ids[-1] not in done.ends for ids in answers)
    if cut:
        terminal.warn(f"{terminal.counted(cut, 'answer')} cut off at {max_new_tokens} tokens; raise --max-new-tokens.")


def _check_place(out: Path) -> None:
    """Raise before the work if the answers could not be written where they are to go."""
    from onebase.files.atomic import ensure_writable

    if out.is_dir():
        raise ConfigError(f"--out: {out} is a folder; name the file that the answers go to.")
    ensure_writable(out.parent, 0, writing="the answers")


class _Done:
    """Counts the answers that have come to their end."""

    def __init__(self, ends: frozenset[int], longest: int, advance: Any) -> None:
        self.ends, self._longest, self._advance = ends, longest, advance
        self._lengths: dict[int, int] = {}
        self._count = 0

    def take(self, number: int, token: int) -> None:
        """Take the next token of an answer."""
        self._lengths[number] = self._lengths.get(number, 0) + 1
        if token in self.ends or self._lengths[number] == self._longest:
            self._count += 1
            self._advance(self._count)


def _rows(opened: Opened, data: str) -> Sequence["Row"]:
    """Return the rows of the file under the run's column names; those of answers need not be there."""
    from onebase.data.reading import read_rows

    columns: Mapping[str, str] = opened.data.get("columns") or {}
    return list(read_rows(data, columns={role: name for role, name in columns.items() if role not in _ANSWER_ROLES}))


def _line(values: Mapping[str, Any], answer: str) -> str:
    return json.dumps({**values, COLUMN: answer}, ensure_ascii=False, default=str) + "\n"
