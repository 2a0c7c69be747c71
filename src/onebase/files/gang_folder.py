"""The folder of a gang: the folders of its runs, each by its name, and what it came to. No torch.

    GANG/
        gang.json         the runs in order, and what decides their bits
        NAME/             a run's folder (files/run_folder.py)
        result.json       `trials`: the result of every run, or why it has none; written at the end

One process trains in it at a time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from onebase.errors import ConfigError
from onebase.files.atomic import clean, reporting, write_file
from onebase.files.json_file import check_schema, read_json, to_json

PLAN_NAME, RESULT_NAME = "gang.json", "result.json"
_LOCK_NAME = ".lock"
_SCHEMA_VERSION = 1
_TODO = "Restore the file, or train into another --out."


class GangFolder:
    """A gang's folder, locked for this process; use it in a `with` block."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path / _LOCK_NAME, timeout=0, thread_local=False)

    @classmethod
    def open(cls, path: Path, *, resume: bool) -> GangFolder:
        """Return the folder of a gang: a new one, or with `resume` one that may have begun.

        Raises:
            ConfigError: there is something else already, another process trains there, or it cannot be written to.
        """
        used = path.is_dir() and any(p.name != _LOCK_NAME for p in path.iterdir())
        if path.exists() and not path.is_dir():
            raise ConfigError(f"{path}: is a file. Choose another --out.")
        if used and not resume:
            raise ConfigError(f"{path}: there is something already. Choose another --out, or go on with --resume.")
        if used and not (path / PLAN_NAME).exists():
            raise ConfigError(f"{path}: is no folder of several runs: it has no {PLAN_NAME}. Choose another --out.")
        folder = cls(path)
        with reporting(path, "the runs' folder"):
            path.mkdir(parents=True, exist_ok=True)
            try:
                folder._lock.acquire()
            except Timeout as error:
                raise ConfigError(
                    f"{path}: another process is training there. Wait until it ends, or choose another --out."
                ) from error
        clean(path)
        return folder

    def __enter__(self) -> GangFolder:
        return self

    def __exit__(self, *_: object) -> None:
        self._lock.release()

    @property
    def plan(self) -> Mapping[str, Any] | None:
        """What was written down before the first step; None before that.

        Raises:
            FileFormatError: the file is damaged or newer than this onebase.
        """
        path = self.path / PLAN_NAME
        if not path.exists():
            return None
        content = read_json(path, todo=_TODO)
        check_schema(path, content, known=_SCHEMA_VERSION, todo=_TODO)
        return content

    def write_plan(self, plan: Mapping[str, Any]) -> None:
        """Write down who trains together and how."""
        content = {"schema_version": _SCHEMA_VERSION, **plan}
        write_file(self.path / PLAN_NAME, to_json(content), writing="the plan")

    def write_result(self, trials: Sequence[Mapping[str, Any]], peak_rss_bytes: int) -> None:
        """Write what came of every run."""
        content = {"schema_version": _SCHEMA_VERSION, "peak_rss_bytes": peak_rss_bytes, "trials": list(trials)}
        write_file(self.path / RESULT_NAME, to_json(content), writing="the result")
