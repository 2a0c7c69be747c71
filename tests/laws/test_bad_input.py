"""Bad input ends `onebase train` with one clear error: place, rule, what to do; no traceback, nothing in the way of a
second try, nothing lost."""

import json
import shutil
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from onebase.base import memory
from onebase.cli import app
from tests.train import runs
from tests.train.runs import Workshop, adapter_bytes, checkpoint_names, metrics

USE, FAILURE = 2, 1
ADAPTER = {"target_modules": ["q_proj", "v_proj"]}
TRAIN = {"steps": 2}


@dataclass
class Command:
    """The command line at work in this process: exit code, standard output and standard error of each call."""

    capsys: Any
    monkeypatch: Any

    def __call__(self, *arguments: object) -> tuple[int, str, str]:
        self.monkeypatch.setattr(sys, "argv", ["onebase", *map(str, arguments)])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as left:
            app.main()
        said = self.capsys.readouterr()
        return int(left.value.code or 0), said.out, said.err


@pytest.fixture
def onebase(capsys, monkeypatch):
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setenv("COLUMNS", "400")
    yield Command(capsys, monkeypatch)
    signal.signal(signal.SIGTERM, before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    with runs.own_home(folder / "home"):
        yield runs.workshop(folder)


@pytest.fixture
def shop(made: Workshop, tmp_path: Path) -> Workshop:
    """A workshop of the test's own, with the settings of a good run in run.yaml."""
    shop = Workshop(tmp_path, tmp_path / "model", tmp_path / "train.jsonl", tmp_path / "valid.jsonl")
    shutil.copytree(made.model, shop.model)
    shutil.copy(made.train, shop.train)
    shutil.copy(made.valid, shop.valid)
    write(shop)
    return shop


def write(shop: Workshop, **sections: Any) -> Path:
    """Write run.yaml, with some sections changed."""
    changed: dict[str, Any] = {"adapter": ADAPTER, "train": TRAIN} | sections
    values = shop.values(**changed)
    return text(shop, yaml.safe_dump(values, sort_keys=False))


def text(shop: Workshop, content: str) -> Path:
    path = shop.folder / "run.yaml"
    path.write_text(content, encoding="utf-8")
    return path


def change(shop: Workshop, old: str, new: str) -> Path:
    path = shop.folder / "run.yaml"
    content = path.read_text()
    assert old in content
    return text(shop, content.replace(old, new, 1))


def rows(shop: Workshop, *broken: str, place: int = 2) -> Path:
    """Put lines into train.jsonl, after `place` good ones."""
    lines = shop.train.read_text().splitlines()
    shop.train.write_text("\n".join([*lines[:place], *broken, *lines[place:]]) + "\n", encoding="utf-8")
    return shop.train


def poison(shop: Workshop) -> Path:
    """Let the model know one token, ~, by a NaN."""
    shutil.rmtree(shop.model)
    return runs.model_folder(shop.model, poison="~")


# name: (what is done to good input, what must be said of it, exit code)
CASES: dict[str, tuple[Callable[[Workshop], object], list[str], int]] = {
    "an unknown key": (
        lambda shop: change(shop, "  lora_alpha:", "  lora_alfa:"),
        ["run.yaml", "line", "adapter.lora_alfa", "lora_alpha"],
        USE,
    ),
    "another tool's key": (
        lambda shop: change(shop, "  batch_size:", "  per_device_train_batch_size:"),
        ["run.yaml", "line", "train.per_device_train_batch_size", "train.batch_size"],
        USE,
    ),
    "a duplicate key": (
        lambda shop: change(shop, "  steps: 2\n", "  steps: 2\n  batch_size: 4\n"),
        ["run.yaml", "line", "batch_size", "twice"],
        USE,
    ),
    "a wrong type": (
        lambda shop: change(shop, "  steps: 2\n", "  steps: many\n"),
        ["run.yaml", "line", "train.steps", "many"],
        USE,
    ),
    "three faults at once": (
        lambda shop: (
            change(shop, "  steps: 2\n", "  steps: 0\n"),
            change(shop, "  batch_size: 4\n", "  batch_size: four\n"),
            change(shop, "  lora_alpha: 8\n", "  lora_alpha: -1\n"),
        ),
        ["3 problems in", "train.steps", "train.batch_size", "adapter.lora_alpha"],
        USE,
    ),
    "a pattern that matches nothing beside one that does": (
        lambda shop: change(shop, "- q_proj\n", "- q_prj\n"),
        ["'q_prj'", "q_proj", "onebase targets"],
        USE,
    ),
    "a broken JSON line": (
        lambda shop: rows(shop, '{"prompt": "a", "completion": '),
        ["train.jsonl line 3", "JSON"],
        USE,
    ),
    "a row with an empty completion": (
        lambda shop: rows(shop, json.dumps({"prompt": "a dog", "completion": ""})),
        ["train.jsonl line 3", "empty", "on_bad_row"],
        USE,
    ),
    "a row whose labels are all cut off": (
        lambda shop: (
            rows(shop, json.dumps({"prompt": "dog " * 60, "completion": "cat"})),
            change(shop, "data:\n", "data:\n  max_length: 64\n"),
        ),
        ["train.jsonl line 3", "max_length", "64"],
        USE,
    ),
    "a file that is not UTF-8": (
        lambda shop: shop.train.write_bytes(shop.train.read_bytes() + '{"prompt": "caf\u00e9"}\n'.encode("latin-1")),
        ["train.jsonl", "UTF-8"],
        USE,
    ),
    "an empty file": (lambda shop: shop.train.write_bytes(b""), ["train.jsonl", "no rows"], USE),
    "a batch that becomes NaN": (
        lambda shop: (
            poison(shop),
            runs.write_rows(shop.train, [{"prompt": "a ~", "completion": "dog"}]),
        ),
        ["step 1", "train.jsonl line 1", "learning_rate"],
        FAILURE,
    ),
    "a damaged safetensors file": (
        lambda shop: (shop.model / "model.safetensors").write_bytes(
            (shop.model / "model.safetensors").read_bytes()[:5000]
        ),
        ["model.safetensors"],
        USE,
    ),
    "an unknown model name while offline": (
        lambda shop: change(shop, f"model: {shop.model}", "model: nobody/nothing-7b"),
        ["nobody/nothing-7b", "offline"],
        USE,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_named_and_leaves_nothing_in_the_way(shop, onebase, case):
    spoil, expected, exit_code = CASES[case]
    out = shop.folder / "run"
    good = {path.name: path.read_bytes() for path in (shop.folder / "run.yaml", shop.train)}
    spoil(shop)
    code, _, said = onebase("train", shop.folder / "run.yaml", "--out", out)
    assert code == exit_code, said
    assert "Traceback" not in said and "bug in onebase" not in said
    for words in expected:
        assert words in said
    # Put right, the same command runs: the folder is not in the way.
    for name, content in good.items():
        (shop.folder / name).write_bytes(content)
    shutil.rmtree(shop.model)
    runs.model_folder(shop.model)
    code, _, said = onebase("train", shop.folder / "run.yaml", "--out", out)
    assert code == 0, said
    assert [record["step"] for record in metrics(out)] == [1, 2]


def test_the_line_of_a_fault_is_the_one_where_it_stands(shop, onebase):
    change(shop, "  steps: 2\n", "  steps: many\n")
    lines = (shop.folder / "run.yaml").read_text().splitlines()
    number = lines.index("  steps: many") + 1
    code, _, said = onebase("train", shop.folder / "run.yaml", "--out", shop.folder / "run")
    assert code == USE and f"line {number}, train.steps" in said


def test_every_bad_row_is_told_of_at_once_or_counted_where_they_may_be_skipped(shop, onebase):
    rows(shop, '{"prompt": ', json.dumps({"prompt": "a"}), json.dumps({"prompt": "a", "completion": ""}))
    code, _, said = onebase("train", shop.folder / "run.yaml", "--out", shop.folder / "run")
    assert code == USE
    assert all(f"train.jsonl line {number}" in said for number in (3, 4, 5)) and "on_bad_row" in said
    settings = ["--set", "data.on_bad_row=skip"]
    code, told, said = onebase("train", shop.folder / "run.yaml", "--out", shop.folder / "run", *settings)
    assert code == 0, said
    assert "3" in told and "line 3" in told + said


def test_too_little_memory_is_told_with_what_would_fit(shop, onebase, monkeypatch):
    change(shop, "  steps: 2\n", "  steps: 2\n  micro_batch_tokens: 400\n")
    rest = [{"prompt": "dog " * 20, "completion": "cat"}] * 10
    runs.write_rows(shop.train, rest)
    with monkeypatch.context() as narrow:
        narrow.setattr(memory, "available_bytes", lambda: 500_000)
        code, _, said = onebase("train", shop.folder / "run.yaml", "--out", shop.folder / "run")
        assert code == FAILURE
        assert "CapacityError" in said and "Traceback" not in said
        advice = said.split("train.micro_batch_tokens: ")[1].split()[0].rstrip(",.")
        setting = f"train.micro_batch_tokens={advice}"
        code, _, said = onebase("train", shop.folder / "run.yaml", "--out", shop.folder / "run", "--set", setting)
        assert code == 0, said


def test_a_batch_that_becomes_nan_later_keeps_the_steps_before(shop, onebase):
    poison(shop)
    runs.write_rows(shop.train, [*runs.definitions(4), {"prompt": "a ~", "completion": "dog"}])
    write(shop, data={"shuffle": False}, train={"epochs": 1, "batch_size": 2})
    code, _, said = onebase("train", shop.folder / "run.yaml", "--out", shop.folder / "run")
    assert code == FAILURE
    assert "step 3" in said and "train.jsonl line 5" in said and "step-00000002" in said
    assert checkpoint_names(shop.folder / "run") == ["step-00000002"]


def test_a_base_that_is_not_the_one_trained_on_is_refused_unless_it_is_meant(shop, onebase):
    out = shop.folder / "run"
    assert onebase("train", shop.folder / "run.yaml", "--out", out)[0] == 0
    kept = adapter_bytes(out)
    shutil.rmtree(shop.model)
    runs.model_folder(shop.model, seed=1)
    code, _, said = onebase("eval", out, "--data", shop.valid)
    assert code == USE
    assert "was trained on" in said and "--allow-base-mismatch" in said and "Traceback" not in said
    assert onebase("eval", out, "--data", shop.valid, "--allow-base-mismatch")[0] == 0
    assert adapter_bytes(out) == kept


def test_a_run_that_exists_and_a_damaged_adapter_are_told(shop, onebase):
    out = shop.folder / "run"
    assert onebase("train", shop.folder / "run.yaml", "--out", out)[0] == 0
    code, _, said = onebase("train", shop.folder / "run.yaml", "--out", out)
    assert code == USE and "--resume" in said and "another --out" in said
    stored = out / "adapter" / "adapter_model.safetensors"
    stored.write_bytes(stored.read_bytes()[:-10])
    code, _, said = onebase("eval", out, "--data", shop.valid)
    assert code == USE
    assert "adapter_model.safetensors" in said and "damaged" in said and "Traceback" not in said
