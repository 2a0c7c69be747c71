"""The generated parts of the docs say what the code says."""

import importlib.util
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
