"""`onebase verify`: its table, its JSON, its exit codes."""

import json
import shutil

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.classifiers import model_of
from tests.cli.test_tasks import ANIMALS, TRAIN, rows_of
from tests.cli.world import invoke, write_rows
from tests.data.tiny import byte_tokenizer


@pytest.fixture
def run(trained, world):
    shutil.copytree(trained / "run", world / "run")
    return world / "run"


def test_a_trained_run_is_found_right_in_one_table(run):
    result = invoke("verify", "run", "--model", "model")
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0].endswith("6 rows of the run's data.valid")
    table = [line for line in lines if " ok " in line]
    assert [line.split("  ")[0] for line in table] == [
        "loaded = saved",
        "merged = unmerged",
        "flat = padded",
        "resumed = uninterrupted",
        "chat = transformers",
        "adapter has an effect",
        "base unchanged",
    ]
    assert "checking: flat = padded" in result.stderr
    assert lines[-1] == "7 ok, 0 failed, 0 not applicable"
    assert lines == [line.rstrip() for line in lines]


def test_what_a_check_says_stands_whole_in_a_narrow_terminal(run, monkeypatch):
    checks = json.loads(invoke("verify", "run", "--model", "model", "--json").stdout)["checks"]
    monkeypatch.setenv("COLUMNS", "80")
    lines = [" ".join(line.split()) for line in invoke("verify", "run", "--model", "model").stdout.splitlines()]
    for check in checks:
        assert sum(line.startswith(f"{check['name']} {check['state']}") for line in lines) == 1
        assert f"{check['name']} {check['said']}" in lines


def test_one_failed_check_makes_the_exit_code_1_and_json_says_which(run):
    path = run / "adapter" / "adapter_model.safetensors"
    zeroed = {name: torch.zeros_like(t) if "lora_B" in name else t for name, t in load_file(path).items()}
    save_file(zeroed, path, metadata={"format": "pt"})
    result = invoke("verify", "run/adapter", "--model", "model", "--data", "train.jsonl", "--json")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert (found["ok"], found["rows"], found["data"]) == (False, 16, "train.jsonl")
    assert [check["name"] for check in found["checks"] if check["state"] == "failed"] == ["adapter has an effect"]
    shown = invoke("verify", "run/adapter", "--model", "model", "--data", "train.jsonl")
    assert shown.stdout.splitlines()[-1] == "6 ok, 1 failed, 0 not applicable"


def test_wrong_use_exits_with_2(run):
    for words, told in (
        (("run", "--data", "nowhere.jsonl"), "nowhere.jsonl"),
        (("model",), "adapter_config.json is missing"),
    ):
        result = invoke("verify", *words)
        assert result.exit_code == 2, words
        assert told in result.stderr
    (run / "config.yaml").unlink()
    result = invoke("verify", "run", "--model", "model")
    assert result.exit_code == 2
    assert "--data: name the rows to verify on: run has no rows of its own." in result.stderr


def test_the_template_of_the_training_is_read_where_it_was_named(world):
    template = (world / "model" / "chat_template.jinja").read_text()
    (world / "own.jinja").write_text("A chat. " + template)
    config = world / "run.yaml"
    config.write_text(config.read_text().replace("valid.jsonl}", "valid.jsonl, template: own.jinja}"))
    assert invoke("train", config, "--out", "own").exit_code == 0
    result = invoke("verify", "own")
    assert result.exit_code == 0, result.output
    (world / "own.jinja").unlink()
    result = invoke("verify", "own")
    assert result.exit_code == 0, result.output
    assert "own.jinja: the template of the training is gone" in result.stderr


@pytest.mark.parametrize(("kind", "task"), [("bert", "classify"), ("llama", "classify"), ("bert", "regress")])
def test_adapters_with_heads_of_their_own_are_verified_and_merged_with_their_label_names(kind, task, tmp_path):
    tokenizer = byte_tokenizer(template=None)
    model = model_of(kind).base_model
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    write_rows(tmp_path / "train.jsonl", rows_of(18))
    write_rows(tmp_path / "valid.jsonl", rows_of(6, start=18))
    data = {name: str(tmp_path / f"{name}.jsonl") for name in ("train", "valid")}
    config = {"model": str(tmp_path / "model"), "task": task, "data": data, "adapter": {"r": 4}, "train": TRAIN}
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert invoke("train", tmp_path / "run.yaml", "--out", tmp_path / "run").exit_code == 0
    result = invoke("verify", tmp_path / "run", "--json")
    assert result.exit_code == 0, result.output
    states = {check["name"]: check["state"] for check in json.loads(result.stdout)["checks"]}
    assert states.pop("chat = transformers") == "not applicable"
    assert set(states.values()) == {"ok"}
    merged = tmp_path / "merged"
    assert invoke("merge", tmp_path / "run", "--out", merged).exit_code == 0
    opened = transformers.AutoModelForSequenceClassification.from_pretrained(merged)
    if task == "classify":
        assert [opened.config.id2label[n] for n in range(3)] == sorted(ANIMALS)
