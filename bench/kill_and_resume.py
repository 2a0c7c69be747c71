"""A run killed with SIGKILL at five moments and resumed ends with the same bytes as one that was never killed.

    python bench/kill_and_resume.py

On the real model: 12 steps, a checkpoint every 3. Each killed run is resumed with `--resume` until it is done; then
adapter_model.safetensors must have the hash of the uninterrupted run's, metrics.jsonl must hold each step once, and
what the steps computed (loss, learning rate, gradient norm, ...) must be equal too. The moments:

    before the first checkpoint       two steps are done, nothing is saved: the run starts again
    within a step                     half a step after the fifth was recorded
    within the writing of a checkpoint  the new checkpoint's folder is there under its temporary name
    after a checkpoint                the second checkpoint has its name, the next step runs
    after the last step               all steps are recorded, adapter and result are not complete

A kill that came too late to hit its moment is tried again. On 2 cores about 10 minutes; times do not matter here.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fresh_run import add_data_options, settings_of, train_command, write_settings
from record import Record, file_facts

from onebase.files.atomic import is_leftover
from onebase.files.metrics import METRICS_NAME, read_metrics

SAVE_EVERY = 3
_POLL_SECONDS = 0.0005
_TRIES = 5
_TIMES = ("seconds",)  # what differs between runs that compute the same


@dataclass(frozen=True)
class Run:
    """A run folder as it lies on the disk, seen from outside."""

    path: Path

    @property
    def steps(self) -> int:
        """Complete records in metrics.jsonl."""
        path = self.path / METRICS_NAME
        return path.read_bytes().count(b"\n") if path.exists() else 0

    @property
    def checkpoints(self) -> list[str]:
        """The checkpoints that have their name."""
        return [name for name in self._names("checkpoints") if not is_leftover(Path(name))]

    @property
    def unfinished_checkpoints(self) -> list[str]:
        """The checkpoints that are being written, or were when the process died."""
        return [name for name in self._names("checkpoints") if is_leftover(Path(name))]

    @property
    def finished(self) -> bool:
        """Whether the result is there."""
        return (self.path / "result.json").exists()

    def _names(self, folder: str) -> list[str]:
        try:
            return sorted(path.name for path in (self.path / folder).iterdir())
        except FileNotFoundError:
            return []


@dataclass(frozen=True)
class Moment:
    """When a run is killed: `seen` says that the time has come, `hit` that the files show it was in time."""

    name: str
    seen: Callable[[Run], bool]
    hit: Callable[[Run], bool]
    wait_steps: float = 0.0


def moments(steps: int) -> list[Moment]:
    """Return the five moments of a run of `steps` steps."""
    middle = SAVE_EVERY + 2
    return [
        Moment("before the first checkpoint", lambda r: r.steps >= 2, lambda r: r.steps >= 2 and not r.checkpoints),
        Moment("within a step", lambda r: r.steps >= middle, lambda r: r.steps == middle, wait_steps=0.5),
        Moment(
            "within the writing of a checkpoint",
            lambda r: r.steps >= 2 * SAVE_EVERY and bool(r.unfinished_checkpoints),
            lambda r: r.steps == 2 * SAVE_EVERY and bool(r.unfinished_checkpoints) and len(r.checkpoints) == 1,
        ),
        Moment(
            "after a checkpoint",
            lambda r: len(r.checkpoints) >= 2,
            lambda r: len(r.checkpoints) == 2 and r.steps == 2 * SAVE_EVERY,
            wait_steps=0.2,
        ),
        Moment("after the last step", lambda r: r.steps >= steps, lambda r: r.steps == steps and not r.finished),
    ]


def main() -> None:
    args = _parser().parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        valid = folder / "valid.jsonl"
        valid.write_text("".join(args.valid.read_text(encoding="utf-8").splitlines(True)[: args.valid_rows]))
        data = {"train": file_facts(args.train), "valid": file_facts(valid)}
        record = Record(args.out, str(__doc__).partition("\n")[0], data=data)
        args.valid = valid
        settings = settings_of(args, steps=args.steps, batch_size=args.batch_size, save_every=SAVE_EVERY)
        settings_path = write_settings(folder / "settings.yaml", settings)
        whole = Run(folder / "uninterrupted")
        subprocess.run(train_command(settings_path, whole.path), check=True, capture_output=True)
        step_seconds = min(step["seconds"] for step in read_metrics(whole.path / METRICS_NAME))
        expected, outcomes = _content(whole), []
        for moment in moments(args.steps):
            outcomes.append(_killed_and_resumed(moment, settings_path, step_seconds, expected, folder))
            record.write(_summary(args, settings, expected, outcomes))
            print(f"{moment.name}: {'equal' if outcomes[-1]['equal'] else 'DIFFERENT'} {outcomes[-1]}", flush=True)
    if not all(outcome["equal"] for outcome in outcomes):
        raise SystemExit("a resumed run differs from the uninterrupted one")


def _killed_and_resumed(
    moment: Moment, settings_path: Path, step_seconds: float, expected: Mapping[str, Any], folder: Path
) -> dict[str, Any]:
    """Kill a run at the moment, resume it until it is done, and compare what is there with what is expected."""
    for attempt in range(1, _TRIES + 1):
        run = Run(folder / f"{moment.name.replace(' ', '-')}-{attempt}")
        _kill_at(moment, train_command(settings_path, run.path), run, moment.wait_steps * step_seconds)
        if moment.hit(run):
            break
    else:
        raise SystemExit(f"{moment.name}: missed {_TRIES} times; the last left {run.steps} steps, {run.checkpoints}")
    left = {
        "steps_recorded": run.steps,
        "checkpoints": run.checkpoints,
        "unfinished_checkpoints": len(run.unfinished_checkpoints),
    }
    subprocess.run(train_command(settings_path, run.path, "--resume"), check=True, capture_output=True)
    found = _content(run)
    return {
        "killed": moment.name,
        "attempts": attempt,
        "left": left,
        "adapter_sha256": found["adapter_sha256"],
        "each_step_once": found["steps"] == expected["steps"],
        "records_equal": found["records"] == expected["records"],
        "equal": found == expected,
    }


def _kill_at(moment: Moment, command: list[str], run: Run, wait_seconds: float) -> None:
    """Start a run and kill it when the moment has come, or let it end where it never does."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if moment.seen(run):
            time.sleep(wait_seconds)
            process.send_signal(signal.SIGKILL)
            process.wait()
            return
        time.sleep(_POLL_SECONDS)


def _content(run: Run) -> dict[str, Any]:
    """Return what two runs must have in common: the adapter's bytes, the steps, and what they computed."""
    records = read_metrics(run.path / METRICS_NAME)
    lines = (run.path / METRICS_NAME).read_text(encoding="utf-8").splitlines()
    return {
        "adapter_sha256": hashlib.sha256((run.path / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest(),
        "steps": [json.loads(line)["step"] for line in lines],
        "records": [{name: value for name, value in record.items() if name not in _TIMES} for record in records],
    }


def _summary(
    args: argparse.Namespace, settings: Mapping[str, Any], expected: Mapping[str, Any], outcomes: list[dict[str, Any]]
) -> dict[str, Any]:
    return {
        "train": settings["train"],
        "uninterrupted": {"adapter_sha256": expected["adapter_sha256"], "steps": expected["steps"]},
        "killed_runs": outcomes,
        "all_equal": len(outcomes) == len(moments(args.steps)) and all(outcome["equal"] for outcome in outcomes),
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add_data_options(parser)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--valid-rows", type=int, default=16, help="the first rows of --valid that are evaluated")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser


if __name__ == "__main__":
    main()
