"""A training as its user sees it: what is about to happen, steps as they pass, and what came of it.

On a terminal one line moves; elsewhere a line is printed every tenth of the run, or every 30 seconds, whichever is
first. Nothing here changes what is learned.
"""

import errno
import functools
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Concatenate, ParamSpec, Self, TypeVar

from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from onebase.cli import terminal
from onebase.cli.rows_report import show_rows
from onebase.cli.scores import brief
from onebase.cli.summary import show_plan, show_result

if TYPE_CHECKING:
    from onebase.cli.scores import Judged
    from onebase.config.settings import Settings
    from onebase.files.result import Result
    from onebase.train.data import TrainingData
    from onebase.train.progress import Plan, StepRecord

_LINES = 10
_LINE_SECONDS = 30.0
_WINDOW_STEPS = 20
_SHORTEST_BAR, _LONGEST_BAR = 8, 60

P = ParamSpec("P")
W = TypeVar("W")
Shown = Callable[Concatenate[W, P], None]


def outlives_its_terminal(show: Shown[W, P]) -> Shown[W, P]:
    """Return a method that shows something, or nothing where nobody reads it any more: the training goes on.

    A closed terminal is EIO, a full disk behind a redirection ENOSPC; rich answers a closed pipe with SystemExit.
    """

    @functools.wraps(show)
    def shown(watching: W, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            show(watching, *args, **kwargs)
        except SystemExit:
            terminal.let_go_of_closed()
        except OSError as error:
            if error.errno not in (errno.EIO, errno.EPIPE, errno.ENOSPC):
                raise
            terminal.let_go_of_closed()

    return shown


class OnScreen:
    """What moves on a terminal, and is gone after the `with` block; elsewhere nothing moves."""

    def __init__(self) -> None:
        self._console = terminal.stdout()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            # No thread refreshes it: the training has the processor for itself.
            self._live = Live(console=self._console, auto_refresh=False, transient=True)
            self._live.start()
        self._say_waiting("opening the model, reading the rows")
        return self

    @outlives_its_terminal
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _say_waiting(self, what: str) -> None:
        """Show what is being waited for, where a line can be taken back."""
        if self._live is not None:
            self._live.update(Text(f"{what} ...", style="dim"), refresh=True)


class Watching(OnScreen):
    """Shows a training; the `Progress` that `train_run` reports to. Use it in a `with` block, so that the line goes."""

    def __init__(self, settings: "Settings", out: Path) -> None:
        super().__init__()
        self._settings, self._out = settings, out
        self._plan: Plan | None = None
        self._step = 0
        self._recent: deque[StepRecord] = deque(maxlen=_WINDOW_STEPS)
        self._unprinted: list[StepRecord] = []
        self._printed_at = time.monotonic()
        self._held: list[str] = []
        self._scores: dict[int, Judged] = {}
        self._numbers_width = 0
        self.last_saved: Path | None = None

    @outlives_its_terminal
    def loaded(self, data: "TrainingData") -> None:
        """Show what became of the rows."""
        show_rows(self._console, data)
        self._console.print()
        self._say_waiting("trying the largest micro-batch")

    @outlives_its_terminal
    def started(self, plan: "Plan") -> None:
        """Show the plan, and begin the line that moves."""
        self._plan, self._step = plan, plan.first_step
        show_plan(self._console, plan, self._settings)
        self._printed_at = time.monotonic()
        self._say_waiting("evaluating the base" if plan.valid_examples and not plan.first_step else "the first step")

    @outlives_its_terminal
    def stepped(self, record: "StepRecord") -> None:
        """Take a step into the account, and show it where that is due."""
        plan = self._known_plan()
        self._step = record.step
        self._recent.append(record)
        self._unprinted.append(record)
        if self._live is not None:
            self._live.update(self._moving_line(record), refresh=True)
        else:
            due = record.step % math.ceil(plan.steps / _LINES) == 0 or record.step == plan.steps
            if due or time.monotonic() - self._printed_at >= _LINE_SECONDS:
                self._print("  ".join([self._place(record.step), *self._numbers(self._unprinted)]))
                self._unprinted.clear()
                self._printed_at = time.monotonic()
        while self._held:
            self._print(self._held.pop(0))

    @outlives_its_terminal
    def evaluated(self, step: int, scores: "Judged") -> None:
        """Show what an evaluation found, after the step that it followed."""
        self._scores[step] = scores
        line = f"{self._place(step)}  valid {brief(scores)}"
        if step > self._step:
            self._held.append(line)
        else:
            self._print(line)

    @outlives_its_terminal
    def saved(self, path: Path) -> None:
        """Say where a checkpoint is, and remember it; the adapter has its place in the result."""
        if path.parent.name == "checkpoints":
            self.last_saved = path
            self._print(f"{self._place(self._step)}  checkpoint {path}")

    @outlives_its_terminal
    def note(self, text: str) -> None:
        """Say something that the user should know."""
        terminal.say(text)

    def show_result(self, result: "Result") -> None:
        """Show what came of the run, and what to do next."""
        show_result(self._console, result, self._scores, self._out, self._settings.task)

    def _known_plan(self) -> "Plan":
        assert self._plan is not None, "a training is started before anything else happens"
        return self._plan

    def _print(self, line: str) -> None:
        self._console.print(line, soft_wrap=True)

    def _place(self, step: int) -> str:
        steps = f"{self._known_plan().steps:,}"
        return f"step {step:>{len(steps)},}/{steps}"

    def _numbers(self, records: Sequence["StepRecord"]) -> list[str]:
        """Return loss, learning rate, tokens/s, memory and time left, the first and third over these steps."""
        last = records[-1]
        labels = sum(record.labelled_tokens for record in records)
        loss = sum(record.loss * record.labelled_tokens for record in records) / labels
        seconds = sum(record.seconds for record in records)
        return [
            f"loss {loss:.4f}",
            f"lr {last.learning_rate:.2e}",
            f"{sum(record.tokens for record in records) / seconds:,.0f} tok/s",
            terminal.size(self._memory_bytes()),
            f"{terminal.clock(self._seconds_left())} left",
        ]

    def _seconds_left(self) -> float:
        """Return what the steps left will take at the pace of the latest ones; evaluations come on top."""
        pace = sum(record.seconds for record in self._recent) / len(self._recent)
        return pace * (self._known_plan().steps - self._step)

    def _memory_bytes(self) -> int:
        """Return the most memory so far: the device's, or the process's where it computes on the CPU."""
        from onebase.base import memory

        return memory.peak_device_bytes(self._known_plan().device) or memory.peak_rss_bytes()

    def _moving_line(self, record: "StepRecord") -> Table:
        """Return the line; the room for the numbers only grows, so that the bar does not jump when they get shorter."""
        words = "  ".join(self._numbers(self._recent))
        self._numbers_width = max(self._numbers_width, len(words))
        place, numbers = Text(self._place(record.step)), Text(words.ljust(self._numbers_width))
        room = self._console.width - len(place) - len(numbers) - 4
        line = Table.grid(padding=(0, 2, 0, 0))
        if room < _SHORTEST_BAR:
            line.add_row(place, numbers)
        else:
            bar = ProgressBar(total=self._known_plan().steps, completed=record.step, width=min(room, _LONGEST_BAR))
            line.add_row(place, bar, numbers)
        return line
