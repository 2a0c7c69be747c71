"""Laws of the documentation: what it shows is a file that a test runs, and every command in it exists.

A block of code is written below a line that names its file, and equals that file or a stretch of its lines:

    <!-- file: examples/define.yaml -->
    ```yaml
    ...
    ```

Blocks of `sh` hold commands (`make TARGET`, `onebase VERB --option`, `pip install`), checked one by one. Blocks of `text` hold
what a command prints, and are not checked.
"""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import typer
import yaml

from onebase.cli.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*") if path.suffix in {".py", ".yaml"})
FENCE = re.compile(r"(?:<!-- file: (?P<file>\S+) -->\n+)?^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.M | re.S)


class Block(NamedTuple):
    """A fenced block of a page."""

    place: str
    language: str
    file: str | None
    text: str


def _blocks() -> Iterator[Block]:
    for page in PAGES:
        content = page.read_text(encoding="utf-8")
        for match in FENCE.finditer(content):
            line = content.count("\n", 0, match.start()) + 1
            yield Block(f"{page.relative_to(ROOT)}:{line}", match["language"], match["file"], match["text"])


CODE = [block for block in _blocks() if block.language not in {"sh", "text"}]
COMMANDS = [(b.place, line) for b in _blocks() if b.language == "sh" for line in b.text.splitlines() if line.strip()]


@pytest.mark.parametrize("block", CODE, ids=lambda block: block.place)
def test_every_block_of_code_is_a_stretch_of_the_file_that_it_names(block: Block) -> None:
    assert block.file, f"{block.place}: name the file above the block: <!-- file: examples/... -->"
    lines = (ROOT / block.file).read_text(encoding="utf-8").splitlines()
    shown = block.text.splitlines()
    starts = [i for i in range(len(lines) - len(shown) + 1) if lines[i : i + len(shown)] == shown]
    assert starts, f"{block.place} shows what {block.file} does not hold"


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.name)
def test_every_example_is_run_by_a_test(example: Path) -> None:
    tests = [path for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__)]
    assert [path for path in tests if example.name in path.read_text(encoding="utf-8")], f"no test names {example.name}"


@pytest.mark.parametrize(("place", "line"), COMMANDS)
def test_every_command_that_is_shown_exists(place: str, line: str) -> None:
    words = shlex.split(line, comments=True)
    assert words[0] in {"make", "onebase", "pip"} or words == ["source", ".venv/bin/activate"], place
    if words[0] == "make":
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        targets = [word for word in words[1:] if "=" not in word]
        assert targets, place
        assert all(re.search(rf"^{re.escape(target)}:", makefile, re.M) for target in targets), place
    if words[0] == "onebase":
        _check_onebase(place, words[1:])


def _check_onebase(place: str, words: list[str]) -> None:
    """Check that the verb exists and knows every option that is written."""
    command = typer.main.get_command(app)
    while words and words[0] in getattr(command, "commands", {}):
        command = command.commands[words.pop(0)]  # type: ignore[attr-defined]
    known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
    written = {word.split("=")[0] for word in words if word.startswith("-")}
    assert not hasattr(command, "commands") or words == ["--help"] or not words, f"{place}: no verb '{' '.join(words)}'"
    assert written <= known | {"--help"}, f"{place}: no option {sorted(written - known)}"


def test_every_page_is_in_the_navigation() -> None:
    def pages(entry: object) -> Iterator[str]:
        if isinstance(entry, str):
            yield entry
        elif isinstance(entry, list | dict):
            for part in entry.values() if isinstance(entry, dict) else entry:
                yield from pages(part)

    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    docs = ROOT / "docs"
    assert sorted(pages(settings["nav"])) == sorted(path.relative_to(docs).as_posix() for path in docs.rglob("*.md"))
