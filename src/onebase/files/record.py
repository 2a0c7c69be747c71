"""onebase.json: what onebase knows of an adapter and PEFT's files cannot say. Read with every adapter, without torch.

Above all the base the adapter was trained on, by its fingerprint. An adapter without this file (PEFT's own) is fine;
then nobody can tell whether the base is the right one.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

import onebase
from onebase.config.labels import Labels, Problem, Task
from onebase.config.section import show
from onebase.errors import FileFormatError
from onebase.files.json_file import check_fields, check_schema, is_int, plain_fields, read_json, to_json

RECORD_NAME = "onebase.json"
MODEL_CONFIG_NAME = "config.json"
_SCHEMA_VERSION = 1
_TODO = "Restore the file, or delete it: the adapter then opens without the check of its base."


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _is_text_or_null(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _is_labels(value: Any) -> bool:
    if value is None:
        return True
    names, problem = (value.get("names"), value.get("problem")) if isinstance(value, dict) else (None, None)
    if not isinstance(names, list) or not all(map(_is_text, names)) or problem not in get_args(Problem):
        return False
    return len(set(names)) == len(names) and bool(names) == (problem != "regression")


_RULES = {
    "base": (_is_text, "text, the base's name"),
    "base_fingerprint": (_is_text_or_null, "text or null"),
    "base_revision": (_is_text_or_null, "text or null"),
    "dtype": (_is_text, "text, such as 'float32'"),
    "labels": (_is_labels, "the problem and the names of what is predicted, each name once, or null"),
    "extras": (lambda value: isinstance(value, dict), "an object"),
    "method": (_is_text, "text, such as 'lora'"),
    "onebase_version": (_is_text, "text"),
    "quantize": (_is_text, "'none', 'int8' or 'nf4'"),
    "seed": (lambda value: value is None or is_int(value), "a whole number or null"),
    "task": (lambda value: value in get_args(Task), f"one of {', '.join(get_args(Task))}"),
}


@dataclass(frozen=True)
class AdapterRecord:
    """The content of onebase.json. `base` is the name that opens the base: a hub id, a packaged name or a folder."""

    base: str
    base_fingerprint: str | None
    base_revision: str | None = None
    dtype: str = "float32"
    quantize: str = "none"
    method: str = "lora"
    task: str = "chat"
    seed: int | None = None
    labels: dict[str, Any] | None = None
    """What a task on whole examples predicts, as the fields of `Labels`; None for other tasks."""
    extras: dict[str, Any] = field(default_factory=dict)
    onebase_version: str = onebase.__version__

    @property
    def what_is_predicted(self) -> Labels | None:
        """The labels of a task on whole examples."""
        return None if self.labels is None else Labels(self.labels["problem"], tuple(self.labels["names"]))

    def to_text(self) -> str:
        """Return the file's text; the same record gives the same bytes."""
        return to_json({"schema_version": _SCHEMA_VERSION, **plain_fields(self)})


def read_record(folder: Path) -> AdapterRecord | None:
    """Return the record in an adapter's folder, None if there is none. Fields a later onebase added are left out.

    Raises:
        FileFormatError: the file is damaged or newer than this onebase.
    """
    path = folder / RECORD_NAME
    if not path.exists():
        return None
    content = read_json(path, todo=_TODO)
    check_schema(path, content, known=_SCHEMA_VERSION, todo=_TODO)
    content.setdefault("labels", None)  # records from before there were such tasks
    check_fields(path, content, _RULES, todo=_TODO)
    _check_same_names(folder, content["labels"])
    return AdapterRecord(**{name: content[name] for name in _RULES})


def _check_same_names(folder: Path, labels: Mapping[str, Any] | None) -> None:
    """Raise where the config.json beside an adapter, which transformers reads, names the classes otherwise.

    Raises:
        FileFormatError: one of the two files was edited; the classes' numbers are their places in the list.
    """
    path = folder / MODEL_CONFIG_NAME
    if not labels or not labels["names"] or not path.is_file():
        return
    named = read_json(path, todo=_TODO).get("id2label")
    if not isinstance(named, dict) or named == {str(number): name for number, name in enumerate(labels["names"])}:
        return
    raise FileFormatError(
        f"{folder / RECORD_NAME}: names the classes {show(labels['names'])}, {MODEL_CONFIG_NAME} beside it "
        f"{show([*named.values()])}. The order is that of the head's outputs: restore the file that was changed."
    )
