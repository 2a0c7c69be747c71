"""From a settings file and `--set` to `Settings`, with every fault of both reported at once.

A fault is written `line 7, adapter.r: must be at least 1, got 0.`, or `--set adapter.r: ...` where it was given there.
Relative paths count from the file's folder, in `--set` from the working directory, and are absolute afterwards.
"""

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from onebase.config.section import Section, sections_of, show
from onebase.config.settings import INSTEAD_OF, Settings
from onebase.config.strict_yaml import Document, Place, parse_yaml
from onebase.errors import ConfigError, Problem, list_problems

_SOURCES = ("train", "valid", "test")


@dataclass
class _Draft:
    """Settings before they are checked: a tree of plain values, and where each of them was written."""

    document: Document
    folder: Path
    where: str
    overridden: set[Place] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)

    def is_override(self, path: Place) -> bool:
        return any(path[:size] in self.overridden for size in range(1, len(path) + 1))

    def folder_of(self, path: Place) -> Path:
        """Return the folder from which a relative path at this place counts."""
        return Path.cwd() if self.is_override(path) else self.folder


def read_settings(path: str | Path, overrides: Sequence[str] = ()) -> Settings:
    """Return the settings of a YAML file after `--set` overrides such as "adapter.r=32".

    Raises:
        ConfigError: with all faults of the file and the overrides.
    """
    path = Path(path)
    document = parse_yaml(_text_of(path))
    if document.broken:
        raise ConfigError(list_problems(str(path), [str(problem) for problem in document.problems]))
    return _settle(_Draft(document, path.absolute().parent, str(path)), overrides)


def settings_from(
    values: Mapping[str, Any],
    *,
    where: str = "the settings",
    folder: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Settings:
    """Return settings from plain values, checked and resolved as if they had been read from a file in `folder`.

    `where` is how errors call the values; the folder is the working directory unless given.

    Raises:
        ConfigError: with all faults.
    """
    base = Path.cwd() if folder is None else Path(folder).absolute()
    return _settle(_Draft(Document(value=deepcopy(dict(values))), base, where), overrides)


def _text_of(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise ConfigError(f"{path}: {_not_there(path.absolute())}") from None
    except IsADirectoryError:
        raise ConfigError(f"{path}: is a folder; a settings file is needed.{_close(path / 'config.yaml')}") from None
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path} line {line}: is not UTF-8 text (byte {error.start}). Save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None


def _settle(draft: _Draft, overrides: Sequence[str]) -> Settings:
    tree = draft.document.value
    if tree is None:
        tree = draft.document.value = {}
    if not isinstance(tree, dict):
        raise ConfigError(
            list_problems(draft.where, [f"must be a mapping that begins with 'model:', got {show(tree)}."])
        )
    _override(draft, tree, overrides)
    _resolve_paths(draft, tree)
    problems = draft.document.problems + draft.problems
    settings = None
    try:
        settings = Settings(**tree)
    except ConfigError as error:
        known = {problem.path for problem in problems}
        problems += [problem for problem in error.problems if problem.path not in known]
    if problems or settings is None:
        located = sorted(((_line(draft, problem), problem) for problem in problems), key=lambda pair: pair[0])
        raise ConfigError(
            list_problems(draft.where, [_located(draft, line, problem) for line, problem in located]), problems
        )
    return settings.resolved()


def _line(draft: _Draft, problem: Problem) -> float:
    """Return a problem's line; the whole file's problems come first, those of --set and of no line last."""
    if draft.is_override(problem.path):
        return float("inf")
    return problem.line or draft.document.line_of(problem.path) or (0 if not problem.path else 1e9)


def _located(draft: _Draft, line: float, problem: Problem) -> str:
    if draft.is_override(problem.path):
        return f"--set {problem}"
    return f"line {int(line)}, {problem}" if 0 < line < 1e9 else str(problem)


def _override(draft: _Draft, tree: dict[str, Any], overrides: Sequence[str]) -> None:
    """Put every "dotted.name=value" into the tree."""
    for override in overrides:
        name, equals, text = override.partition("=")
        path = _path_of(name.strip())
        if not equals or not all(path):
            draft.problems.append(Problem((), f"--set {override}: must be NAME=VALUE, for example --set adapter.r=32"))
            continue
        parsed = parse_yaml(text)
        draft.overridden.add(path)
        if parsed.problems:
            reason = parsed.problems[0].text
            draft.problems.append(Problem(path, f"{reason} Quote the value, got {show(text)}."))
            continue
        _put(tree, path, parsed.value)
    for name, other in INSTEAD_OF.items():  # `--set train.steps=10` takes a file's `epochs` out, and the reverse
        for new, old in ((name, other), (other, name)):
            train = tree.get("train")
            if (
                ("train", new) in draft.overridden
                and ("train", old) not in draft.overridden
                and isinstance(train, dict)
            ):
                train.pop(old, None)


def _path_of(name: str) -> tuple[str, ...]:
    """Return a dotted name as a path; what follows a setting that is a mapping is one key, dots and all."""
    sections: tuple[type[Section], ...] = (Settings,)
    parts = name.split(".")
    for index, part in enumerate(parts):
        found = [section.model_fields[part] for section in sections if part in section.model_fields]
        sections = tuple(inner for field in found for inner in sections_of(field))
        if not sections:
            rest = ".".join(parts[index + 1 :])
            return tuple(parts[: index + 1]) + ((rest,) if rest else ())
    return tuple(parts)


def _put(tree: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    for key in path[:-1]:
        if tree.get(key) is None:
            tree[key] = {}
        if not isinstance(tree[key], dict):
            return  # the file's value is at fault, and is reported
        tree = tree[key]
    tree[path[-1]] = value


def _resolve_paths(draft: _Draft, tree: dict[str, Any]) -> None:
    """Make every path in the tree absolute; note those that lead nowhere."""
    model = tree.get("model")
    if isinstance(model, str) and model:
        tree["model"] = _resolved_model(draft, model)
    data, adapter = tree.get("data"), tree.get("adapter")
    if isinstance(data, dict):
        for name in _SOURCES:
            for path, holder, key in _sources(data, name):
                holder[key] = _resolved(draft, path, holder[key], _hub_hint)
        if isinstance(data.get("template"), str) and data["template"]:
            data["template"] = _resolved(draft, ("data", "template"), data["template"])
    if isinstance(adapter, dict) and isinstance(adapter.get("init_from"), str) and adapter["init_from"]:
        adapter["init_from"] = _resolved(draft, ("adapter", "init_from"), adapter["init_from"])


def _sources(data: dict[str, Any], name: str) -> Iterator[tuple[Place, Any, Any]]:
    """Yield (place, holder, key) for every path of files in data.train, data.valid or data.test."""
    if isinstance(data.get(name), list):
        places: list[tuple[Place, Any, Any]] = [
            (("data", name, index), data[name], index) for index in range(len(data[name]))
        ]
    else:
        places = [(("data", name), data, name)] if name in data else []
    for path, holder, key in places:
        if isinstance(holder[key], dict):
            path, holder, key = (*path, "path"), holder[key], "path"
        value = holder.get(key) if isinstance(holder, dict) else holder[key]
        if isinstance(value, str) and value and not value.startswith("hub:"):
            yield path, holder, key


def _resolved(draft: _Draft, path: Place, value: str, hint: Callable[[str], str] = lambda value: "") -> str:
    resolved = absolute(value, draft.folder_of(path))
    if not _exists(resolved):
        draft.problems.append(Problem(path, _not_there(resolved) + hint(value)))
    return str(resolved)


def _resolved_model(draft: _Draft, model: str) -> str:
    """Return a model's path where there is one; a name is left for whoever opens the model."""
    resolved = absolute(model, draft.folder_of(("model",)))
    if _exists(resolved):
        return str(resolved)
    if model.startswith(("/", "./", "../", "~")) or model in (".", "..") or model.endswith(".gguf"):
        draft.problems.append(Problem(("model",), _not_there(resolved)))
    return model


def absolute(path: str | Path, folder: Path | None = None) -> Path:
    """Return a path from the root, counted from a folder or the working directory; links keep the names they have."""
    try:
        path = Path(path).expanduser()
    except RuntimeError:  # ~ of a user who does not exist
        path = Path(path)
    # Not resolve(): in the hub's cache a link says .gguf and what it leads to has a hash for a name.
    return Path(os.path.abspath((folder or Path.cwd()) / path))  # noqa: PTH100


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name too long, a folder without permission
        return False


def _not_there(path: Path) -> str:
    """Return that there is no such file, and what is there instead."""
    parent = path.parent
    if not _exists(parent):
        return f"there is no folder {parent}."
    return f"there is no file or folder {path}.{_close(path)}"


def _close(path: Path) -> str:
    try:
        names = sorted(entry.name for entry in path.parent.iterdir())
    except OSError:
        return ""
    close = get_close_matches(path.name, names, n=3)
    return f" Close names there: {', '.join(close)}" if close else ""


def _hub_hint(value: str) -> str:
    if re.fullmatch(r"[\w.-]+/[\w.-]+", value) and not Path(value).suffix:
        return f" A data set of the hub is written hub:{value}:train"
    return ""
