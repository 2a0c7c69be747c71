"""`onebase train` in a fresh process, as a user runs it, and what the system says the process took."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from record import DATA, MODEL


@dataclass(frozen=True)
class Finished:
    """A run that ended well. `wall_seconds` and `cpu_seconds` are of the whole process, as is `peak_rss_bytes`."""

    result: Mapping[str, Any]
    wall_seconds: float
    cpu_seconds: float
    peak_rss_bytes: int


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Add the options for the model and the rows."""
    parser.add_argument("--model", default=MODEL, help="a packaged name or a folder")
    parser.add_argument("--train", type=Path, default=DATA / "define-train.jsonl")
    parser.add_argument("--valid", type=Path, default=DATA / "define-valid.jsonl")


class RefusedError(RuntimeError):
    """`onebase train` said that the settings are wrong for this model; the message is its own."""


def settings_of(args: argparse.Namespace, adapter: Mapping[str, Any] | None = None, **train: Any) -> dict[str, Any]:
    """Return a settings file's content for the script's model and rows; `adapter` and `train` are its sections of that name."""
    return {
        "model": args.model,
        "task": "chat",
        "data": {"train": str(args.train.resolve()), "valid": str(args.valid.resolve())},
        "adapter": adapter or {"method": "lora", "r": 16, "lora_alpha": 32, "target_modules": "all-linear"},
        "train": {"batch_size": 16, "seed": 0, **train},
    }


def write_settings(path: Path, settings: Mapping[str, Any]) -> Path:
    """Write a settings file (JSON is YAML) and return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return path


def train_command(settings_path: Path, out: Path, *words: str) -> list[str]:
    """Return the words of `onebase train`."""
    return [sys.executable, "-m", "onebase", "train", str(settings_path), "--out", str(out), *words]


def train_in_fresh_process(settings: Mapping[str, Any], out: Path) -> Finished:
    """Run `onebase train` and wait for it.

    Raises:
        RefusedError: the settings are wrong for this model.
        RuntimeError: it failed; the message holds the end of what it said.
    """
    settings_path = write_settings(out.with_name(f"{out.name}.settings.yaml"), settings)
    log = out.with_name(f"{out.name}.log")
    with log.open("wb") as file:
        # Where a bench has imported onebase, MKL's strict mode stands in its environment: a user's shell has none.
        own = {name: value for name, value in os.environ.items() if name != "MKL_CBWR"}
        process = subprocess.Popen(train_command(settings_path, out), stdout=file, stderr=subprocess.STDOUT, env=own)
        taken = wait_for(process)
    if process.returncode != 0:
        end = log.read_text(encoding="utf-8", errors="replace")[-3000:]
        if process.returncode == 2:
            raise RefusedError(end.strip())
        raise RuntimeError(f"onebase train ended with exit code {process.returncode}:\n{end}")
    result = json.loads((out / "result.json").read_text(encoding="utf-8"))
    return Finished(result, *taken, result["peak_rss_bytes"])


def wait_for(process: subprocess.Popen[bytes]) -> tuple[float, float]:
    """Wait for a process that was just started; return its wall seconds and processor seconds.

    Its peak memory it must tell itself: what the system tells its parent is never below what the parent holds.
    """
    began = time.perf_counter()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return time.perf_counter() - began, usage.ru_utime + usage.ru_stime
