"""Reading: from files, folders, hub data sets and lists of these to rows, each with its place.

Text files (JSONL, JSON, CSV) are read here with the standard library, Parquet with pyarrow, hub data sets with the
`datasets` library (this file is its only door). Why not everything through `datasets`: importing it takes about a
second and reading 8,000 JSONL rows with it 0.2 s and a copy in a cache folder, against 0.1 s here; it stops at a broken
line without naming it; and it forces one schema on all rows, so that tool schemas of different rows get each other's
keys as None and a column with strings in one row and lists in another cannot be read at all.

Faults of single rows (a broken line, bytes that are not UTF-8) travel with the row, so that all of them are reported at
once or skipped; faults of a whole file (missing, empty, damaged) raise at once. Nothing is written to the working
directory: hub data sets go to the `datasets` cache, files are read in place. Rows stream; memory is one row, or the
file for `.json`.
"""

import csv
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from onebase.config.paths import checked_path
from onebase.data.rows import BadRow, Fault, Row, weigh
from onebase.data.shapes import OPTIONAL_ROLES, apply_columns, check_columns
from onebase.errors import DataError

Source: TypeAlias = "str | os.PathLike[str] | Mapping[str, Any] | Iterable[Any]"
"""A path, "hub:org/name:split", {path, weight}, a list of these, or a list of rows (mappings)."""

HUB = "hub:"
REACH_TIMEOUT_S = 5.0
_SPLIT_WORDS = {"train": "train", "training": "train", "valid": "valid", "validation": "valid", "val": "valid"}
_SPLIT_WORDS |= {"dev": "valid", "eval": "valid", "test": "test"}


def read_rows(source: Source, *, columns: Mapping[str, str] | None = None) -> Iterator[Row]:
    """Yield the rows of a source in its order, with `columns` (role -> column) applied.

    Raises: DataError if a file or data set cannot be read at all, is empty, or `columns` cannot be meant.
    """
    if not columns:
        yield from _rows(source)
        return
    check_columns(columns)
    unseen = {role: column for role, column in columns.items() if role in OPTIONAL_ROLES}
    for row in _rows(source):
        unseen = {role: column for role, column in unseen.items() if column not in row.values}
        if row.fault:
            yield row
            continue
        try:
            yield Row(apply_columns(row.values, columns), row.place)
        except BadRow as bad:
            yield Row(row.values, row.place, bad.fault)
    if unseen:
        role, column = next(iter(unseen.items()))
        raise DataError(f"data.columns.{role}: no row has a column '{column}'. Correct the name, or remove the line.")


def _rows(source: Any) -> Iterator[Row]:
    if isinstance(source, str) and source.startswith(HUB):
        yield from _read_hub(source)
    elif isinstance(source, (str, os.PathLike)):
        yield from _read_path(Path(source))
    elif isinstance(source, Mapping):
        yield from _weighed(source)
    elif not isinstance(source, Iterable):
        raise DataError(f"data must be a path, 'hub:org/name:split', a list of these, or rows; got {source!r}.")
    else:
        for number, part in enumerate(source, start=1):
            if isinstance(part, Row):
                yield part
            elif isinstance(part, Mapping) and not _is_weighed(part):
                yield Row(part, f"row {number}")
            else:
                yield from _rows(part)


def _is_weighed(part: Mapping[str, Any]) -> bool:
    return "path" in part and set(part) <= {"path", "weight"}


def _weighed(part: Mapping[str, Any]) -> Iterator[Row]:
    weight = part.get("weight", 1)
    if not _is_weighed(part):
        raise DataError(f"a part of a data list must be a path or {{path, weight}}, got {dict(part)!r}.")
    if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < float("inf"):
        raise DataError(f"{part['path']}: weight must be a number above 0, got {weight!r}.")
    yield from weigh(_rows(part["path"]), float(weight))


def _read_path(path: Path) -> Iterator[Row]:
    if not checked_path(path).exists():
        raise DataError(f"{shown(path)}: no such file or folder. A hub data set is written hub:org/name:split.")
    if path.is_dir():
        for file in _files_of(path):
            yield from _read_path(file)
        return
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise DataError(f"{shown(path)}: '{path.suffix}' is no known data format; known are {', '.join(READERS)}.")
    try:
        empty = path.stat().st_size == 0
        count = 0
        for row in () if empty else reader(path):
            count += 1
            yield row
    except OSError as error:
        raise DataError(f"{shown(path)}: cannot be read: {error.strerror or error}.") from error
    if count == 0:
        raise DataError(f"{shown(path)}: the file holds no rows{' (0 bytes)' if empty else ''}.")


def _files_of(folder: Path) -> list[Path]:
    """Return the data files below a folder, in order of name; refuse a folder that mixes splits."""
    visible = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    visible = [file for file in visible if not any(part.startswith(".") for part in file.relative_to(folder).parts)]
    files = [file for file in visible if file.suffix.lower() in READERS]
    if not files:
        held = ", ".join(file.name for file in visible[:5]) or "nothing"
        raise DataError(f"{folder}: no data file in this folder ({', '.join(READERS)}); it holds {held}.")
    splits: dict[str, Path] = {}
    for file in files:
        for word in "".join(c if c.isalnum() else " " for c in str(file.relative_to(folder).with_suffix(""))).split():
            if word.lower() in _SPLIT_WORDS:
                splits.setdefault(_SPLIT_WORDS[word.lower()], file)
    if len(splits) > 1:
        named = ", ".join(str(file.relative_to(folder)) for file in splits.values())
        raise DataError(f"{folder}: the folder mixes training and evaluation files ({named}). Name the files instead.")
    return files


def shown(path: Path) -> str:
    """Return the path as messages show it: relative to the working directory where it lies below it."""
    try:
        return str(path.absolute().relative_to(Path.cwd()))
    except ValueError:
        return str(path)


# --- text files -------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> Iterator[Row]:
    name, offset = shown(path), 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            size = len(line)
            if number == 1:
                line = _without_mark(line, name)
            if line.strip():
                yield _json_row(line, f"{name} line {number}", offset + size - len(line))
            offset += size


def _json_row(line: bytes, place: str, offset: int) -> Row:
    try:
        text = line.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        return Row({}, place, Fault("not UTF-8", _not_utf8(error, offset)))
    try:
        value = json.loads(text, object_pairs_hook=_each_once)
    except (ValueError, RecursionError) as error:
        return Row({}, place, Fault("not valid JSON", f"not valid JSON: {_json_problem(error)}: {_excerpt(text)}"))
    return _object_row(value, text, place)


def _object_row(value: Any, text: str, place: str) -> Row:
    if not isinstance(value, dict):
        kind = type(value).__name__
        advice = " A file that is one JSON list is named .json." if isinstance(value, list) else ""
        return Row(
            {}, place, Fault("not an object", f"a row must be a JSON object, got a {kind}: {_excerpt(text)}.{advice}")
        )
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return Row(
                {}, place, Fault("half a character", "a \\u escape is half of a surrogate pair, not a character.")
            )
    return Row(value, place)


def _read_json(path: Path) -> Iterator[Row]:
    """Read a list of objects; a `.json` file that does not start with "[" is read as JSONL."""
    name = shown(path)
    text = _decoded(_without_mark(path.read_bytes(), name), name)
    if not text.lstrip().startswith("["):
        yield from _read_jsonl(path)
        return
    decoder, space = json.JSONDecoder(object_pairs_hook=_each_once), " \t\r\n"
    position, line, counted = text.index("[") + 1, 1, 0
    while True:
        while position < len(text) and text[position] in space:
            position += 1
        if text[position : position + 1] == "]":
            if rest := text[position + 1 :].strip():
                line += text.count("\n", counted, position)
                raise DataError(f"{name} line {line}: not valid JSON: {_excerpt(rest)} follows the end of the list.")
            return
        line, counted = line + text.count("\n", counted, position), position
        place = f"{name} line {line}"
        try:
            value, end = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{place}: not valid JSON in the row that starts here: {_json_problem(error)}.") from None
        yield _object_row(value, text[position:end], place)
        position = end
        while position < len(text) and text[position] in space:
            position += 1
        if text[position : position + 1] not in (",", "]"):
            line += text.count("\n", counted, position)
            raise DataError(f"{name} line {line}: not valid JSON: expected ',' or ']' after a row of the list.")
        position += text[position] == ","


def _read_csv(path: Path) -> Iterator[Row]:
    name = shown(path)
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default of 128 KiB is less than a long text
    with path.open("rb") as file:
        lines = csv.reader(
            _decoded_lines(file, name), delimiter="\t" if path.suffix.lower() == ".tsv" else ",", strict=True
        )
        header: list[str] | None = None
        while True:
            line = lines.line_num + 1
            try:
                fields = next(lines)
            except StopIteration:
                return
            except csv.Error as error:
                raise DataError(f"{name} line {line}: not valid CSV in the row that starts here: {error}.") from None
            if not fields:
                continue
            if header is None:
                header = _csv_header(fields, name)
            elif len(fields) != len(header):
                problem = f"{len(fields)} fields, but the header names {len(header)}. Quote fields that hold commas."
                yield Row({}, f"{name} line {line}", Fault("fields that do not fit the header", problem))
            else:
                yield Row(dict(zip(header, fields, strict=True)), f"{name} line {line}")


def _csv_header(fields: list[str], name: str) -> list[str]:
    double = {field for field in fields if fields.count(field) > 1}
    if double:
        raise DataError(
            f"{name} line 1: the header names {', '.join(sorted(double))!r} twice; the first line names columns."
        )
    return fields


def _decoded_lines(file: Iterable[bytes], name: str) -> Iterator[str]:
    offset = 0
    for number, line in enumerate(file, start=1):
        size = len(line)
        if number == 1:
            line = _without_mark(line, name)
        try:
            yield line.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{name} line {number}: {_not_utf8(error, offset + size - len(line))}") from None
        offset += size


def _decoded(content: bytes, name: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(f"{name} line {line}: {_not_utf8(error, 0)}") from None


def _without_mark(content: bytes, name: str) -> bytes:
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{name} line 1: the file is UTF-16, not UTF-8. Convert it: iconv -f UTF-16 -t UTF-8.")
    return content.removeprefix(b"\xef\xbb\xbf")


def _not_utf8(error: UnicodeDecodeError, offset: int) -> str:
    byte = error.object[error.start]
    return (
        f"not UTF-8: byte 0x{byte:02x} at offset {offset + error.start} of the file. "
        "Convert the file, for example: iconv -f LATIN1 -t UTF-8."
    )


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return an object of JSON; a name that stands in it twice is an error, where Python would take the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} stands twice in one object")
    return found


def _json_problem(error: Exception) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at column {error.colno}"
    return "nested too deeply" if isinstance(error, RecursionError) else str(error)


def _excerpt(text: str) -> str:
    text = text.strip()
    return repr(text if len(text) <= 60 else text[:57] + "...")


# --- Arrow ------------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Iterator[Row]:
    import pyarrow  # type: ignore[import-untyped]
    import pyarrow.parquet  # type: ignore[import-untyped]

    name = shown(path)
    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(_without_nulls(values), f"{name} row {number}")
    except pyarrow.ArrowException as error:
        raise DataError(f"{name}: not a readable Parquet file (after row {number}): {error}") from None


def _without_nulls(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row without the None that Arrow puts into nested objects for keys that other rows have."""

    def clean(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: clean(item) for key, item in value.items() if item is not None}
        return [clean(item) for item in value] if isinstance(value, list) else value

    return {key: clean(value) for key, value in values.items()}


def _read_hub(name: str) -> Iterator[Row]:
    """Read `hub:org/name:split`; `hub:org/name/config:split` names a configuration, `split` may be "train[:1000]"."""
    repository, _, split = name.removeprefix(HUB).partition(":")
    parts = repository.split("/")
    if not split or len(parts) not in (2, 3) or not all(parts):
        raise DataError(f"'{name}' must be hub:org/name:split or hub:org/name/config:split, as in hub:org/name:train.")
    _check_hub_reachable(name)
    import datasets

    try:
        data = datasets.load_dataset("/".join(parts[:2]), *parts[2:], split=split)
    except Exception as error:  # the library raises anything, from KeyError to classes of its own
        raise DataError(
            f"{name}: the hub data set cannot be opened; looked for '{'/'.join(parts[:2])}', split '{split}', on the hub "
            f"and in {datasets.config.HF_DATASETS_CACHE}: {error}"
        ) from error
    for number, values in enumerate(data, start=1):
        yield Row(_without_nulls(values), f"{name} row {number}")


def _check_hub_reachable(name: str) -> None:
    """Raise a DataError if the hub does not answer at all: the library would retry for half a minute."""
    if {os.environ.get("HF_HUB_OFFLINE", "0").upper(), os.environ.get("HF_DATASETS_OFFLINE", "0").upper()} & {
        "1",
        "ON",
        "YES",
        "TRUE",
    }:
        return
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    try:
        with urllib.request.urlopen(urllib.request.Request(endpoint, method="HEAD"), timeout=REACH_TIMEOUT_S):
            return
    except urllib.error.HTTPError:
        return  # it answered
    except (OSError, ValueError) as error:
        raise DataError(
            f"{name}: {endpoint} cannot be reached ({error}). Offline, HF_HUB_OFFLINE=1 uses a copy that was downloaded "
            "before; a file is given by its path."
        ) from None


READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": _read_jsonl,
    ".ndjson": _read_jsonl,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
    ".parquet": _read_parquet,
}
"""Suffix -> reader; the reader's rows say where they stand."""
