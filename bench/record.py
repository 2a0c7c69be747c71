"""A bench's record: a JSON file beside its script, with the machine it was made on and how to repeat it.

Paths outside the repository are written as their last name: a record says which file, never whose disk.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "examples" / "data"
MODEL = "smollm2-135m-instruct"
_PACKAGES = ("torch", "transformers", "peft", "numpy")


class Record:
    """One run of a bench: made when it starts (date, load), written as often as there is something to keep."""

    def __init__(self, path: Path, claim: str, **facts: Any) -> None:
        self.path = path
        self._head = {"claim": " ".join(claim.split()), "command": command(), "date": _now(), **facts}
        self._load_before = load_average()

    def write(self, values: Mapping[str, Any]) -> None:
        """Write the record with these values, whole or not at all."""
        machine = {**machine_facts(), "load_average_before": self._load_before, "load_average_after": load_average()}
        text = json.dumps({**self._head, "machine": machine, **values}, indent=2, ensure_ascii=True) + "\n"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        new = self.path.with_name(f"{self.path.name}.new")
        new.write_text(text, encoding="utf-8")
        new.replace(self.path)


def earlier_parts(path: Path, *names: str) -> dict[str, Any]:
    """Return these parts of the record there is, for scripts whose parts are measured at different times."""
    earlier = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return {name: earlier[name] for name in names if name in earlier}


def machine_facts() -> dict[str, Any]:
    """Return what a number depends on besides the code: processor, cores, threads, versions; and the code's commit."""
    return {
        "cpu": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": int(os.environ.get("OMP_NUM_THREADS") or 0) or "default",
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
        "commit": commit(),
    }


def load_average() -> list[float]:
    """Return how many processes wanted to run, over 1, 5 and 15 minutes: a number measured beside others is none."""
    return [round(value, 2) for value in os.getloadavg()] if hasattr(os, "getloadavg") else []


def median_and_spread(values: Sequence[float]) -> dict[str, Any]:
    """Return the median of the values, the lowest and highest, and all of them."""
    rounded = [_round(value) for value in values]
    return {
        "median": _round(statistics.median(values)),
        "lowest": min(rounded),
        "highest": max(rounded),
        "values": rounded,
    }


def file_facts(path: Path) -> dict[str, Any]:
    """Return a data file's name, number of rows and hash."""
    data = path.read_bytes()
    return {"name": path.name, "rows": data.count(b"\n"), "sha256": hashlib.sha256(data).hexdigest()}


def command() -> str:
    """Return the command that repeats this script, without folders outside the repository."""
    words = [Path(sys.argv[0]).resolve().relative_to(ROOT).as_posix(), *map(_without_folders, sys.argv[1:])]
    threads = os.environ.get("OMP_NUM_THREADS")
    return " ".join([*([f"OMP_NUM_THREADS={threads}"] if threads else []), "python", *words])


def commit() -> str:
    """Return the commit of the code, marked where src/ or bench/ differ from it; empty where there is no git."""
    try:
        found = _git("rev-parse", "--short=12", "HEAD")
        changed = _git("status", "--porcelain", "--untracked-files=no", "--", "src", "bench/*.py")
    except (OSError, subprocess.CalledProcessError):
        return ""
    return f"{found} with changes" if changed else found


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def _without_folders(word: str) -> str:
    option, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
    path = Path(value)
    if path.is_absolute():
        value = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name
    return f"{option}{equals}{value}"


def _round(value: float) -> float:
    """Return a number with six digits that count."""
    return value if value == 0 or not math.isfinite(value) else round(value, 5 - math.floor(math.log10(abs(value))))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor()
    facts = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    flags = set(facts.get("flags", "").split())
    sets = [name for name in ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile") if name in flags]
    return f"{facts.get('model name', platform.processor())} ({', '.join(sets)})"


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
