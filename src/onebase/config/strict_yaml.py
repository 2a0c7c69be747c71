"""Read and write YAML as it is meant: YAML 1.2's plain values, no key twice, no tags, and the line of every key.

PyYAML alone follows YAML 1.1, where 2e-4 is text, `no` is false, 010 is eight and 1:30 is ninety, and where the
second of two equal keys wins silently. Anchors, aliases and merge keys (<<) work as usual.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from onebase.errors import Problem

Place = tuple[str | int, ...]

_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    "null": (r"~|null|Null|NULL|", "~nN\0"),
    "bool": (r"true|True|TRUE|false|False|FALSE", "tTfF"),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        "-+.0123456789",
    ),
    "merge": (r"<<", "<"),
}
"""YAML 1.2's core schema (sec. 10.3.2), the first that fits, and the characters each can start with."""


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the plain values of YAML 1.2 instead of 1.1."""

    yaml_implicit_resolvers: dict[str, Any] = {}  # noqa: RUF012 - the name and type are PyYAML's


class _Dumper(yaml.SafeDumper):
    """PyYAML's dumper, which quotes what either version of YAML would take for something else than text."""

    def ignore_aliases(self, data: object) -> bool:
        """Return that no value is written as a reference to another."""
        return True

    def represent_text(self, text: str) -> yaml.ScalarNode:
        """Return a text's node; the line ends that only Unicode knows are escaped, or they would be read as spaces."""
        style = '"' if re.search("[\\x85\\u2028\\u2029]", text) else None
        return self.represent_scalar(_TAG + "str", text, style=style)


_Dumper.add_representer(str, _Dumper.represent_text)
for _name, (_pattern, _first) in _PLAIN.items():
    _starts = ["" if start == "\0" else start for start in _first]
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})\\Z"), _starts)
    _Dumper.add_implicit_resolver(_TAG + _name, re.compile(f"(?:{_pattern})\\Z"), _starts)


@dataclass
class Document:
    """What a YAML text holds: its value, the line of every key and list item (from 1), and what is wrong with it."""

    value: Any = None
    lines: dict[Place, int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    broken: bool = False
    """The text is no YAML at all, so that `value` says nothing."""

    def line_of(self, path: Place) -> int | None:
        """Return the line of the innermost part of a path that was written down, or None."""
        return next((self.lines[path[:size]] for size in range(len(path), 0, -1) if path[:size] in self.lines), None)


def parse_yaml(text: str) -> Document:
    """Return the one document of a YAML text; faults are collected in it, never raised."""
    document = Document()
    try:
        node = _Loader(text).get_single_node()
        if node is not None:
            document.value = _value(node, (), document, ())
    except yaml.YAMLError as error:
        document.broken = True
        document.problems.append(Problem((), _complaint(error)))
    except RecursionError:
        document.broken = True
        document.problems.append(Problem((), "values are nested too deeply."))
    return document


def write_yaml(value: Any) -> str:
    """Return a YAML text that `parse_yaml` reads as the same value."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def _complaint(error: yaml.YAMLError) -> str:
    mark = getattr(error, "problem_mark", None) or getattr(error, "context_mark", None)
    reason = getattr(error, "problem", None) or getattr(error, "reason", None) or str(error)
    if "'\\t'" in reason:
        reason = "a tab, where YAML allows only spaces"
    if "expected a single document" in (getattr(error, "context", None) or ""):
        reason = "a second document begins; a settings file holds one"
    place = f"line {mark.line + 1}, column {mark.column + 1}: " if mark is not None else ""
    return f"{place}not valid YAML: {reason}."


def _value(node: yaml.Node, path: Place, document: Document, outer: tuple[yaml.Node, ...]) -> Any:
    """Return a node's value; note the lines of what is in it, and what is wrong. `outer` are the nodes around it."""
    if isinstance(node, yaml.CollectionNode) and node.tag not in (_TAG + "map", _TAG + "seq"):
        return _refuse(document, path, node, f"has the tag {node.tag!r}. Settings are plain values; remove it.")
    if node in outer:
        return _refuse(document, path, node, "holds itself through an anchor. Write it out.")
    if isinstance(node, yaml.SequenceNode):
        items = []
        for index, item in enumerate(node.value):
            document.lines[(*path, index)] = item.start_mark.line + 1
            items.append(_value(item, (*path, index), document, (*outer, node)))
        return items
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, document, (*outer, node))
    return _scalar(node, path, document)


def _mapping(node: yaml.MappingNode, path: Place, document: Document, outer: tuple[yaml.Node, ...]) -> dict[str, Any]:
    merged: dict[str, Any] = {}
    own: dict[str, Any] = {}
    first_line: dict[str, int] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        if key_node.tag == _TAG + "merge":
            for source in value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]:
                inherited = _value(source, path, document, outer)
                if isinstance(inherited, dict):
                    merged = inherited | merged
                else:
                    _refuse(document, path, source, "'<<' takes a mapping or a list of mappings.")
            continue
        key = key_node.value if isinstance(key_node, yaml.ScalarNode) else None
        if key is None or key_node.tag != _TAG + "str":
            shown = "a list or mapping" if key is None else repr(key)
            document.problems.append(Problem(path, f"a key must be text, got {shown}. Quote it.", line=line))
            key = str(key)
        if key in first_line:
            text = f"is given twice, on lines {first_line[key]} and {line}. Keep one."
            document.problems.append(Problem((*path, key), text, line=line))
        first_line.setdefault(key, line)
        document.lines[(*path, key)] = line
        own[key] = _value(value_node, (*path, key), document, outer)
    for key, line in first_line.items():
        document.lines[(*path, key)] = line
    return merged | own


def _scalar(node: yaml.Node, path: Place, document: Document) -> Any:
    kind, text = node.tag.removeprefix(_TAG), node.value
    try:
        if kind == "str":
            return text
        if kind == "null":
            return None
        if kind == "bool":
            return {"true": True, "false": False}[text.lower()]
        if kind == "int":
            return int(text, {"0x": 16, "0o": 8}.get(text[:2], 10))
        if kind == "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    except (ValueError, KeyError):
        return _refuse(document, path, node, f"is no {kind}: {text[:40]!r}.")
    return _refuse(document, path, node, f"has the tag {node.tag!r}. Settings are plain values; remove it.")


def _refuse(document: Document, path: Place, node: yaml.Node, text: str) -> None:
    document.problems.append(Problem(path, text, line=node.start_mark.line + 1))
