"""`Section`, the class that every group of settings is made from, and the words of its errors.

A section is a frozen pydantic model that takes no unknown key and converts no type. Whoever makes one, a settings
file or Python, gets one ConfigError with all of its faults, in words that need no knowledge of pydantic. A section
inside another adds its faults to the outer one's.
"""

import re
import types
from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from onebase.config.foreign import PLANNED, SPELLINGS, WRITTEN, explain
from onebase.errors import ConfigError, Problem, list_problems

_BOUNDS = {
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "finite_number": "a finite number",
    "string_too_short": "text that is not empty",
    "too_short": "a list of at least {min_length}",
}
_SCALARS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", Path: "a path"}
_INNER = {
    "int_type": _SCALARS[int],
    "int_from_float": _SCALARS[int],
    "float_type": _SCALARS[float],
    "string_type": _SCALARS[str],
    "model_type": "a mapping",
}
"""What must stand inside a list or mapping, by the kind of pydantic's error."""


class Means(str):
    """In a field's Annotated type: how its values are called, where the type itself says it badly."""


class Section(BaseModel):
    """A group of settings: frozen, strict, every fault reported at once as a ConfigError."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)

    def __init__(self, /, **values: Any) -> None:
        problems: list[Problem] = []
        try:
            super().__init__(**values)
        except ValidationError as error:
            problems += _translate(type(self), values, error)
        problems += self.conflicts(values)
        if problems:
            message = list_problems(type(self).__name__, [str(problem) for problem in problems])
            raise ConfigError(message, problems) from None

    @classmethod
    def conflicts(cls, values: Mapping[str, Any]) -> Iterator[Problem]:
        """Yield what is wrong between settings; `values` are as given, so that a default conflicts with nothing."""
        yield from ()

    @classmethod
    def elsewhere(cls, name: str) -> str | None:
        """Return what to say of a setting that this section lacks and its like have, None where none has it."""
        return None


def given(values: object, name: str) -> bool:
    """Return whether a setting was written down with a value, in a mapping or when a section was made."""
    if isinstance(values, Section):
        return name in values.model_fields_set and getattr(values, name) is not None
    return isinstance(values, Mapping) and values.get(name) is not None


def take(values: object, name: str) -> Any:
    """Return a setting's value from a mapping or a section, or None."""
    return values.get(name) if isinstance(values, Mapping) else getattr(values, name, None)


def sections_of(field: FieldInfo) -> tuple[type[Section], ...]:
    """Return the sections of which a field holds one; none for a field that holds a value."""
    is_union = get_origin(field.annotation) in (Union, types.UnionType)
    kinds = get_args(field.annotation) if is_union else (field.annotation,)
    return tuple(kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Section))


def fields_of(section: type[Section], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Yield (dotted name, field) for every setting in a section and in those inside it.

    Where a field holds one of several sections, the settings of each come one after the other.
    """
    for name, field in section.model_fields.items():
        inner = sections_of(field)
        if not inner:
            yield prefix + name, field
        for kind in inner:
            yield from fields_of(kind, f"{prefix}{name}.")


def values_of(section: Section, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, value) for every setting of a section and of those that it holds."""
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from values_of(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def show(value: object) -> str:
    """Return a value as it would stand in the file, short enough for a message."""
    if value is None:
        return "nothing"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value)
    return text if len(text) <= 80 else text[:76] + " ..."


def phrase(kind: Any, metadata: Sequence[object] = ()) -> str:
    """Return what a type accepts, in words: "a whole number or 'auto'"."""
    for item in metadata:
        if isinstance(item, Means):
            return str(item)
    if hasattr(kind, "__metadata__"):
        return phrase(kind.__origin__, kind.__metadata__)
    if kind in _SCALARS:
        return _SCALARS[kind]
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Literal:
        return ", ".join(show(value) for value in inner[:-1]) + " or " * (len(inner) > 1) + show(inner[-1])
    if origin in (Union, types.UnionType):
        parts = [part for part in inner if part is not type(None) and not (part is int and float in inner)]
        return " or ".join(dict.fromkeys(phrase(part) for part in parts))
    if origin is list:
        return "a list of " + phrase(inner[0]).removeprefix("a ") + "s"
    return "a mapping"


def _translate(section: type[Section], values: Mapping[str, Any], error: ValidationError) -> Iterator[Problem]:
    by_field: dict[str, list[ErrorDetails]] = {}
    for details in error.errors():
        by_field.setdefault(str(details["loc"][0]) if details["loc"] else "", []).append(details)
    for name, found in by_field.items():
        if found[0]["type"] == "extra_forbidden":
            yield _unknown(section, name)
        elif found[0]["type"] == "missing":
            yield Problem((name,), _missing(name, section.model_fields[name]))
        elif not name:
            yield Problem((), str(found[0]["msg"]))
        else:
            yield from _wrong_values(section, name, values.get(name), found)


def _unknown(section: type[Section], name: str) -> Problem:
    owned = section.elsewhere(name)
    if owned is not None:
        return Problem((name,), owned)
    known = [dotted for dotted, _ in fields_of(section)]
    text = explain(name, known)
    if text is None:
        close = get_close_matches(name, section.model_fields, n=1)
        text = f"unknown setting; closest is '{close[0]}'." if close else "unknown setting. List all: onebase schema"
    return Problem((name,), text, unknown=True)


def _missing(name: str, field: FieldInfo) -> str:
    return f"is missing.{_example(name, field)}"


def _example(name: str, field: FieldInfo) -> str:
    return f" Write, for example: {name}: {field.examples[0]}" if field.examples else ""


def _wrong_values(section: type[Section], name: str, value: Any, found: list[ErrorDetails]) -> Iterator[Problem]:
    """Yield the problems of one field; of a union's branches, the one that got furthest into the value speaks."""
    known = [dotted for dotted, _ in fields_of(section)]
    problems: dict[tuple[str | int, ...], Problem] = {}
    for details in sorted(found, key=lambda details: details["type"] not in _BOUNDS):
        path, inner = _follow((name,), value, details["loc"][1:])
        cause = details.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError) and cause.problems:
            for problem in cause.problems:
                place, last = _follow(path, inner, problem.path)
                if isinstance(last, Mapping) and problem.path[-1:] != place[-1:]:
                    place += problem.path[-1:]  # a key that is missing has a place too
                text = explain(str(place[-1]), known) if problem.unknown else None
                problems.setdefault(place, Problem(place, text or problem.text, problem.unknown))
        else:
            problems.setdefault(path, Problem(path, _sentence(section.model_fields[name], path, inner, details)))
    depth = max(len(path) for path in problems)
    nested = bool(sections_of(section.model_fields[name]))
    yield from (problem for path, problem in problems.items() if nested or len(path) == depth)


def _follow(path: tuple[str | int, ...], value: Any, steps: Sequence[str | int]) -> tuple[tuple[str | int, ...], Any]:
    """Return the path and value after those steps that the written value has; the others are pydantic's own."""
    for step in steps:
        is_index = isinstance(value, list | tuple) and isinstance(step, int) and step < len(value)
        if is_index or (isinstance(value, Mapping) and step in value):
            path, value = (*path, step), value[step]
    return path, value


def _sentence(field: FieldInfo, path: tuple[str | int, ...], value: Any, details: ErrorDetails) -> str:
    kind, context = details["type"], details.get("ctx", {})
    if kind == "value_error":
        return str(context["error"])
    if kind in _BOUNDS:
        rule = _BOUNDS[kind].format(**{key: show(item).removesuffix(".0") for key, item in context.items()})
    elif len(path) > 1 and kind in _INNER:
        rule = _INNER[kind]
    else:
        rule = phrase(field.annotation, field.metadata)
    name = str(path[-1])
    todo = _example(name, field) if path == (name,) and rule == "a mapping" else advice(name, rule, value)
    return f"must be {rule}, got {show(value)}.{todo}"


def advice(name: str, rule: str, value: object) -> str:
    """Return what to write instead of a value that a setting does not take, " " in front, or nothing."""
    if not isinstance(value, str):
        return ""
    if value in PLANNED.get(name, ()):
        return f" '{value}' is not available in this version."
    written = WRITTEN.get(name, {}).get(value.lower().replace("_", "-").replace(" ", "-"))
    if written is not None:
        return f" Write {written}."
    allowed = re.findall("'([^']+)'", rule)
    close = get_close_matches(SPELLINGS.get(value, value), allowed, n=1)
    if close:
        return f" Closest is '{close[0]}'."
    if "number" in rule and _is_number(value):
        return " Remove the quotes."
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True
