"""From `Settings` back to text: a file that can be read again, what changed, and tables for people and editors."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import PydanticUndefined

from onebase.config.methods import METHODS, Lora
from onebase.config.reading import absolute
from onebase.config.section import fields_of, phrase, show, take, values_of
from onebase.config.settings import INSTEAD_OF, DataPart, Settings
from onebase.config.strict_yaml import write_yaml


@dataclass(frozen=True)
class SettingRow:
    """One setting for a table: its dotted name, what it takes, its default as written in a file, its help."""

    name: str
    type: str
    default: str
    help: str
    method: str = ""
    """The adapter method that has the setting, empty for what is no adapter's."""


def dump_settings(settings: Settings) -> str:
    """Return the settings as YAML that `read_settings` turns into settings.resolved() again, from any folder."""
    tree: dict[str, Any] = {}
    for name, value in _written(settings.resolved()):
        *outer, leaf = name.split(".")
        section = tree
        for key in outer:
            section = section.setdefault(key, {})
        section[leaf] = value
    return write_yaml(tree)


def diff_settings(old: Settings, new: Settings) -> list[tuple[str, Any, Any]]:
    """Return (dotted name, old value, new value) for every setting that differs; None is not given."""
    before, after = dict(_written(old.resolved())), dict(_written(new.resolved()))
    return [
        (name, before.get(name), after.get(name))
        for name in dict.fromkeys(name for name, _ in fields_of(Settings))
        if before.get(name) != after.get(name)
    ]


def describe_settings() -> list[SettingRow]:
    """Return a row for every setting, in the order of the file; those of the adapter method by method."""
    rows = []
    method = ""
    for name, field in fields_of(Settings):
        default = field.get_default(call_default_factory=True, validated_data={})
        shown = "required" if default is PydanticUndefined else "none" if default is None else show(default).strip("'")
        method = shown if name == "adapter.method" else method if name.startswith("adapter.") else ""
        rows.append(SettingRow(name, phrase(field.annotation, field.metadata), shown, field.description or "", method))
    return rows


def settings_json_schema() -> dict[str, Any]:
    """Return the JSON schema of a settings file, for editors that complete and check YAML."""
    schema = Settings.model_json_schema()
    for kind in METHODS.values():
        if kind is not Lora:  # without a method the adapter is LoRA
            schema["$defs"][kind.__name__]["required"] = ["method"]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema"} | schema


def _written(settings: Settings) -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, plain value) for every setting that has an effect: none that another stands instead of."""
    silent = {f"train.{other}" for name, other in INSTEAD_OF.items() if take(settings.train, name) is not None}
    if settings.train.lr_scheduler_type != "step":
        silent.add("train.lr_step_gamma")
    if settings.data.valid is None and settings.train.keep_best:
        silent.add("train.keep_best")
    if settings.task != "chat":
        silent.add("data.labels")
    for name, value in values_of(settings):
        plain = _plain(name, value)
        if name not in silent and plain is not None and plain != {}:
            yield name, plain


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, Path):
        return str(absolute(value))
    if name == "model":
        return str(absolute(value)) if Path(value).exists() else value
    if isinstance(value, tuple):
        parts = [_plain_part(part) for part in value]
        return parts[0] if len(parts) == 1 else parts
    return value


def _plain_part(part: DataPart) -> Any:
    path = part.path if part.on_hub else str(absolute(part.path))
    return path if part.weight == 1 else {"path": path, "weight": part.weight}
