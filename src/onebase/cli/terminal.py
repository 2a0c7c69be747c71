"""What all verbs print with: results on standard output, messages on standard error, numbers as people read them.

Nothing that comes from outside is taken as markup. Where the output is no terminal there is no colour, and lines are
as long as they are, so that `grep` and `cut` see one thing a line.
"""

import json
import math
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

from rich import box
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

_PLAIN_WIDTH = 1000
_FOLDED_WIDTH = 8
"""The narrowest that a column of words gets."""


def stdout() -> Console:
    """Return the console for results."""
    return _console(sys.stdout)


def stderr() -> Console:
    """Return the console for messages."""
    return _console(sys.stderr)


def _console(file: IO[str]) -> Console:
    width = None if file.isatty() or "COLUMNS" in os.environ else _PLAIN_WIDTH
    return Console(file=file, width=width, markup=False, highlight=False, emoji=False)


def let_go_of_closed() -> None:
    """Send what is still said on a terminal that was closed nowhere, where a write would be an error each time."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        if stat.S_ISCHR(os.fstat(number).st_mode) and not os.isatty(number):  # a terminal once
            os.dup2(nowhere, number)
    os.close(nowhere)


def say(text: str) -> None:
    """Print a message on standard error."""
    stderr().print(text, soft_wrap=True)


def warn(text: str) -> None:
    """Print what the user should look at on standard error."""
    stderr().print(warning(text), soft_wrap=True)


def warning(text: str) -> Text:
    """Return what the user should look at as a line, for results that hold it."""
    return Text.assemble(("warning: ", "yellow"), text)


def print_json(content: Mapping[str, Any]) -> None:
    """Print one JSON object on standard output; a number that is not finite as null."""
    sys.stdout.write(json.dumps(_finite(content), ensure_ascii=False, indent=2, allow_nan=False, default=str) + "\n")
    sys.stdout.flush()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@dataclass(frozen=True)
class Trimmed:
    """A table whose lines end where their last word ends."""

    table: Table

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for line in console.render_lines(self.table, options, pad=False):
            while line and not line[-1].text.rstrip(" "):
                line.pop()
            if line:
                text, style, control = line.pop()
                yield from line
                yield Segment(text.rstrip(" "), style, control)
            yield Segment.line()


def table(
    head: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    left: int | Sequence[int] = 1,
    fold: Sequence[str] = (),
    less: Sequence[str] = (),
) -> Trimmed:
    """Return a table whose first `left` columns, or those of these places, are words and the others numbers.

    A cell is never cut. What does not fit goes on in the next line, in the columns named in `fold` first. Where that is
    not enough, the columns move closer and their heads go on in the next line, and those named in `less` are left out,
    the first first.
    """
    kept, tight = list(head), False
    words = [place < left if isinstance(left, int) else place in left for place in range(len(kept))]
    lines = [list(row) for row in rows]
    room = stdout().width
    if _least_width(kept, lines, fold, tight=tight) > room:
        tight = True
        for name in less:
            if _least_width(kept, lines, fold, tight=tight) > room:
                place = kept.index(name)
                del kept[place], words[place]
                for line in lines:
                    del line[place]
    whole = _least_width(kept, lines, fold, tight=tight) <= room
    made = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=tight)
    for place, name in enumerate(kept):
        made.add_column(
            name.replace(" ", "\n") if tight and name not in fold else name,
            justify="left" if words[place] else "right",
            vertical="bottom" if tight else "top",
            overflow="fold",
            no_wrap=bool(fold) and whole and name not in fold,
            header_style="bold",
        )
    for line in lines:
        made.add_row(*(Text(cell) for cell in line))
    return Trimmed(made)


def fits(head: Sequence[str], rows: Sequence[Sequence[str]]) -> bool:
    """Return whether a table can be printed with all its cells on one line."""
    return _least_width(head, rows, (), tight=False) <= stdout().width


def _least_width(head: Sequence[str], rows: Sequence[Sequence[str]], fold: Sequence[str], *, tight: bool) -> int:
    """Return how wide a table must be for its cells to stand whole, but for those that may go on in the next line."""
    widths = []
    for place, name in enumerate(head):
        cells = [cell_len(row[place]) for row in rows]
        if name in fold:
            widths.append(max(cell_len(name), min(max(cells, default=0), _FOLDED_WIDTH)))
        else:
            words = name.split() if tight else [name]
            widths.append(max([*map(cell_len, words), *cells], default=0))
    return sum(widths) + (2 if tight else 3) * (len(widths) - 1)


def facts(rows: Iterable[tuple[str, str]]) -> Trimmed:
    """Return names and what they are, in two columns without lines.

    A name stays on its line where no name takes more than half of the width; nothing is cut.
    """
    lines = [(Text(name), Text(value)) for name, value in rows]
    made = Table.grid(padding=(0, 2))
    widest = max((name.cell_len for name, _ in lines), default=0)
    made.add_column(style="bold", no_wrap=widest <= stdout().width // 2, overflow="fold")
    made.add_column(overflow="fold")
    for name, value in lines:
        made.add_row(name, value)
    return Trimmed(made)


def counted(number: int, word: str) -> str:
    """Return "1 row" or "8,000 rows"."""
    return f"{number:,} {word}{'' if number == 1 else 's'}"


def size(size_bytes: float) -> str:
    """Return a number of bytes in the unit that suits it, decimal: 19.5 MB."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size_bytes >= factor * 0.9995:
            value = size_bytes / factor
            return (
                f"{value:.2f} {unit}"
                if value < 9.995
                else f"{value:.1f} {unit}"
                if value < 99.95
                else f"{value:.0f} {unit}"
            )
    return f"{size_bytes:.0f} B"


def amount(number: float) -> str:
    """Return a count of parameters as people say it: 4.88 M."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= factor * 0.9995:
            return f"{number / factor:.3g} {unit}"
    return f"{number:.0f}"


def duration(seconds: float) -> str:
    """Return a time as people say it: 4.2 s, 3 min 05 s, 1 h 02 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest:02d} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02d} min"


def clock(seconds: float) -> str:
    """Return a time as a clock shows it, for narrow lines: 0:07, 3:05, 1:02:00."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def percent(share: float) -> str:
    """Return a share as a percentage with three digits."""
    return f"{100 * share:.3g} %"


def loss(value: float | None) -> str:
    """Return a loss, or a dash where there is none."""
    return "-" if value is None else f"{value:.4f}"


def perplexity(loss_value: float | None) -> str:
    """Return exp(loss), or a dash where there is none."""
    if loss_value is None:
        return "-"
    value = math.exp(min(loss_value, 700.0))
    return f"{value:,.2f}" if value < 1e6 else f"{value:.3g}"
