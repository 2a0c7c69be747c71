"""Laws of reading a settings file and `--set`."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.config import Lora, PromptTuning, Settings, read_settings, settings_from
from onebase.config.strict_yaml import write_yaml
from onebase.errors import ConfigError
from tests.config.trees import FILES, make_files, trees

NEW_LINE = "\n"
SMALL = "model: org/name\ndata: {train: a.jsonl}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_files(tmp_path_factory.mktemp("settings"))


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def fault(path: Path, *overrides: str) -> list[str]:
    """Return the lines of the error that reading raises."""
    with pytest.raises(ConfigError) as caught:
        read_settings(path, overrides)
    return str(caught.value).split("\n")


@given(trees())
def test_a_file_and_plain_values_make_the_same_settings(folder: Path, tree: dict[str, Any]) -> None:
    path = write(folder, write_yaml(tree))
    assert read_settings(path) == settings_from(tree, folder=folder)


@given(trees())
def test_reading_changes_no_value_it_is_given(folder: Path, tree: dict[str, Any]) -> None:
    before = repr(tree)
    settings_from(tree, folder=folder)
    assert repr(tree) == before


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted names and values: sections opened, settings that are mappings not."""
    opened: dict[str, Any] = {}
    for key, value in tree.items():
        if not prefix and isinstance(value, dict):
            opened |= flat(value, f"{key}.")
        else:
            opened[prefix + key] = value
    return opened


@given(trees())
def test_set_says_the_same_as_the_file(folder: Path, tree: dict[str, Any]) -> None:
    paths = {"model", "data.train", "data.valid", "data.test", "data.template", "adapter.init_from"}
    written = {name: write_yaml([value]) for name, value in flat(tree).items() if name not in paths}
    overrides = [f"{name}={text[1:].removesuffix(NEW_LINE)}" for name, text in written.items()]
    overrides = [text for text in overrides if NEW_LINE not in text]
    named = {text.partition("=")[0] for text in overrides}
    rest: dict[str, Any] = {}
    for name, value in flat(tree).items():
        if name not in named:
            section, _, leaf = name.rpartition(".")
            (rest.setdefault(section, {}) if section else rest)[leaf] = value
    assert settings_from(rest, folder=folder, overrides=overrides) == settings_from(tree, folder=folder)


@given(st.floats(1e-12, 1), st.sampled_from(["{!r}", "{:.3e}", "{:E}"]))
def test_a_learning_rate_is_a_number_in_the_file_and_in_set(folder: Path, rate: float, form: str) -> None:
    written = form.format(rate)
    path = write(folder, SMALL + f"train: {{learning_rate: {written}}}\n")
    assert read_settings(path).train.learning_rate == float(written)
    assert read_settings(path, [f"train.learning_rate={written}"]).train.learning_rate == float(written)


def test_without_a_learning_rate_the_methods_own_is_written_down(folder: Path) -> None:
    assert read_settings(write(folder, SMALL)).train.learning_rate == Lora.default_learning_rate


def test_paths_count_from_the_file_and_in_set_from_the_working_directory(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here.jsonl").touch()
    (tmp_path / "model").mkdir()
    (folder / "sub" / "model").mkdir(exist_ok=True)
    monkeypatch.chdir(tmp_path)
    text = "model: model\ndata: {train: [../a.jsonl, {path: d.csv, weight: 2}], template: ../template.jinja}\n"
    path = write(folder / "sub", text + "adapter: {init_from: ../adapter}\n")
    settings = read_settings(path)
    assert settings.model == str(folder / "sub" / "model")
    assert [part.path for part in settings.data.train] == [str(folder / "a.jsonl"), str(folder / "sub" / "d.csv")]
    assert settings.data.template == folder / "template.jinja"
    assert settings.adapter.init_from == folder / "adapter"
    settings = read_settings(path, ["data.train=[here.jsonl]", "model=model", "data.template=here.jsonl"])
    assert settings.model == str(tmp_path / "model")
    assert settings.data.train[0].path == str(settings.data.template) == str(tmp_path / "here.jsonl")


def test_a_model_that_is_no_path_stays_a_name_and_a_hub_data_set_stays_one(folder: Path) -> None:
    settings = read_settings(write(folder, "model: org/name\ndata: {train: hub:org/rows:train}\n"))
    assert settings.model == "org/name"
    assert settings.data.train[0].path == "hub:org/rows:train"
    assert settings.data.train[0].on_hub


def test_links_keep_their_names(folder: Path) -> None:
    (folder / "sub" / "link").symlink_to(folder / "a.jsonl")
    settings = read_settings(write(folder, "model: m\ndata: {train: sub/link}\n"))
    assert settings.data.train[0].path == str(folder / "sub" / "link")


def test_set_replaces_the_setting_that_it_stands_instead_of(folder: Path) -> None:
    path = write(folder, SMALL + "train: {epochs: 3, warmup_ratio: 0.1}\n")
    settings = read_settings(path, ["train.steps=7", "train.warmup_steps=2"])
    assert (settings.train.steps, settings.train.warmup_steps) == (7, 2)
    assert "but both are given" in fault(path, "train.steps=7", "train.epochs=2")[1]


def test_the_last_of_equal_overrides_wins_and_whole_sections_and_keys_with_dots_can_be_set(folder: Path) -> None:
    path = write(folder, SMALL + "adapter:\ntrain: {seed: 3}\n")
    overrides = ["adapter.r=1", "adapter={r: 2}", "adapter.rank_pattern.layers.0.q_proj=4", "train={}", "adapter.r=3"]
    settings = read_settings(path, overrides)
    assert settings.adapter == Lora(r=3, rank_pattern={"layers.0.q_proj": 4})
    assert settings.train.seed == 0


def test_all_faults_of_file_and_set_are_one_error_in_the_order_of_the_file(folder: Path) -> None:
    path = write(
        folder,
        "model: ./nothere\n"
        "task: seq2seq\n"
        "data:\n"
        "  train: [a.json, {path: sub/e.csv, weight: 0}]\n"
        "adapter:\n"
        "  r: 0\n"
        "  lora_aplha: 3\n"
        "  lora_dropout: 0\n"
        "  lora_dropout: 1\n"
        "train: {steps: 10, epochs: 2, eval_every: 5}\n"
        "sweep: {grid: {}}\n",
        "faults.yaml",
    )
    assert fault(path, "train.batch_size=x", "adapter.target_modules=[", "foo", "train.max_length=3") == [
        f"15 problems in {path}",
        "  --set foo: must be NAME=VALUE, for example --set adapter.r=32",
        f"  line 1, model: there is no file or folder {folder}/nothere.",
        "  line 2, task: must be 'chat', 'text', 'classify' or 'regress', got 'seq2seq'. 'seq2seq' is not available in this version.",
        f"  line 4, data.train[0]: there is no file or folder {folder}/a.json. Close names there: a.jsonl, b c.jsonl",
        f"  line 4, data.train[1].path: there is no file or folder {folder}/sub/e.csv. Close names there: d.csv",
        "  line 4, data.train[1].weight: must be above 0, got 0.",
        "  line 6, adapter.r: must be at least 1, got 0.",
        "  line 7, adapter.lora_aplha: unknown setting; closest is 'lora_alpha'.",
        "  line 9, adapter.lora_dropout: is given twice, on lines 8 and 9. Keep one.",
        "  line 10, train.steps: stands instead of 'epochs', but both are given (10 and 2). Remove one.",
        "  line 10, train.eval_every: needs rows to evaluate on, but data.valid is not given; got 5. "
        "Add, for example: data.valid: 0.05",
        "  line 11, sweep: not available in this version; run 'onebase train' once for each value, with --set.",
        "  --set adapter.target_modules: line 1, column 2: not valid YAML: expected the node content, but found "
        "'<stream end>'. Quote the value, got '['.",
        "  --set train.batch_size: must be a whole number, got 'x'.",
        "  --set train.max_length: unknown setting at this place; write it as data.max_length.",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "model: is missing. Write, for example: model: smollm2-135m-instruct"),
        ("# only a comment\n", "data: is missing. Write, for example: data: {train: train.jsonl}"),
        ("model: m\n\ndata: {}\n", "line 3, data.train: is missing. Write, for example: train: train.jsonl"),
        (
            "model: m\ndata:\n",
            "line 2, data: must be a mapping, got nothing. Write, for example: data: {train: train.jsonl}",
        ),
        ("- model\n", "must be a mapping that begins with 'model:', got ['model']."),
        ("just text\n", "must be a mapping that begins with 'model:', got 'just text'."),
        ("model: m\ndata: {train: a.jsonl\n", "line 3, column 1: not valid YAML: expected ',' or '}'"),
        ("model: m\ndata: {train: ''}\n", "line 2, data.train: must be text that is not empty, got ''."),
        ("model: m\ndata: {train: [{weight: 1}]}\n", "line 2, data.train[0].path: is missing."),
        ("model: m\ndata: {train: org/rows}\n", "A data set of the hub is written hub:org/rows:train"),
        ("model: no.gguf\ndata: {train: a.jsonl}\n", "line 1, model: there is no file or folder"),
        ("model: m\ndata: {train: a.jsonl, template: t.jinja}\n", "Close names there: template.jinja"),
        ("model: m\ndata: {train: a.jsonl}\nadapter: {init_from: adaptr}\n", "Close names there: adapter"),
        ("model: m\ndata: {train: [a.jsonl, 3]}\n", "line 2, data.train[1]: must be a mapping, got 3."),
        ("model: m\ndata: {train: a.jsonl}\n7: x\n", "line 3, a key must be text, got '7'. Quote it."),
    ],
)
def test_a_file_without_what_is_needed_says_so(folder: Path, text: str, said: str) -> None:
    assert said in "\n".join(fault(write(folder, text, "needed.yaml")))


def test_a_file_that_cannot_be_read_is_named_with_the_reason(folder: Path, tmp_path: Path) -> None:
    path = write(tmp_path, SMALL)
    assert fault(tmp_path / "rn.yaml") == [
        f"{tmp_path}/rn.yaml: there is no file or folder {tmp_path}/rn.yaml. Close names there: run.yaml"
    ]
    assert fault(tmp_path / "no" / "run.yaml") == [f"{tmp_path}/no/run.yaml: there is no folder {tmp_path}/no."]
    assert fault(tmp_path) == [f"{tmp_path}: is a folder; a settings file is needed. Close names there: run.yaml"]
    path.write_bytes(b"model: m\nx: \xff\n")
    assert fault(path) == [f"{path} line 2: is not UTF-8 text (byte 12). Save it as UTF-8."]


def test_a_byte_order_mark_and_windows_line_ends_are_no_fault(folder: Path) -> None:
    path = folder / "windows.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALL.replace("\n", "\r\n").encode())
    assert read_settings(path) == read_settings(write(folder, SMALL))


@pytest.mark.parametrize("override", ["", "=", "=3", "adapter.r", "adapter..r=3", ".r=3", "adapter.=3"])
def test_an_override_without_name_or_value_is_refused_as_it_was_written(folder: Path, override: str) -> None:
    path = write(folder, SMALL)
    assert fault(path, override)[1] == f"  --set {override}: must be NAME=VALUE, for example --set adapter.r=32"


@pytest.mark.parametrize("name", FILES)
def test_a_data_file_may_have_any_name(folder: Path, name: str) -> None:
    settings = settings_from({"model": "m", "data": {"train": f"./{name}"}}, folder=folder)
    assert settings.data.train[0].path == str(folder / name)


def test_settings_from_says_where_the_values_came_from(folder: Path) -> None:
    with pytest.raises(ConfigError, match=r"^1 problem in trial 3\n  adapter\.r: must be at least 1, got 0\.$"):
        settings_from({"model": "m", "data": {"train": "a.jsonl"}, "adapter": {"r": 0}}, where="trial 3", folder=folder)
    assert isinstance(settings_from({"model": "m", "data": {"train": "hub:a/b:train"}}), Settings)


def test_an_override_may_choose_the_method_and_its_settings(folder):
    path = write(folder, SMALL)
    overrides = ["adapter.method=prompt-tuning", "adapter.num_virtual_tokens=3"]
    settings = read_settings(path, overrides)
    assert settings.adapter == PromptTuning(num_virtual_tokens=3)
    assert settings.train.learning_rate == PromptTuning.default_learning_rate
    rows = ["adapter.trainable_token_indices.model.embed_tokens=[1]", "adapter.alpha_pattern.q.0=3"]
    chosen = read_settings(path, rows).adapter
    assert chosen == Lora(trainable_token_indices={"model.embed_tokens": [1]}, alpha_pattern={"q.0": 3})


def test_an_override_that_changes_the_method_says_which_settings_of_the_file_are_another_ones(folder):
    path = write(folder, SMALL + "adapter: {r: 3}\n")
    assert "adapter.r: unknown setting of ia3; it belongs to lora." in fault(path, "adapter.method=ia3")[1]
