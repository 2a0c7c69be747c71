"""The folder of one run, and the list of runs in a folder.

    RUN/
        config.yaml       the resolved settings, runnable again
        metrics.jsonl     a record a step, each step once
        checkpoints/      step-00000100/ ...
        adapter/          the adapter in PEFT's format
        result.json       written last: its presence says that the run is finished

One process trains in a folder at a time, held by a lock that the system lets go of when the process ends, however it
ends. No torch until tensors are saved or loaded.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from filelock import FileLock, Timeout

from onebase.errors import ConfigError, FileFormatError
from onebase.files.atomic import clean, is_leftover, reporting, write_file
from onebase.files.checkpoint import list_checkpoints, load_checkpoint, prune_checkpoints, save_checkpoint, step_of
from onebase.files.metrics import METRICS_NAME, Metrics, read_metrics
from onebase.files.result import RESULT_NAME, Result, read_result, write_result

if TYPE_CHECKING:
    from torch import Tensor

    from onebase.files.checkpoint import Checkpoint

CONFIG_NAME = "config.yaml"
CHECKPOINTS_NAME = "checkpoints"
ADAPTER_NAME = "adapter"
_LOCK_NAME = ".lock"
_HOLDER_NAME = ".lock.json"
_LOCK_SECONDS = 1.0  # longer than a look by `list_runs`
State = Literal["finished", "running", "stopped", "failed"]


class RunFolder:
    """A run's folder, locked for this process until `close`; use it in a `with` block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.metrics = Metrics(path / METRICS_NAME)
        self._lock = FileLock(path / _LOCK_NAME, timeout=_LOCK_SECONDS, thread_local=False)

    @classmethod
    def create(cls, path: Path) -> RunFolder:
        """Return the folder of a new run; `path` must not exist yet, or be empty.

        Raises:
            ConfigError: there is something already, or the place cannot be written to.
            CapacityError: the disk is full.
        """
        if path.exists() and (not path.is_dir() or _is_used(path)):
            raise ConfigError(_occupied(path))
        run = cls(path)
        run._acquire()
        clean(path)
        run.metrics.rewind(None)
        return run

    @classmethod
    def open_for_resume(cls, path: Path) -> RunFolder:
        """Return the folder of a run to go on with; one that does not exist yet is made, and the run starts.

        What crashed writes left behind is put right. Nothing of the run itself changes before `rewind`.

        Raises:
            ConfigError: `path` holds something else, another process is training there, it cannot be written to.
        """
        if path.exists() and (not path.is_dir() or (_is_used(path) and not _is_run(path))):
            raise ConfigError(f"{path}: is no run's folder: it has no {CONFIG_NAME}. Choose another --out.")
        run = cls(path)
        run._acquire()
        clean(path)
        clean(path / CHECKPOINTS_NAME)
        return run

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Let other processes into the folder."""
        if self._lock.is_locked:
            (self.path / _HOLDER_NAME).unlink(missing_ok=True)
            self._lock.release()

    @property
    def config_path(self) -> Path:
        """Where the resolved settings are."""
        return self.path / CONFIG_NAME

    @property
    def adapter_path(self) -> Path:
        """Where the adapter goes."""
        return self.path / ADAPTER_NAME

    @property
    def finished(self) -> bool:
        """Whether the run has its result."""
        return (self.path / RESULT_NAME).exists()

    @property
    def checkpoints(self) -> list[Path]:
        """The folders of the checkpoints, oldest first."""
        return list_checkpoints(self.path / CHECKPOINTS_NAME)

    def write_config(self, text: str) -> None:
        """Write the resolved settings."""
        write_file(self.config_path, text, writing="the settings")

    def config_text(self) -> str | None:
        """Return the settings the run was started with, None if it stopped before they were written."""
        return self.config_path.read_text(encoding="utf-8") if self.config_path.exists() else None

    def load_checkpoint(self) -> Checkpoint | None:
        """Return the newest checkpoint, None if there is none: then the run starts.

        Raises:
            FileFormatError: it is damaged; the message says how to go on from an earlier one.
        """
        found = self.checkpoints
        return load_checkpoint(found[-1]) if found else None

    def rewind(self, step: int | None) -> None:
        """Cut the metrics back to the checkpoint's step, or to nothing (None) for a run that starts again."""
        self.metrics.rewind(step)

    def append_metrics(self, step: int, values: Mapping[str, Any]) -> None:
        """Write the record of a step.

        Raises:
            CapacityError, ConfigError: as for every write; the message names the checkpoint to go on from.
        """
        self.metrics.append(step, values, kept=self._safe())

    def save_checkpoint(
        self,
        step: int,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        best: Mapping[str, Tensor] | None = None,
        keep: int = 2,
    ) -> Path:
        """Write a checkpoint after the metrics up to it, delete all but the newest `keep`, and return its folder."""
        self.metrics.sync()
        path = save_checkpoint(self.path / CHECKPOINTS_NAME, step, tensors, state, best=best)
        prune_checkpoints(self.path / CHECKPOINTS_NAME, keep)
        return path

    def finish(self, result: Result, *, keep: int = 2) -> None:
        """Write the result, which ends the run; adapter/ must be there. All but `keep` checkpoints are deleted."""
        self.metrics.sync()
        prune_checkpoints(self.path / CHECKPOINTS_NAME, keep)
        write_result(self.path, result)

    def _safe(self) -> str:
        found = self.checkpoints
        return f"The run can go on from {found[-1]} (--resume)." if found else "There is no checkpoint yet."

    def _acquire(self) -> None:
        """Take the lock and say who has it."""
        with reporting(self.path, "the run's folder"):
            self.path.mkdir(parents=True, exist_ok=True)
            try:
                self._lock.acquire()
            except Timeout as error:
                raise ConfigError(
                    f"{self.path}: {_holder(self.path)} is training there. Wait until it ends, or choose another --out."
                ) from error
            holder = {"pid": os.getpid(), "host": platform.node()}
            (self.path / _HOLDER_NAME).write_text(json.dumps(holder) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class RunSummary:
    """A run as `onebase runs` shows it. `step` is the last one recorded, `note` says what is wrong with its files."""

    name: str
    path: Path
    state: State
    step: int | None
    checkpoint_step: int | None
    last_metrics: Mapping[str, Any]
    result: Result | None
    note: str = ""
    method: str | None = None

    @property
    def state_text(self) -> str:
        """The state in words: finished, running, stopped at step 100, failed before its first checkpoint."""
        if self.state == "stopped":
            return f"stopped at step {self.checkpoint_step}"
        return "failed before its first checkpoint" if self.state == "failed" else self.state


def list_runs(folder: Path) -> list[RunSummary]:
    """Return the runs in a folder by name, or the one run that the folder itself is. Nothing is changed.

    Raises:
        ConfigError: there is no such folder.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no such folder. Give the folder that holds your runs.")
    if _is_run(folder):
        return [summarise(folder)]
    return [summarise(path) for path in sorted(folder.iterdir()) if path.is_dir() and _is_run(path)]


def summarise(path: Path) -> RunSummary:
    """Return what the files of one run say of it."""
    checkpoints = list_checkpoints(path / CHECKPOINTS_NAME)
    notes: list[str] = []
    result: Result | None = None
    records: list[dict[str, Any]] = []
    try:
        result = read_result(path)
    except (OSError, ValueError) as error:  # a FileFormatError is a ValueError
        notes.append(_told(error, path / RESULT_NAME))
    try:
        records = read_metrics(path / METRICS_NAME)
    except (OSError, ValueError) as error:
        notes.append(_told(error, path / METRICS_NAME))
    state: State = "stopped" if checkpoints else "failed"
    if result is not None:
        state = "finished"
    elif _is_locked(path):
        state = "running"
    return RunSummary(
        name=path.resolve().name,
        path=path,
        state=state,
        step=records[-1]["step"] if records else None,
        checkpoint_step=step_of(checkpoints[-1]) if checkpoints else None,
        last_metrics=records[-1] if records else {},
        result=result,
        note="\n".join(notes),
        method=_method_of(path / CONFIG_NAME),
    )


def _method_of(path: Path) -> str | None:
    """Return the adapter's method as a run's settings say it, None where they cannot be read."""
    try:
        method = yaml.safe_load(path.read_text(encoding="utf-8"))["adapter"]["method"]
    except (OSError, ValueError, TypeError, KeyError, yaml.YAMLError):
        return None
    return method if isinstance(method, str) else None


def _told(error: Exception, path: Path) -> str:
    """Return what is wrong with a file: our own message, or the system's with the file's name."""
    return str(error) if isinstance(error, FileFormatError) else f"{path}: cannot be read: {error}"


def run_bytes(parameter_bytes: int, optimizer_bytes: int, *, keep: int, keep_best: bool) -> int:
    """Return about how much disk a run needs: the adapter, `keep` checkpoints and the one being written."""
    checkpoint = parameter_bytes + optimizer_bytes + (parameter_bytes if keep_best else 0)
    return parameter_bytes + (keep + 1) * checkpoint + 2**20


def _is_run(path: Path) -> bool:
    return (path / CONFIG_NAME).exists()


def _is_used(path: Path) -> bool:
    """Return whether a folder holds more than the traces of a start that failed."""
    traces = {_LOCK_NAME, _HOLDER_NAME}
    for entry in path.iterdir():
        empty_metrics = entry.name == METRICS_NAME and entry.stat().st_size == 0
        if entry.name not in traces and not empty_metrics and not is_leftover(entry):
            return True
    return False


def _is_locked(path: Path) -> bool:
    """Return whether a process is training in a folder, without making a file there."""
    if not (path / _LOCK_NAME).exists():
        return False
    lock = FileLock(path / _LOCK_NAME, timeout=0, thread_local=False)
    try:
        with lock:
            return False
    except Timeout:
        return True
    except OSError:  # a folder that cannot be written to: nobody trains there
        return False


def _holder(path: Path) -> str:
    """Return the words for the process that has the lock."""
    try:
        holder = json.loads((path / _HOLDER_NAME).read_text(encoding="utf-8"))
        return f"process {holder['pid']} on {holder['host']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _occupied(path: Path) -> str:
    """Return why a new run cannot go to `path`."""
    if not path.is_dir():
        return f"{path}: is a file. Choose another --out."
    if not _is_run(path):
        return f"{path}: is there already and not empty. Choose another --out."
    return (
        f"{path}: a run is there already ({summarise(path).state_text}). Go on with --resume, or choose another --out."
    )
