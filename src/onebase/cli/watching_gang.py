"""Several trainings as their user sees them: a line for each on a terminal, and at the end a table of what came of them.

Elsewhere a line is printed when a run begins and when it ends, and every 30 seconds one of all. Nothing here changes
what is learned.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from onebase.cli import terminal
from onebase.cli.summary import describe_adapter
from onebase.cli.watching import OnScreen, outlives_its_terminal

if TYPE_CHECKING:
    from onebase.cli.scores import Judged
    from onebase.config.settings import Settings
    from onebase.train.data import TrainingData
    from onebase.train.gang import Outcome
    from onebase.train.progress import Plan, StepRecord

_LINE_SECONDS = 30.0
_REFRESH_SECONDS = 0.5
_HEAD = ("run", "step", "loss", "valid loss", "s/step", "left")


@dataclass
class _State:
    steps: int = 0
    step: int = 0
    loss: float | None = None
    valid_loss: float | None = None
    seconds: float | None = None


class WatchingGang(OnScreen):
    """The `GangProgress` that `train_gang` reports to. Use it in a `with` block, so that the table goes."""

    def __init__(self, settings: Mapping[str, "Settings"], out: Path) -> None:
        super().__init__()
        self._settings, self._out = settings, out
        self._states: dict[str, _State] = {}
        self._shown_at = time.monotonic()
        self._ended = 0

    def member(self, name: str) -> "_Member":
        """Return who watches a member."""
        return _Member(self, name)

    @outlives_its_terminal
    def ended(self, outcome: "Outcome") -> None:
        """Say what came of a member."""
        self._ended += 1
        self._states.pop(outcome.name, None)
        if outcome.error is not None:
            terminal.warn(f"{outcome.name}: {type(outcome.error).__name__}: {outcome.error}")
        else:
            self._console.print(f"{outcome.name}: finished ({self._ended} of {len(self._settings)})", soft_wrap=True)

    @outlives_its_terminal
    def begun(self, name: str, plan: "Plan") -> None:
        """Take a member in."""
        self._states[name] = _State(plan.steps, plan.first_step)
        adapter = describe_adapter(self._settings[name].adapter)
        steps = f"{plan.steps:,} steps" + f", {plan.first_step:,} of them done before" * (plan.first_step > 0)
        rows = f"{terminal.counted(plan.batch_size, 'row')} each of {plan.examples:,}"
        self._console.print(f"{name}: {adapter}; {steps}, {rows}; learning rate {plan.learning_rate:g}", soft_wrap=True)
        for text in plan.warnings:
            self.say(f"{name}: {text}")

    @outlives_its_terminal
    def stepped(self, name: str, record: "StepRecord") -> None:
        """Take a step into the account, and show all members where that is due."""
        state = self._states[name]
        state.step, state.loss, state.seconds = record.step, record.loss, record.seconds
        now = time.monotonic()
        if self._live is not None and now - self._shown_at >= _REFRESH_SECONDS:
            self._live.update(terminal.table(_HEAD, self._rows(self._console.height - 3)), refresh=True)
            self._shown_at = now
        elif self._live is None and now - self._shown_at >= _LINE_SECONDS:
            steps = sum(state.step for state in self._states.values())
            whole = sum(state.steps for state in self._states.values())
            self._console.print(
                f"{self._ended} of {len(self._settings)} runs finished; step {steps:,}/{whole:,} of {len(self._states)} others"
            )
            self._shown_at = now

    def evaluated(self, name: str, loss: float) -> None:
        """Take an evaluation into the account."""
        if name in self._states:
            self._states[name].valid_loss = loss

    def say(self, text: str) -> None:
        """Say something that the user should know."""
        terminal.say(text)

    def _rows(self, most: int) -> Iterator[Sequence[str]]:
        """Yield a line a member, as many as the terminal has room for."""
        for name, state in list(self._states.items())[: max(most, 1)]:
            left = (
                ""
                if state.seconds is None
                else terminal.clock(state.seconds * (state.steps - state.step) * len(self._states))
            )
            seconds = "" if state.seconds is None else f"{state.seconds:.2f}"
            losses = ("" if loss is None else f"{loss:.4f}" for loss in (state.loss, state.valid_loss))
            yield name, f"{state.step:,}/{state.steps:,}", *losses, seconds, left

    def show(self, outcomes: Sequence["Outcome"]) -> None:
        """Print what came of all members."""
        head = ("run", "steps", "train loss", "valid loss before", "valid loss", "parameters", "seconds")
        self._console.print(terminal.table(head, map(_line, outcomes), less=("parameters", "valid loss before")))
        self._console.print(f"adapters: {self._out}/NAME/adapter", soft_wrap=True)


def _line(outcome: "Outcome") -> Sequence[str]:
    result = outcome.result
    if result is None:
        return (outcome.name, "failed", "", "", "", "", "")
    losses = (result.train_loss, result.valid_loss_before, result.valid_loss)
    return (
        outcome.name, f"{result.steps:,}", *("" if loss is None else f"{loss:.4f}" for loss in losses),
        f"{result.trainable_parameters:,}", f"{result.seconds:.1f}",
    )  # fmt: skip


class _Member:
    """What one run says, told to those who watch all."""

    def __init__(self, gang: WatchingGang, name: str) -> None:
        self._gang, self._name = gang, name

    def loaded(self, data: "TrainingData") -> None:
        """Do nothing: runs share their rows."""

    def started(self, plan: "Plan") -> None:
        """Pass it on."""
        self._gang.begun(self._name, plan)

    def stepped(self, record: "StepRecord") -> None:
        """Pass it on."""
        self._gang.stepped(self._name, record)

    def evaluated(self, step: int, scores: "Judged") -> None:
        """Pass it on."""
        self._gang.evaluated(self._name, scores.loss)

    def saved(self, path: Path) -> None:
        """Do nothing: the table at the end says where adapters are."""

    def note(self, text: str) -> None:
        """Pass it on."""
        self._gang.say(f"{self._name}: {text}")
