"""A few steps of a training done twice, once in one go and once stopped at a checkpoint and resumed: the same bytes?

Both begin with a fresh adapter of the settings given, on the base at hand, beside whatever else is in the bank; nothing
of it stays. Cost: two times four steps of four rows, and what the adapter and its optimiser take in memory.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from onebase.adapters.bank import Bank
from onebase.config.methods import AdapterSettings
from onebase.config.settings import TrainSettings
from onebase.data.examples import Examples
from onebase.files.atomic import scratch_folder
from onebase.files.checkpoint import Checkpoint
from onebase.files.run_folder import RunFolder
from onebase.measure.evaluate import EVALUATION_TOKENS
from onebase.train import job as jobs
from onebase.train.progress import Quiet, StepRecord
from onebase.train.stop import Stopped, StopRequest

STEPS, STOPPED_AFTER = 4, 2
_ROWS_OF_A_STEP = 4
_NAME = "replayed"
_SIGNAL = 15


def replay(
    bank: Bank, adapter: AdapterSettings, seed: int, examples: Examples, train: TrainSettings
) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor]]:
    """Return an adapter's tensors after a few steps in one go, and after as many with a stop and a resumption."""
    short = train.model_copy(
        update={
            "steps": STEPS,
            "epochs": None,
            "batch_size": min(train.batch_size, _ROWS_OF_A_STEP),
            "warmup_steps": None,
            "warmup_ratio": 0.0,
            "micro_batch_tokens": EVALUATION_TOKENS,
            "save_every": None,
            "eval_every": None,
            "early_stopping_patience": None,
            "keep_best": False,
        }
    )
    attempt = _Attempt(bank, adapter, seed, examples, short)
    whole = attempt.tensors(None, None, StopRequest())
    with (
        scratch_folder("verify") as place,
        RunFolder.create(place / "run") as folder,
    ):
        try:
            attempt.tensors(folder, None, StopRequest(), stop_after=STOPPED_AFTER)
        except Stopped as stopped:
            if stopped.signal_number != _SIGNAL or not folder.checkpoints:  # somebody else asked
                raise
        return whole, attempt.tensors(folder, folder.load_checkpoint(), StopRequest())


class _Attempt:
    """One fresh adapter's training, as often as it is asked for."""

    def __init__(
        self, bank: Bank, adapter: AdapterSettings, seed: int, examples: Examples, train: TrainSettings
    ) -> None:
        self.bank, self.settings, self.seed, self.examples, self.train = bank, adapter, seed, examples, train

    def tensors(
        self,
        folder: RunFolder | None,
        checkpoint: Checkpoint | None,
        stop: StopRequest,
        *,
        stop_after: int | None = None,
    ) -> dict[str, Tensor]:
        """Return the file's tensors at the end.

        Raises:
            Stopped: after `stop_after` steps, with a checkpoint in the folder.
        """
        adapter = self.bank.add(_NAME, self.settings, seed=self.seed)
        try:
            job = jobs.Job(self.bank, adapter, self.examples, None, self.train)
            progress = _StopAfter(stop_after, stop)
            member = jobs.start(job, folder, checkpoint, progress)
            jobs.train_member(job, member, folder, progress, stop)
            return {name: tensor.detach().cpu().clone() for name, tensor in adapter.file_tensors.items()}
        finally:
            self.bank.remove(_NAME)


class _StopAfter(Quiet):
    """A progress that asks the training to stop after a step."""

    def __init__(self, step: int | None, stop: StopRequest) -> None:
        self._step, self._stop = step, stop

    def stepped(self, record: StepRecord) -> None:
        """Ask, if this is the step."""
        if record.step == self._step:
            self._stop.signal_number = _SIGNAL


def differing(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """Return the names whose tensors are not the same bytes, or that only one has."""
    names = [*one, *(name for name in other if name not in one)]
    return [n for n in names if n not in one or n not in other or not same_bytes(one[n], other[n])]


def same_bytes(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors have one shape, one format and one content, to the bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    first, second = (tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in (one, other))
    return torch.equal(first, second)


def largest_distance(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    """Return the largest difference of two sets of tensors, relative to the norm of each; infinite where names differ."""
    if set(one) != set(other) or any(one[name].shape != other[name].shape for name in one):
        return float("inf")
    found = [_distance(one[name], other[name]) for name in one]
    return float(torch.tensor([0.0, *found], dtype=torch.float64).max())


def _distance(one: Tensor, other: Tensor) -> float:
    wide = one.double()
    return float((other.double() - wide).norm() / wide.norm().clamp_min(1e-12))
