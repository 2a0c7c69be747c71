"""The loop: steps, evaluations, checkpoints and stopping, for one member; everything exact is the member's own.

The loop reads clocks, writes files and talks to whoever watches; none of it changes what is learned.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from typing import Any, NoReturn

from onebase.data.examples import Examples
from onebase.errors import TrainingError
from onebase.files.run_folder import RunFolder
from onebase.measure.evaluate import Scores
from onebase.measure.judge import TaskScores, score
from onebase.train import checks
from onebase.train.member import Member
from onebase.train.progress import Progress
from onebase.train.stop import Stopped, StopRequest

CHECKPOINT_SECONDS = 300.0
_COUNTS = ("examples", "tokens", "labelled_tokens")


class Loop:
    """Runs a member to its end. `folder` None: nothing is written; `valid` None: nothing is evaluated."""

    def __init__(
        self,
        member: Member,
        *,
        valid: Examples | None,
        folder: RunFolder | None,
        state: Mapping[str, Any],
        progress: Progress,
        evaluation_tokens: int,
    ) -> None:
        self.member, self.valid, self.folder, self.progress = member, valid, folder, progress
        self.state = state
        self.evaluation_tokens = evaluation_tokens
        self._saved_at_step, self._saved_at_time = member.books.step, time.monotonic()

    def run(self, stop: StopRequest) -> None:
        """Train until the steps are done, patience is, or somebody asks to stop.

        Raises:
            Stopped: asked to stop; a checkpoint holds what was learned.
            TrainingError: a step failed, and a checkpoint holds the steps before it; or what was learned is no good.
        """
        self.begin()
        while not self.is_over():
            if stop.signal_number is not None:
                self.stop(stop.signal_number)
            self.do_step()

    def begin(self) -> None:
        """Evaluate what a run that has done no step begins with."""
        books = self.member.books
        if books.step == 0 and books.valid_loss_before is None:
            scores = self._evaluate()
            if scores is not None:
                books.valid_loss_before, books.scores_before = scores.loss, _beside_loss(scores)

    def is_over(self) -> bool:
        """Return whether nothing is left to do; between two steps is the place to notice what does not move.

        Raises:
            TrainingError: a tensor has not moved.
        """
        self.member.check_moved()
        return self.member.finished or self._out_of_patience()

    def do_step(self) -> None:
        """Do one step and all that is due after it.

        Raises:
            TrainingError: the step failed, and a checkpoint holds the steps before it; or what was learned is no good.
        """
        member = self.member
        try:
            record = member.run_step()
        except TrainingError as error:
            raise TrainingError(f"{error}{self._save_after_failure()}") from error
        values = {k: v for k, v in vars(record).items() if k != "step"}
        if (self._is_due(member.settings.eval_every) or member.finished) and self.valid is not None:
            scores = self._evaluate()
            assert scores is not None
            values |= {f"valid_{name}": value for name, value in scores.as_dict().items() if name not in _COUNTS}
            member.note_validation(scores.loss, _beside_loss(scores))
        if self.folder is not None:
            self.folder.append_metrics(record.step, values)
        self.progress.stepped(record)
        if self._checkpoint_is_due():
            self.save()

    def _evaluate(self) -> Scores | TaskScores | None:
        """Return the scores of the validation rows.

        Raises:
            TrainingError: it is not finite.
        """
        if self.valid is None:
            return None
        member = self.member
        scores = score(
            member.bank,
            member.adapter.name,
            self.valid,
            batch_tokens=self.evaluation_tokens,
            objective=member.settings.loss,
        )
        checks.check_validation(scores.loss, self.member.books.step)
        self.progress.evaluated(self.member.books.step, scores)
        return scores

    def _is_due(self, every: int | None) -> bool:
        return every is not None and self.member.books.step % every == 0

    def _out_of_patience(self) -> bool:
        patience = self.member.settings.early_stopping_patience
        return patience is not None and self.member.books.evaluations_without_gain >= patience

    def _checkpoint_is_due(self) -> bool:
        if self.folder is None or self.member.finished:
            return False
        every = self.member.settings.save_every
        if every is not None:
            return self._is_due(every)
        return time.monotonic() - self._saved_at_time > CHECKPOINT_SECONDS

    def save(self) -> None:
        """Write a checkpoint of the steps done so far, unless there is one already."""
        assert self.folder is not None
        step = self.member.books.step
        if self.folder.checkpoints and self._saved_at_step == step:
            return
        tensors, books = self.member.state()
        path = self.folder.save_checkpoint(
            step,
            tensors,
            {**self.state, "books": books},
            best=self.member.best,
            keep=self.member.settings.keep_checkpoints,
        )
        self._saved_at_step, self._saved_at_time = step, time.monotonic()
        self.progress.saved(path)

    def stop(self, signal_number: int) -> NoReturn:
        """Write a checkpoint and raise.

        Raises:
            Stopped: always; a checkpoint holds what was learned.
        """
        if self.folder is None:
            raise KeyboardInterrupt
        self.save()
        raise Stopped(
            f"stopped after step {self.member.books.step} of {self.member.schedule.total_steps}; the checkpoint is in "
            f"{self.folder.checkpoints[-1]}.",
            signal_number,
        )

    def _save_after_failure(self) -> str:
        if self.folder is None or self.member.books.step == 0:
            return ""
        self.save()
        return f" The {self.member.books.step} steps before it are kept in {self.folder.checkpoints[-1]}."


def _beside_loss(scores: Scores | TaskScores) -> dict[str, float]:
    """Return the scores beside the loss that are finite numbers."""
    named = scores.as_dict().items()
    return {name: value for name, value in named if name not in ("loss", *_COUNTS) and math.isfinite(value)}


def restore_best_(member: Member) -> None:
    """Put the tensors of the lowest validation loss into the adapter, if the run kept them."""
    if member.best is not None:
        member.adapter.load_state_(member.best)
