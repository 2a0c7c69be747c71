"""A gang: several runs in one process, on one base in memory.

Every run has its own folder, rows, schedule, checkpoints and result, as if it trained alone; `train_gang` opens each base
once and lets the runs take turns, an optimiser step each. A member's step depends on nothing but itself (member.py), so
what a gang writes is to the bit what each run alone writes, whoever is beside it, and a run goes on from its own
checkpoint alone or in another gang.

Runs wait while memory does not hold one more adapter with its optimiser. A run that fails ends with its reason; the
others go on.
"""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch

from onebase.adapters.bank import Bank
from onebase.base import memory
from onebase.base.device import use_threads
from onebase.base.sharing import share_weights_
from onebase.config.labels import Labels
from onebase.config.settings import Settings
from onebase.errors import CapacityError, ConfigError, OnebaseError, ResumeError
from onebase.files.gang_folder import GangFolder
from onebase.files.result import Result, read_result
from onebase.files.run_folder import RunFolder
from onebase.train.data import TrainingData, labels_in, load_data
from onebase.train.progress import Progress, Quiet
from onebase.train.run import Run, add_adapter, check_same_settings, job_of, open_base
from onebase.train.stop import Stopped, StopRequest

_BASE = ("model", "revision", "dtype", "device", "quantize", "trust_remote_code")
BYTES_A_PARAMETER = 20  # its weight, its gradient, AdamW's two, a copy of its best or first value; all in fp32


@dataclass(frozen=True)
class Outcome:
    """What came of a member: its result, or why it has none."""

    name: str
    path: Path
    result: Result | None = None
    error: OnebaseError | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the member's place in the gang's result.json."""
        if self.result is None:
            return {"name": self.name, "error": f"{type(self.error).__name__}: {self.error}"}
        own = {k: v for k, v in self.result.as_dict().items() if k != "schema_version"}
        return {"name": self.name, "adapter": f"{self.name}/adapter", **own}


class GangProgress(Protocol):
    """Who watches a gang."""

    def member(self, name: str) -> Progress:
        """Return who watches a member."""

    def ended(self, outcome: Outcome) -> None:
        """A member has finished or failed."""


class Unwatched:
    """Progress of a gang that nobody watches."""

    def member(self, name: str) -> Progress:
        """Return nobody."""
        return Quiet()

    def ended(self, outcome: Outcome) -> None:
        """Do nothing."""


def train_gang(
    members: Mapping[str, Settings],
    out: Path,
    *,
    resume: bool = False,
    progress: GangProgress | None = None,
    stop: StopRequest | None = None,
) -> tuple[Outcome, ...]:
    """Train the adapters that the settings describe into `out`/NAME each, and return what came of every one, in order.

    With `resume` each run goes on from its newest checkpoint, starts if there is none, and stays if it has finished.

    Raises:
        ConfigError: the members cannot be in one process, or the folder is no place for them.
        ResumeError: other members were begun there.
        Stopped: `stop` was asked for; every run that had begun has a checkpoint.
    """
    settings = {name: one.resolved() for name, one in members.items()}
    threads = _one_for_all(settings, "train.threads", {name: one.train.threads for name, one in settings.items()})
    _one_for_all(settings, "train.batch_invariant", {n: one.train.batch_invariant for n, one in settings.items()})
    with GangFolder.open(out, resume=resume) as folder:
        use_threads(threads)
        _keep_plan(folder, settings)
        gang = _Gang(settings, out, resume, progress or Unwatched())
        gang.train(stop or StopRequest())
        outcomes = tuple(gang.outcomes[name] for name in settings)
        folder.write_result([outcome.as_dict() for outcome in outcomes], memory.peak_rss_bytes())
    return outcomes


def _one_for_all(settings: Mapping[str, Settings], setting: str, values: Mapping[str, Any]) -> Any:
    """Return the value that all members have for what a process has one of.

    Raises:
        ConfigError: they differ.
    """
    if not settings:
        raise ConfigError("there is nothing to train: no settings were given.")
    if len(set(values.values())) > 1:
        found = ", ".join(f"{name}: {value}" for name, value in values.items())
        raise ConfigError(
            f"{setting}: runs that train together have one value of it, got {found}. Set it alike in all."
        )
    return next(iter(values.values()))


def _plain(name: str) -> str:
    """Return a run's name as an adapter in a bank may have it: files are called as their users like."""
    return re.sub(r"[^\w.@+-]", "_", name)[:80]


def _keep_plan(folder: GangFolder, settings: Mapping[str, Settings]) -> None:
    """Write down who trains here, or check that it is who was begun."""
    plan = folder.plan
    names = list(settings)
    if plan is not None and plan.get("members") != names:
        raise ResumeError(
            f"{folder.path}: {', '.join(plan.get('members', ()))} were begun there, not {', '.join(names)}. Give the same settings "
            "files in the same order, or choose another --out."
        )
    if plan is None:
        how = "in turns, a step each"
        folder.write_plan({"members": names, "share": how, "threads": torch.get_num_threads()})


@dataclass
class _Shared:
    """What members have in common: banks by base and labels, and rows by how they are read."""

    banks: dict[str, Bank] = field(default_factory=dict)
    labels: dict[str, Labels | None] = field(default_factory=dict)
    rows: dict[tuple[int, str, int], TrainingData] = field(default_factory=dict)

    def bank_for(self, settings: Settings) -> Bank:
        """Return the bank on the base that settings name, with a head for their labels; opened at most once."""
        read = f"{settings.task} {settings.data.model_dump_json()}"
        if read not in self.labels:
            self.labels[read] = labels_in(settings.data, settings.task)
        labels = self.labels[read]
        model = repr([getattr(settings, name) for name in _BASE])
        key = f"{model} {labels!r}"
        if key not in self.banks:
            base = open_base(settings, labels)
            for other, bank in self.banks.items():
                if other.startswith(f"{model} "):
                    share_weights_(base, bank.base)
                    break
            self.banks[key] = Bank(base)
        return self.banks[key]

    def data_for(self, settings: Settings, bank: Bank, virtual_tokens: int) -> TrainingData:
        """Return the rows as examples; read and tokenised at most once."""
        how = settings.model_dump_json(include={"data", "task", "eval"})
        key = (id(bank), how, virtual_tokens)
        if key not in self.rows:
            self.rows[key] = load_data(settings.data, settings.task, bank.base, virtual_tokens, settings.eval.slices)
        return self.rows[key]


class _Gang:
    def __init__(self, settings: Mapping[str, Settings], out: Path, resume: bool, progress: GangProgress) -> None:
        self.settings, self.out, self.resume, self.progress = settings, out, resume, progress
        self.shared = _Shared()
        self.waiting = deque(settings)
        self.running: dict[str, Run] = {}
        self.outcomes: dict[str, Outcome] = {}

    def train(self, stop: StopRequest) -> None:
        """Train all members to their ends."""
        try:
            with stop.listening():
                while self.waiting or self.running:
                    self._open_what_fits(stop)
                    self._heed(stop)
                    for name, run in list(self.running.items()):
                        self._take_turn(name, run)
                        self._heed(stop)
        finally:
            for run in self.running.values():
                run.folder.close()

    def _open_what_fits(self, stop: StopRequest) -> None:
        """Open members for as long as memory holds one more."""
        while self.waiting and stop.signal_number is None:
            name = self.waiting[0]
            try:
                run = self._opened(name)
            except CapacityError as error:
                if self.running:
                    return  # it waits until another one ends
                self._end(Outcome(name, self.out / name, error=error))
            except OnebaseError as error:
                self._end(Outcome(name, self.out / name, error=error))
            else:
                if run is not None:
                    self.running[name] = run
            self.waiting.popleft()

    def _opened(self, name: str) -> Run | None:
        """Return a member that is ready for its next step; None if it has finished already.

        Raises:
            CapacityError: memory does not hold it.
        """
        settings, path, watcher = self.settings[name], self.out / name, self.progress.member(name)
        folder = RunFolder.open_for_resume(path) if self.resume else RunFolder.create(path)
        with ExitStack() as undo:
            undo.callback(folder.close)
            if self.resume:
                check_same_settings(folder, settings)
                done = read_result(path)
                if done is not None:
                    self._end(Outcome(name, path, result=done))
                    return None
            checkpoint = folder.load_checkpoint() if self.resume else None
            bank = self.shared.bank_for(settings)
            adapter = add_adapter(bank, settings, f"{list(self.settings).index(name)}-{_plain(name)}")
            undo.callback(bank.remove, adapter.name)
            needed = BYTES_A_PARAMETER * adapter.parameter_count
            if needed > memory.available_bytes():
                raise CapacityError(
                    f"the adapter of {name} with its gradients and optimiser state needs {needed / 1e9:.1f} GB, "
                    f"{memory.available_bytes() / 1e9:.1f} GB are free. Set a smaller adapter.r, or end other programs."
                )
            data = self.shared.data_for(settings, bank, adapter.virtual_tokens)
            watcher.loaded(data)
            run = Run(settings, folder, job_of(settings, bank, adapter, data), data, checkpoint, watcher)
            undo.callback(run.forget_if_nothing_came_of_it)
            with run.learning():
                run.loop.begin()
            undo.pop_all()
        return run

    def _take_turn(self, name: str, run: Run) -> None:
        """Do a member's next step, or end it."""
        try:
            with run.learning():
                if not run.loop.is_over():
                    run.loop.do_step()
                    run.member.optimizer.zero_grad(set_to_none=True)  # no gradient is kept while others have their turn
                    return
                result = run.finish()
        except OnebaseError as error:
            self._close(name, run, Outcome(name, run.folder.path, error=error))
        else:
            self._close(name, run, Outcome(name, run.folder.path, result=result))

    def _close(self, name: str, run: Run, outcome: Outcome) -> None:
        del self.running[name]
        run.forget_if_nothing_came_of_it()
        run.folder.close()
        run.job.bank.remove(run.job.adapter.name)
        self._end(outcome)

    def _end(self, outcome: Outcome) -> None:
        self.outcomes[outcome.name] = outcome
        self.progress.ended(outcome)

    def _heed(self, stop: StopRequest) -> None:
        """Write every running member's checkpoint and raise, if somebody asked to stop and something is left to do."""
        if stop.signal_number is None or not (self.waiting or self.running):
            return
        for run in self.running.values():
            run.loop.save()
        done = sum(outcome.result is not None for outcome in self.outcomes.values())
        raise Stopped(
            f"stopped: {done} of {len(self.settings)} runs have finished, {len(self.running)} have a checkpoint in {self.out}.",
            stop.signal_number,
        )
