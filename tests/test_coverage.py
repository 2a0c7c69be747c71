"""The table of what works is what trying it comes to now."""

import re
from functools import cache
from pathlib import Path

import pytest
from docs import coverage_cell, make_coverage
from docs.notes import Notes

from onebase.adapters.build import BUILDERS
from onebase.adapters.merging import merged_state
from onebase.config.methods import METHODS
from onebase.files.peft_format import read_adapter
from tests import families

WRITTEN = make_coverage.PAGE.read_text(encoding="utf-8")


def test_every_method_is_tried() -> None:
    tried = {kind for kind, _ in families.variants().values()}
    assert tried == set(BUILDERS) <= set(METHODS.values())


def test_a_setting_that_is_silently_left_out_ends_the_script(tmp_path: Path) -> None:
    bench = coverage_cell.Bench("llama", tmp_path / "adapter")
    kind, settings = families.VARIANTS["lora"]
    columns = make_coverage.columns_of(bench.bank)["linear"]
    assert coverage_cell.tried(bench, kind, settings, columns).word == coverage_cell.YES
    parts = bench.bank.add("elsewhere", kind(**settings, target_modules=["down_proj"])).parts
    with pytest.raises(AssertionError, match="nothing was put on"):
        coverage_cell.check_place(bench.bank, parts, columns[0].on(["model.layers.*.self_attn.q_proj"]))


def test_what_no_gradient_reaches_and_what_shares_no_batch_is_named_among_layers_that_can(tmp_path: Path) -> None:
    bench = coverage_cell.Bench("t5", tmp_path / "adapter")
    columns = make_coverage.columns_of(bench.bank)["whole module"]
    found = coverage_cell.tried(bench, *families.VARIANTS["ln-tuning"], columns)
    assert found.word == coverage_cell.PART
    assert "not on shared: " in found.why and "alone on encoder.block.*" in found.why and "pooler" not in found.why
    bench = coverage_cell.Bench("bert", tmp_path / "adapter")
    found = coverage_cell.tried(bench, *families.VARIANTS["lora"], make_coverage.columns_of(bench.bank)["linear"])
    assert (found.word, found.why) == (coverage_cell.PART, f"not on pooler.dense: {coverage_cell.NOT_REACHED}")


@pytest.mark.parametrize("broken", ["check_file", "merged"])
def test_a_file_or_merged_model_that_differs_ends_the_script(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench = coverage_cell.Bench("llama", tmp_path / "adapter")
    read, state = read_adapter, merged_state
    if broken == "check_file":

        def spoiled(folder: Path) -> object:
            stored = read(folder)
            next(iter(stored.tensors.values())).mul_(2)
            return stored

        monkeypatch.setattr(coverage_cell, "read_adapter", spoiled)
    else:
        monkeypatch.setattr(
            coverage_cell,
            "merged_state",
            lambda bank, name: state(bank, name) | {"model.norm.weight": bench.bank.base.model.model.norm.weight * 2},
        )
    columns = make_coverage.columns_of(bench.bank)["linear"]
    with pytest.raises(AssertionError, match="of the file" if broken == "check_file" else "of the merged model"):
        coverage_cell.tried(bench, *families.VARIANTS["lora"], columns)


class Tokenizer:
    """Words by their length."""

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [len(word) for word in text.split()]}


@cache
def row_of(name: str, label: str, folder: Path) -> dict[str, coverage_cell.Outcome]:
    bench = coverage_cell.Bench(name, folder)
    bench.bank.base.tokenizer = Tokenizer()
    variant = {**families.VARIANTS, **{key: (kind, more) for key, (_, kind, more) in families.SAME.items()}}[label]
    columns = make_coverage.columns_of(bench.bank)
    return {column: coverage_cell.tried(bench, *variant, named) for column, named in columns.items()}


@pytest.mark.parametrize(
    "name", ["plain", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama-tied", "qwen3-moe"))]
)
@pytest.mark.parametrize("label", families.SAME)
def test_a_variant_without_a_row_has_the_row_that_the_page_names(
    label: str, name: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "adapter"
    row = families.SAME[label][0]
    found = {key: without_start(outcome) for key, outcome in row_of(name, label, folder).items()}
    assert found == {key: without_start(outcome) for key, outcome in row_of(name, row, folder).items()}


def without_start(outcome: coverage_cell.Outcome) -> tuple[str, str, str]:
    return outcome.word, outcome.why.replace("pissa_niter_4", "pissa"), outcome.merged


def told(text: str, reasons: list[str]) -> str:
    """Return a table with the reasons in the place of their numbers."""
    return re.sub(r"\[(\d+)\]", lambda mark: f"[{reasons[int(mark[1]) - 1]}]", text)


@pytest.mark.parametrize(
    "family", [f if f == "any module" else pytest.param(f, marks=pytest.mark.slow) for f in families.FAMILIES]
)
def test_the_page_says_what_trying_says_now(family: str) -> None:
    notes = Notes()
    table = told(make_coverage.section(family, notes), notes.texts)
    reasons = re.findall(r"^- \[\d+\] (.*)\.$", WRITTEN, re.M)
    [written] = [part for part in told(WRITTEN, reasons).split("\n\n## ") if part.lower().startswith(f"{family}\n")]
    assert f"## {written}" == table, "run: python -m docs.make_coverage"


def test_around_its_tables_the_page_says_what_it_says_now() -> None:
    notes = Notes()
    notes.texts = re.findall(r"^- \[\d+\] (.*)\.$", WRITTEN, re.M)
    tables = re.findall(r"^## .*?\n\nTried on .*?(?=\n\n## )", WRITTEN, re.M | re.S)
    assert len(tables) == len(families.FAMILIES)
    assert make_coverage.page(tables, notes) == WRITTEN, "run: python -m docs.make_coverage"
