"""JSON objects as files: written with sorted keys, read with checks that name the file. No torch."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from onebase.errors import FileFormatError, list_problems

_WORDS = {
    dict: "an object",
    list: "a list",
    str: "text",
    bool: "true or false",
    int: "a whole number",
    type(None): "null",
}
Fits = Callable[[Any], bool]


def to_json(content: Mapping[str, Any]) -> str:
    """Return an object as indented JSON text with sorted keys: the same content gives the same bytes."""
    return json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"


def read_json(path: Path, *, todo: str) -> dict[str, Any]:
    """Return the object in a JSON file.

    Raises:
        FileFormatError: the file is missing, cannot be read, is not UTF-8, not JSON or not an object; the message ends with `todo`.
    """
    try:
        content = json.loads(path.read_bytes().decode("utf-8"))
    except FileNotFoundError as error:
        raise FileFormatError(f"{path}: the file is missing. {todo}") from error
    except UnicodeDecodeError as error:
        raise FileFormatError(f"{path}: must be UTF-8 text, byte {error.start} is not. {todo}") from error
    except json.JSONDecodeError as error:
        raise FileFormatError(f"{path} line {error.lineno}: must be JSON: {error.msg}. {todo}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; lists in lists
        raise FileFormatError(f"{path}: must be JSON that can be read: {error}. {todo}") from error
    except OSError as error:
        raise FileFormatError(f"{path}: cannot be read ({error.strerror}). {todo}") from error
    if not isinstance(content, dict):
        raise FileFormatError(f"{path}: must hold one JSON object, got {json_word(content)}. {todo}")
    return content


def check_schema(path: Path, content: Mapping[str, Any], *, known: int, todo: str) -> None:
    """Refuse a file of ours whose `schema_version` is newer than the `known` one, or none.

    Raises:
        FileFormatError: see above.
    """
    found: Any = content.get("schema_version")
    if not is_int(found) or found < 1:
        raise FileFormatError(f"{path}: schema_version must be a whole number from 1, got {found!r}. {todo}")
    if found > known:
        raise FileFormatError(
            f"{path}: schema_version {found} was written by a newer onebase; this one reads up to {known}. "
            "Update it: pip install -U onebase"
        )


def check_fields(path: Path, content: Mapping[str, Any], rules: Mapping[str, tuple[Fits, str]], *, todo: str) -> None:
    """Check that each field of `rules` is there and fits; a rule is a test and the words for what it asks.

    Raises:
        FileFormatError: every field that is missing or does not fit; the message ends with `todo`.
    """
    problems = []
    for name, (fits, rule) in rules.items():
        if name not in content:
            problems.append(f"{name}: is missing; it must be {rule}.")
        elif not fits(content[name]):
            problems.append(f"{name}: must be {rule}, got {content[name]!r}.")
    if problems:
        raise FileFormatError(f"{list_problems(str(path), problems)}\n{todo}")


def is_int(value: Any) -> bool:
    """Return whether a JSON value is a whole number (true and false are none)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < float("inf")


def plain_fields(record: Any) -> dict[str, Any]:
    """Return a dataclass's own fields by name, not copied."""
    return {field.name: getattr(record, field.name) for field in dataclasses.fields(record)}


def json_word(value: Any) -> str:
    """Return the words for the type of a JSON value."""
    return _WORDS.get(type(value), "a number")
