"""Laws of writing settings down."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given

from onebase.config import (
    METHODS,
    DataPart,
    DataSettings,
    Lora,
    Settings,
    TrainSettings,
    describe_settings,
    diff_settings,
    dump_settings,
    read_settings,
    settings_from,
    settings_json_schema,
)
from onebase.config.section import fields_of
from onebase.config.strict_yaml import parse_yaml
from tests.config.trees import adapters, make_files, trees


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("settings"))


@given(trees())
def test_what_is_written_is_read_as_equal_settings_from_any_folder(folder: Path, tree: dict[str, Any]) -> None:
    settings = settings_from(tree, folder=folder)
    elsewhere = folder / "runs" / "1"
    elsewhere.mkdir(parents=True, exist_ok=True)
    (elsewhere / "config.yaml").write_text(dump_settings(settings), encoding="utf-8")
    again = read_settings(elsewhere / "config.yaml")
    assert again == settings
    assert diff_settings(settings, again) == []
    assert dump_settings(again) == dump_settings(settings)


@given(trees(), trees())
def test_a_difference_is_shown_exactly_where_the_written_files_differ(
    folder: Path, one: dict[str, Any], other: dict[str, Any]
) -> None:
    old, new = settings_from(one, folder=folder), settings_from(other, folder=folder)
    differences = diff_settings(old, new)
    assert [(name, after, before) for name, before, after in differences] == diff_settings(new, old)
    assert (differences == []) == (old == new) == (dump_settings(old) == dump_settings(new))
    before, after = parse_yaml(dump_settings(old)).value, parse_yaml(dump_settings(new)).value
    for name, was, becomes in differences:
        *section, leaf = name.split(".")
        for key in section:
            before_in, after_in = before.get(key, {}), after.get(key, {})
        assert (before_in if section else before).get(leaf) == was
        assert (after_in if section else after).get(leaf) == becomes


def test_a_default_that_has_no_effect_is_not_written(folder: Path) -> None:
    train = TrainSettings(steps=5, warmup_steps=1)
    settings = Settings(model="m", data=DataSettings(train=(DataPart(path="hub:a/b:train"),)), train=train)
    written = parse_yaml(dump_settings(settings)).value
    assert not {"epochs", "warmup_ratio", "lr_step_gamma", "keep_best", "eval_every"} & written["train"].keys()
    assert written["train"]["learning_rate"] == Lora.default_learning_rate


def test_relative_paths_of_settings_made_in_python_are_written_from_the_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    parts = (DataPart(path="a.jsonl"), DataPart(path="b.jsonl", weight=2), DataPart(path="hub:a/b:train"))
    adapter = Lora(init_from=Path("old"))
    settings = Settings(model="model", data=DataSettings(train=parts, template=Path("t.jinja")), adapter=adapter)
    written = parse_yaml(dump_settings(settings)).value
    assert written["model"] == str(tmp_path / "model")
    assert written["data"]["template"] == str(tmp_path / "t.jinja")
    assert written["adapter"]["init_from"] == str(tmp_path / "old")
    assert written["data"]["train"] == [
        str(tmp_path / "a.jsonl"), {"path": str(tmp_path / "b.jsonl"), "weight": 2}, "hub:a/b:train"
    ]  # fmt: skip


def test_every_setting_is_described_by_its_own_field() -> None:
    rows = describe_settings()
    assert [(row.name, row.help) for row in rows] == [(name, field.description) for name, field in fields_of(Settings)]
    assert all(row.type and row.default for row in rows)


def test_every_described_default_can_be_written_in_a_file(folder: Path) -> None:
    for row in describe_settings():
        needed = {"model": "m", "data": {"train": "a.jsonl"}, "adapter": {"method": row.method or "lora"}}
        plain = settings_from(needed, folder=folder)
        if row.default not in ("required", "none") and row.name != "train.keep_best":
            assert settings_from(needed, folder=folder, overrides=_alone(row.name, row.default)) == plain


def test_the_settings_of_every_method_are_described_under_its_name() -> None:
    for name, kind in METHODS.items():
        rows = [row for row in describe_settings() if row.method == name]
        assert [row.name for row in rows] == [f"adapter.{field}" for field in kind.model_fields]
        assert all((row.name.startswith("adapter.")) == bool(row.method) for row in describe_settings())


@given(adapters)
def test_another_method_is_a_difference_in_every_setting_that_is_not_shared(
    folder: Path, adapter: dict[str, Any]
) -> None:
    def settings(**values: Any) -> Settings:
        return settings_from({"model": "m", "data": {"train": "hub:a/b:train"}, "adapter": values}, folder=folder)

    one, other = settings(**adapter), settings(method="full" if adapter.get("method") != "full" else "ia3")
    differ = {name for name, _, _ in diff_settings(one, other)}
    own = set(type(one.adapter).model_fields) - set(type(other.adapter).model_fields)
    written = parse_yaml(dump_settings(one)).value["adapter"]
    assert "adapter.method" in differ
    assert {f"adapter.{name}" for name in own & written.keys()} <= differ


def _alone(name: str, default: str) -> list[str]:
    """Return the overrides that set one setting, and what it needs."""
    return [] if name == "train.lr_step_gamma" else [f"{name}={default}"]


def test_the_json_schema_has_a_help_for_every_setting_and_allows_no_other() -> None:
    schema = settings_json_schema()
    assert json.loads(json.dumps(schema)) == schema

    def leaves(part: dict[str, Any], prefix: str) -> list[tuple[str, str | None]]:
        found = []
        assert part["additionalProperties"] is False
        for name, inner in part["properties"].items():
            kinds = [kind for kind in (inner, *inner.get("anyOf", ())) if "$ref" in kind]
            for kind in kinds:
                found += leaves(schema["$defs"][kind["$ref"].rpartition("/")[2]], f"{prefix}{name}.")
            if not kinds:
                found.append((prefix + name, inner.get("description")))
        return found

    assert leaves(schema, "") == [(row.name, row.help) for row in describe_settings()]
    assert schema["required"] == ["model", "data"]


def test_the_json_schema_holds_the_settings_of_one_method_and_takes_lora_where_none_is_named() -> None:
    schema = settings_json_schema()
    kinds = [schema["$defs"][kind.__name__] for kind in METHODS.values()]
    assert [kind["properties"]["method"]["const"] for kind in kinds] == list(METHODS)
    assert [kind["properties"]["method"]["const"] for kind in kinds if "method" not in kind.get("required", ())] == [
        "lora"
    ]
