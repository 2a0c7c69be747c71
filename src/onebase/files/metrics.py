"""metrics.jsonl: one JSON object a step, each step once, in order. No torch.

A record is written when its step is done and synced when a checkpoint is. After a crash the file may end in the middle
of a line, or be ahead of the newest checkpoint: `rewind` cuts it back before the run goes on.
"""

import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from onebase.errors import FileFormatError
from onebase.files.atomic import reporting, write_file

METRICS_NAME = "metrics.jsonl"


class Metrics:
    """The metrics of one run; `last_step` is that of the newest record, None if there is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.last_step: int | None = None

    def append(self, step: int, values: Mapping[str, Any], *, kept: str = "") -> None:
        """Write the record of a step: `step` first, then the values as given; a number that is not finite as null.

        Raises:
            CapacityError, ConfigError: the disk is full, the place cannot be written to; `kept` says what is safe.
        """
        assert self.last_step is None or step > self.last_step, f"step {step} after step {self.last_step}"
        finite = {name: _finite(value) for name, value in values.items()}
        line = json.dumps({"step": step, **finite}, ensure_ascii=False, allow_nan=False) + "\n"
        with reporting(self.path, f"the metrics of step {step}", kept), self.path.open("ab") as file:
            file.write(line.encode())
        self.last_step = step

    def sync(self) -> None:
        """Wait until the disk has all records."""
        if self.path.exists():
            with reporting(self.path, "the metrics"), self.path.open("ab") as file:
                os.fsync(file.fileno())

    def rewind(self, step: int | None) -> None:
        """Keep the records up to `step` (None: none), and no line that a crash cut off.

        Raises:
            FileFormatError: a line before that is damaged, or a step is there twice.
        """
        kept = [] if step is None else [record for record in read_metrics(self.path) if record["step"] <= step]
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in kept]
        write_file(self.path, "".join(lines), writing="the metrics")
        self.last_step = kept[-1]["step"] if kept else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Return the records of a metrics file, in order; none if it is missing. A last line that was cut off is left out.

    Raises:
        FileFormatError: another line is damaged, or the steps do not ascend.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")[:-1]  # a line counts from its newline on
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        record = _parsed(line)
        if record is None:
            raise FileFormatError(
                f"{path} line {number}: must be a JSON object with a step, got {line[:80].decode(errors='replace')!r}. "
                "Remove the line, or restore the file."
            )
        if records and record["step"] <= records[-1]["step"]:
            raise FileFormatError(
                f"{path} line {number}: step {record['step']} must come after step {records[-1]['step']}. "
                "Remove the line, or restore the file."
            )
        records.append(record)
    return records


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _finite(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
