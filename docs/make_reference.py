"""Writes what the docs take from the code: the tables of settings.md and the commands of cli.md.

Run it after a setting or an option has changed: python docs/make_reference.py. It replaces what stands between the
marks <!-- NAME begins --> and <!-- NAME ends -->; tests/test_reference.py fails where that is not what the code says.

The README shows what `make demo` printed, which no test can know: with runs/demo removed,
COLUMNS=100 make demo > demo.txt 2>&1; python docs/make_reference.py demo.txt
"""

import inspect
import json
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, get_args, get_type_hints

import typer

from onebase.cli.app import app
from onebase.config.foreign import ABSENT, OURS
from onebase.config.methods import METHODS
from onebase.config.writing import describe_settings
from onebase.files.peft_config import FORMAT_OF
from onebase.files.serving import FACTS, PROPERTIES, TOOLS

DOCS = Path(__file__).parent
BENCH = DOCS.parent / "bench"
_KINDS = {Path: "a path", str: "text", float: "a number", int: "a whole number"}
_SECTIONS = {
    "": "The model",
    "data": "data: the rows",
    "adapter": "adapter: what is learned",
    "train": "train: how it is learned",
    "eval": "eval: how it is measured",
}


def settings_tables() -> str:
    """Return a table of settings for each section of the file, for the adapter's one for each method."""
    rows = describe_settings()
    parts = []
    for section, title in _SECTIONS.items():
        own = [row for row in rows if row.name.rpartition(".")[0] == section]
        parts.append(f"## {title}")
        for method in dict.fromkeys(row.method for row in own):
            if method:
                parts.append(f"### {method}\n\n{(METHODS[method].__doc__ or '').splitlines()[0]}")
            cells = ((f"`{row.name}`", row.type, row.default, row.help) for row in own if row.method == method)
            parts.append(_table(("setting", "takes", "default", "what it does"), cells))
    return "\n\n".join(parts)


def methods_table() -> str:
    """Return a table of the methods: what each is, its learning rate, its format."""
    rows = (
        (
            f"`{name}`",
            (kind.__doc__ or "").splitlines()[0],
            kind.rates(),
            FORMAT_OF[kind].peft_type,
        )
        for name, kind in METHODS.items()
    )
    return _table(("method", "what it is", "learning rate", "format"), rows)


def foreign_tables() -> str:
    """Return a table of other tools' names, and one of what has no setting."""
    known = []
    for name, ours in OURS.items():
        setting, _, note = ours.partition("; ")
        known.append((f"`{name}`", f"`{setting}`" + (f": {note}" if note else "")))
    absent = ((f"`{name}`", why) for name, why in ABSENT.items())
    return f"{_table(('elsewhere', 'here'), known)}\n\n{_table(('elsewhere', 'here'), absent)}"


def commands() -> str:
    """Return each command with its help, its arguments and options, and its examples."""
    return "\n\n".join(_command(words, command) for words, command in _walk((), typer.main.get_command(app)))


def _walk(words: tuple[str, ...], command: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (words, command) of every verb, groups before what is in them."""
    if words:
        yield words, command
    for name, inner in getattr(command, "commands", {}).items():
        yield from _walk((*words, name), inner)


def _command(words: tuple[str, ...], command: Any) -> str:
    arguments = [parameter for parameter in command.params if parameter.param_type_name == "argument"]
    options = [parameter for parameter in command.params if parameter.param_type_name == "option"]
    shown = " ".join(("onebase", *words, *(_placeholder(argument) for argument in arguments)))
    parts = [f"## {' '.join(words)}", f"`{shown}`", "\n\n".join(_paragraphs(command.help or ""))]
    rows = [(f"`{_placeholder(p)}`", "", _default(p), p.help or "") for p in arguments]
    types = get_type_hints(inspect.unwrap(command.callback)) if command.callback else {}
    rows += [(f"`{p.opts[0]}`", _takes(p, types), _default(p), p.help or "") for p in options if p.name != "help"]
    if rows:
        parts.append(_table(("", "takes", "default", ""), rows))
    examples = [line.strip() for line in (command.epilog or "").splitlines() if line.strip().startswith("onebase ")]
    if examples:
        parts.append("```sh\n" + "\n".join(examples) + "\n```")
    return "\n\n".join(parts)


def _placeholder(argument: Any) -> str:
    given = argument.metavar or str(argument.name).upper()
    return f"{given}..." if argument.nargs == -1 else str(given)


def _takes(option: Any, types: dict[str, Any]) -> str:
    if option.metavar or option.is_flag:
        return str(option.metavar or "")
    kinds = get_args(types[option.name]) or (types[option.name],)
    return next(words for kind, words in _KINDS.items() if kind in kinds)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    if parameter.default is None or getattr(parameter, "is_flag", False):
        return ""
    return str(parameter.default)


def _paragraphs(text: str) -> list[str]:
    return [" ".join(part.split()) for part in re.split(r"\n\s*\n", text) if part.strip()]


def _table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = [list(head), *map(list, rows)]
    written = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines]
    return "\n".join([written[0], "|" + "---|" * len(lines[0]), *written[1:]])


def serving_tables() -> str:
    """Return what tools read of adapters: their scales, what hinders which, and why."""
    tools = ((tool.name, tool.scaling, tool.version, f"`{tool.sources}`") for tool in TOOLS.values())
    verdicts = (
        (name, PROPERTIES[name], *(FACTS[name][tool].verdict if tool in FACTS[name] else "" for tool in TOOLS))
        for name in PROPERTIES
    )
    reasons = (
        (name, tool, fact.why, "" if fact.todo is None else f"`{fact.todo}`" if "--" in fact.todo else fact.todo)
        for name, by_tool in FACTS.items()
        for tool, fact in by_tool.items()
    )
    return "\n\n".join(
        (
            _table(("tool", "scale of B @ A", "read at", "in"), tools),
            _table(("", "an adapter with", *TOOLS), verdicts),
            _table(("", "tool", "why", "instead"), reasons),
        )
    )


def comparison() -> str:
    """Return the table of every method at its default on real rows, from the record that bench/compare_methods.py wrote."""
    sys.path.insert(0, str(BENCH))
    try:
        from compare_methods import table
    finally:
        sys.path.remove(str(BENCH))
    return str(table(json.loads((BENCH / "compare_methods.json").read_text(encoding="utf-8"))))


PARTS = {
    "export.md": {"what tools read": serving_tables},
    "methods.md": {"methods": methods_table, "comparison": comparison},
    "settings.md": {"settings": settings_tables, "other tools' names": foreign_tables},
    "cli.md": {"commands": commands},
}


def page(name: str) -> str:
    """Return a page with its generated parts as the code says now."""
    text = (DOCS / name).read_text(encoding="utf-8")
    for part, make in PARTS[name].items():
        begin, end = f"<!-- {part} begins -->", f"<!-- {part} ends -->"
        before, found, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        assert found and closed, f"docs/{name} needs the marks {begin} and {end}"
        text = f"{before}{begin}\n\n{make()}\n\n{end}{after}"
    return text


def put_demo(output: Path) -> None:
    """Put what `make demo` printed into the README."""
    readme = DOCS.parent / "README.md"
    begin, end = "<!-- demo output begins -->", "<!-- demo output ends -->"
    before, _, rest = readme.read_text(encoding="utf-8").partition(begin)
    lines = [line.rstrip() for line in output.read_text(encoding="utf-8").splitlines()]
    block = "\n".join(["```text", *lines, "```"])
    readme.write_text(f"{before}{begin}\n\n{block}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def main() -> None:
    """Write the pages; with a file of what `make demo` printed, write the README's part of it."""
    if len(sys.argv) > 1:
        put_demo(Path(sys.argv[1]))
    for name in PARTS:
        (DOCS / name).write_text(page(name), encoding="utf-8")


if __name__ == "__main__":
    main()
