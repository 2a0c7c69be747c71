"""result.json: what a finished run came to, in numbers that scripts may rely on. No torch."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from onebase.errors import FileFormatError
from onebase.files.atomic import write_file
from onebase.files.json_file import check_fields, check_schema, is_int, is_number, plain_fields, read_json, to_json

RESULT_NAME = "result.json"
_SCHEMA_VERSION = 1
_TODO = "Restore the file, or delete it and resume the run: it is then written again."


@dataclass(frozen=True, kw_only=True)
class Result:
    """The numbers of one run. Losses are means over labelled tokens; None where there were no validation rows.

    `more` holds what else a task or a command has to say; its keys stand beside the others in the file.
    """

    steps: int
    examples: int
    tokens: int
    """Tokens of the examples trained on: a shared prefix counts for every example, an adapter's virtual tokens never."""
    seconds: float
    """The training loop with compilation, without evaluation and checkpoint writing."""
    compile_seconds: float
    examples_per_s: float
    tokens_per_s: float
    peak_rss_bytes: int
    peak_device_bytes: int
    """0 where there is no device beside the CPU."""
    optimizer_state_bytes: int
    train_loss: float
    """Mean over the whole run."""
    valid_loss_before: float | None
    valid_loss: float | None
    """Of what is in adapter/."""
    best_step: int | None
    """The step whose tensors are in adapter/, where the best ones are kept."""
    trainable_parameters: int
    total_parameters: int
    adapter_bytes: int
    base_fingerprint: str
    more: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        own = plain_fields(self)
        wrong = [name for name, (fits, _) in _RULES.items() if not fits(own[name])]
        assert not wrong, f"a result with impossible values: { {name: own[name] for name in wrong} }"
        assert not set(self.more) & {*own, "schema_version"}, "`more` must not repeat a field"

    def as_dict(self) -> dict[str, Any]:
        """Return the content of result.json."""
        own = plain_fields(self)
        return {"schema_version": _SCHEMA_VERSION, **own.pop("more"), **own}


def _is_count(value: Any) -> bool:
    return is_int(value) and value >= 0


def _is_amount(value: Any) -> bool:
    return is_number(value) and value >= 0


def _is_loss(value: Any) -> bool:
    return is_number(value) and math.isfinite(value)


_COUNT = (_is_count, "a whole number from 0")
_AMOUNT = (_is_amount, "a number from 0")
_LOSS_OR_NULL = (lambda value: value is None or _is_loss(value), "a number or null")
_RULES = {
    "steps": _COUNT,
    "examples": _COUNT,
    "tokens": _COUNT,
    "seconds": _AMOUNT,
    "compile_seconds": _AMOUNT,
    "examples_per_s": _AMOUNT,
    "tokens_per_s": _AMOUNT,
    "peak_rss_bytes": _COUNT,
    "peak_device_bytes": _COUNT,
    "optimizer_state_bytes": _COUNT,
    "train_loss": (_is_loss, "a number"),
    "valid_loss_before": _LOSS_OR_NULL,
    "valid_loss": _LOSS_OR_NULL,
    "best_step": (lambda value: value is None or _is_count(value), "a whole number from 0, or null"),
    "trainable_parameters": _COUNT,
    "total_parameters": _COUNT,
    "adapter_bytes": _COUNT,
    "base_fingerprint": (lambda value: isinstance(value, str), "text"),
}


def write_result(folder: Path, result: Result) -> None:
    """Write result.json into a run's folder, in one rename."""
    write_file(folder / RESULT_NAME, to_json(result.as_dict()), writing="the result")


def read_result(folder: Path) -> Result | None:
    """Return the result in a run's folder, None if there is none yet.

    Raises:
        FileFormatError: the file is damaged or newer than this onebase.
    """
    path = folder / RESULT_NAME
    if not path.exists():
        return None
    content = read_json(path, todo=_TODO)
    check_schema(path, content, known=_SCHEMA_VERSION, todo=_TODO)
    check_fields(path, content, _RULES, todo=_TODO)
    more = {name: value for name, value in content.items() if name not in _RULES and name != "schema_version"}
    if "more" in more:
        raise FileFormatError(f"{path}: more: is no field of a result. {_TODO}")
    return Result(**{name: content[name] for name in _RULES}, more=more)
