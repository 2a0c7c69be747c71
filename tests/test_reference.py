"""The generated parts of the docs say what the code says."""

import importlib.util
import re
from dataclasses import fields
from pathlib import Path

import pytest

from onebase.files.result import Result

DOCS = Path(__file__).parents[1] / "docs"

spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
assert spec is not None and spec.loader is not None
make_reference = importlib.util.module_from_spec(spec)
spec.loader.exec_module(make_reference)


@pytest.mark.parametrize("name", make_reference.PARTS)
def test_a_generated_page_is_what_the_code_says_now(name: str) -> None:
    written = (DOCS / name).read_text(encoding="utf-8")
    assert written == make_reference.page(name), "run: python docs/make_reference.py"


def test_the_page_on_the_run_folder_names_every_field_of_result_and_metrics() -> None:
    from onebase.train.progress import StepRecord

    text = (DOCS / "run-folder.md").read_text(encoding="utf-8")
    names = {field.name for kind in (Result, StepRecord) for field in fields(kind)} - {"more"}
    assert not [name for name in names if f"`{name}`" not in text]


def test_the_tree_in_the_readme_names_every_file_of_the_source() -> None:
    tree = (DOCS.parent / "README.md").read_text(encoding="utf-8").partition("## The code")[2]
    source = DOCS.parent / "src" / "onebase"
    shown: dict[str, set[str]] = {}
    room = ""
    for line in tree.partition("src/onebase/")[2].partition("\ntests/")[0].splitlines():
        names = re.findall(r"[a-z_0-9]+(?:\.py|/)", line.strip()[:24])
        depth = len(line) - len(line.lstrip())
        room = names[0].rstrip("/") if depth == 4 and names[0].endswith("/") else "" if depth == 4 else room
        shown.setdefault(room, set()).update(name for name in names if name.endswith(".py"))
    there: dict[str, set[str]] = {}
    for path in source.rglob("*.py"):
        if not path.name.startswith("__"):
            there.setdefault("" if path.parent == source else path.parent.name, set()).add(path.name)
    assert shown == there
