"""`onebase predict`: an answer for every row of a file, as JSONL; what an interruption leaves finished is kept."""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from onebase.cli import options, terminal
from onebase.cli.counting import counting
from onebase.cli.labelling import PROBABILITIES, label_rows
from onebase.cli.opening import BaseOptions, Opened, open_adapter_or_model
from onebase.cli.scores import TOKEN_TASKS
from onebase.errors import ConfigError, DataError

if TYPE_CHECKING:
    from onebase.data.rows import Row

_ANSWER_ROLES = ("completion", "output", "label", "target")


def predict(  # noqa: PLR0913 (a verb's options are its parameters)
    context: typer.Context,
    adapter: Annotated[str, typer.Argument(help="An adapter's folder or a run's; a model, to ask it alone.")],
    data: Annotated[
        str, typer.Option(help="The rows to answer: in the shapes of training rows, answers may be missing.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="A new file for the JSONL, written whole or not at all. Default: standard output."),
    ] = None,
    column: Annotated[str, typer.Option(help="What the column with the answers is called.")] = "prediction",
    max_new_tokens: options.MaxNewTokens = 256,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_base_mismatch: options.AllowBaseMismatch = False,
) -> None:
    """Answer every row of a file, as JSONL.

    A line holds the row's own columns under their own names, and its answer under 'prediction' or the name given with --column: a text, a
    class (with 'probabilities' of all classes), or a number.

    With --out, every answer is kept in OUT.partial as it comes. When all are there, they go to OUT in the order of the
    rows; what Ctrl-C or a failure interrupts leaves OUT.partial.
    """
    if out is not None:
        _check_place(out, data)
    opened = open_adapter_or_model(adapter, BaseOptions(model, dtype, device, trust_remote_code, allow_base_mismatch))
    rows, own = _rows(opened, data)
    _check_column(own, column, "Give them another name: --column NAME")
    if opened.task not in TOKEN_TASKS:
        _check_not_given(context, opened.task)
        if opened.task == "classify":
            _check_column(own, PROBABILITIES, "Rename that column.")
        label_rows(opened, rows, own, column, out)
        return
    _ = opened.bank.head  # raises where the model predicts no tokens
    answers = Answers(opened, rows, own, column, max_new_tokens)
    with answers.kept(out), counting(f"answers by {adapter}", len(rows), "rows") as advance:
        answers.make(advance, temperature=temperature, seed=seed)
    if out is not None:
        terminal.say(f"{terminal.counted(len(rows), 'answer')} in {out}")
    for warning in answers.warnings():
        terminal.warn(warning)


def partial_of(out: Path) -> Path:
    """Return where answers are kept until all are there."""
    return out.with_name(f"{out.name}.partial")


def _check_place(out: Path, data: str) -> None:
    """Raise before the work if the answers could not be written where they are to go, or something would be lost."""
    from onebase.files.atomic import ensure_writable

    partial = partial_of(out)
    if out.is_dir():
        raise ConfigError(f"--out: {out} is a folder; name the file that the answers go to.")
    if any(_are_same_file(path, data) for path in (out, partial)):
        raise ConfigError(f"--out: {out} would take the place of the rows of --data {data}; name another file.")
    if out.exists() and not out.is_file():
        raise ConfigError(
            f"--out: {out} is no regular file; name a new file, or leave --out away and redirect standard output."
        )
    if out.exists():
        raise ConfigError(f"--out: {out} is there already; choose another --out or delete it.")
    ensure_writable(out.parent, 0, writing="the answers")
    if os.path.lexists(partial):
        raise ConfigError(
            f"--out: {partial} holds the answers of a prediction that was interrupted, or is still under way. "
            "Move or delete it, or name another file."
        )


def _are_same_file(path: Path, data: str) -> bool:
    """Return whether a path is that of the rows, or of a file in the folder of the rows, by whatever name."""
    if not path.is_file():
        return False
    files = Path(data).iterdir() if Path(data).is_dir() else [Path(data)]
    return any(file.is_file() and file.samefile(path) for file in files)


def _rows(opened: Opened, data: str) -> tuple[Sequence["Row"], Sequence["Row"]]:
    """Return the rows of the file as the run's data.columns maps them, and as they are; answers need not be there."""
    from onebase.data.reading import read_rows

    columns: Mapping[str, str] = opened.data.get("columns") or {}
    own = list(read_rows(data))
    asked = {role: name for role, name in columns.items() if role not in _ANSWER_ROLES}
    return list(read_rows(own, columns=asked)), own


def _check_not_given(context: typer.Context, task: str) -> None:
    """Raise if options were given that say how text is written, for a task whose answer is no text."""
    names = ("max_new_tokens", "temperature", "seed")
    sources = {name: context.get_parameter_source(name) for name in names}
    given = [
        f"--{name.replace('_', '-')}" for name, source in sources.items() if source and source.name == "COMMANDLINE"
    ]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: for answers that are written token by token; the adapter's task is {task}. Leave "
            f"{'it' if len(given) == 1 else 'them'} away."
        )


def _check_column(rows: Sequence["Row"], column: str, todo: str) -> None:
    """Raise if the answers would take the place of something that the rows hold."""
    if not column.strip():
        raise ConfigError(f"--column: must be a name, got {column!r}.")
    taken = [row.place for row in rows if column in row.values]
    if taken:
        more = f" and in {terminal.counted(len(taken) - 1, 'more row')}" if len(taken) > 1 else ""
        raise DataError(
            f"{taken[0]}: there is a column '{column}' already{more}, and the answers would take its place. {todo}"
        )


class Answers:
    """The answers to rows while they come, and where they are kept."""

    def __init__(
        self, opened: Opened, rows: Sequence["Row"], own: Sequence["Row"], column: str, max_new_tokens: int
    ) -> None:
        from onebase.measure.generate import end_ids, room_of

        self._opened, self._asking, self._rows = opened, opened.asking(), own
        self._column, self._most = column, max_new_tokens
        limit = opened.bank.max_length(opened.adapter)
        self._prompts = self._asking.of_rows(rows, limit)
        self._rooms = [room_of(prompt, max_new_tokens, limit) for prompt in self._prompts]
        self._ends = end_ids(opened.bank.base)
        self._tokens: list[list[int]] = [[] for _ in rows]
        self._lines: dict[int, str] = {}
        self._keep: Callable[[str], None] = lambda line: None

    def make(self, advance: Callable[[int], None], *, temperature: float, seed: int) -> None:
        """Answer all rows; `advance` takes the number of answers that have come to their end."""
        from onebase.measure.generate import generate

        def take(number: int, token: int) -> None:
            if self._take(number, token):
                advance(len(self._lines))

        generate(
            self._opened.bank,
            self._opened.adapter,
            self._prompts,
            max_new_tokens=self._most,
            temperature=temperature,
            seed=seed,
            on_token=take,
        )

    def _take(self, number: int, token: int) -> bool:
        """Take the next token of an answer; return whether that was its last."""
        tokens = self._tokens[number]
        tokens.append(token)
        if token not in self._ends and len(tokens) < self._rooms[number]:
            return False
        answer = {**self._rows[number].values, self._column: self._asking.text_of(tokens)}
        self._lines[number] = json.dumps(answer, ensure_ascii=False, default=str) + "\n"
        self._keep(self._lines[number])
        return True

    def text(self) -> str:
        """Return the lines of the answers there are, in the order of their rows."""
        return "".join(self._lines[number] for number in sorted(self._lines))

    @contextlib.contextmanager
    def kept(self, out: Path | None) -> Iterator[None]:
        """Keep each answer as it comes, and put all of them in their place at the end of the block.

        Where the block is interrupted, the answers so far stay in OUT.partial, or go to standard output.
        """
        try:
            with contextlib.nullcontext() if out is None else self._keeping_in(partial_of(out)):
                yield
            if out is not None:
                self._put(out)
        except BaseException:
            if self._lines:
                self._leave(out)
            raise
        if out is None:
            sys.stdout.write(self.text())

    @contextlib.contextmanager
    def _keeping_in(self, partial: Path) -> Iterator[None]:
        """Append the answers to a file as they come; where none came, it is deleted."""
        from onebase.files.atomic import reporting

        def keep(line: str) -> None:
            with reporting(partial, "the answers"):
                file.write(line)
                file.flush()

        with reporting(partial, "the answers"):
            partial.parent.mkdir(parents=True, exist_ok=True)
            file = partial.open("x", encoding="utf-8", newline="\n")
        self._keep = keep
        try:
            with file:
                yield
        finally:
            if not self._lines:
                partial.unlink()

    def _put(self, out: Path) -> None:
        from onebase.files.atomic import write_file

        write_file(out, self.text(), writing="the answers")
        partial_of(out).unlink(missing_ok=True)

    def _leave(self, out: Path | None) -> None:
        """Say where the answers that came are, after they were printed if they are in no file."""
        came = f"{len(self._lines):,} of {terminal.counted(len(self._rows), 'answer')} came"
        with contextlib.suppress(OSError):
            if out is None:
                sys.stdout.write(self.text())
                sys.stdout.flush()
                terminal.warn(f"{came}; they are on standard output.")
            else:
                terminal.warn(f"{came}; they are kept in {partial_of(out)}")

    def warnings(self) -> Iterator[str]:
        """Yield how many answers were cut off, and by what."""
        cut = [n for n, tokens in enumerate(self._tokens) if tokens[-1] not in self._ends]
        asked = sum(self._rooms[number] == self._most for number in cut)
        if asked:
            yield f"{terminal.counted(asked, 'answer')} cut off at {self._most} tokens; raise --max-new-tokens."
        if len(cut) > asked:
            limit = self._opened.bank.base.max_length
            yield f"{terminal.counted(len(cut) - asked, 'answer')} cut off at the model's limit, {limit} tokens with the prompt."
