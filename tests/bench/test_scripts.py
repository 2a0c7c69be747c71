"""Every bench runs, on a tiny model and few steps, and writes a record with its claim, command and machine."""

import importlib
import importlib.util
import json
import os
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import pytest

from onebase.config.methods import METHODS
from tests.classifiers import encoder_folder
from tests.data.tiny import byte_tokenizer
from tests.tiny import model_of

BENCH = Path(__file__).parents[2] / "bench"
pytestmark = pytest.mark.slow
# What makes each script short; every script in bench/ that can be started is here.
SHORT = {
    "ablation": ["--workloads", "short", "--pairs=1", "--short-steps=1"],
    "against_peft": ["--steps=3", "--batch-size=2", "--logit-steps=2", "--logit-rows=3"],
    "compare_methods": ["--methods", "lora", "ia3", "bitfit", "--seeds", "0", "1", "--steps=2"],
    "kill_and_resume": ["--steps=9", "--batch-size=2"],
    "learning_rate": ["--rates", "1e-3", "3e-3", "--steps=2"],
    "linear_cost": ["--totals", "96", "112", "--rounds=1", "--padded-cells=200"],
    "profile_step": ["--micro-batch-tokens=200"],
    "step_time": ["--methods", "full", "bitfit", "--rounds=1", "--steps=1"],
    "quantised": ["--seeds", "0", "--steps=2"],
    "reproducible_bits": ["--pairs=1", "--steps=2", "--batch-size=3"],
    "tasks": ["--epochs=1", "--seeds", "0", "1", "--rates", "1", "2", "--beyond", "0"],
    "train_define": ["--steps=2", "--repeat=2"],
    "train_vs_trl": ["--workloads", "short", "--rounds=1", "--steps=2"],
}
OTHER_ROWS = ("tasks",)  # scripts that learn classes and numbers


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The tiny model, with a tokenizer, and a few rows."""
    folder = tmp_path_factory.mktemp("bench")
    tokenizer = byte_tokenizer()
    model_of("llama", vocab_size=len(tokenizer)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    for name, count in (("train", 40), ("valid", 4)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"What is {n}?"},
                    {"role": "assistant", "content": f"It is {n}."},
                ]
            }
            for n in range(count)
        ]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return [f"--model={folder / 'model'}", f"--train={folder / 'train.jsonl'}", f"--valid={folder / 'valid.jsonl'}"]


def run(name: str, *words: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(BENCH / f"{name}.py"), *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_script_that_can_be_started_is_tried() -> None:
    started = {path.stem for path in BENCH.glob("*.py") if "__main__" in path.read_text(encoding="utf-8")}
    assert started - {"trl_run", "ablation_run"} == set(SHORT)  # which train_vs_trl and ablation start


@pytest.mark.parametrize("name", [name for name in SHORT if name not in ("kill_and_resume", *OTHER_ROWS)])
def test_a_script_runs_and_records_its_claim_its_command_and_the_machine(
    name: str, options: list[str], tmp_path: Path
) -> None:
    times = [f"--times={tmp_path / 'times.json'}"] if name == "compare_methods" else []
    run(name, *options, *SHORT[name], *times, f"--out={tmp_path / 'record.json'}")
    text = (tmp_path / "record.json").read_text(encoding="utf-8")
    record = json.loads(text)
    assert record["claim"] and record["command"].split("python ")[1].startswith(f"bench/{name}.py")
    assert {"cpu", "cores", "torch", "commit", "load_average_before", "load_average_after"} <= set(record["machine"])
    assert str(tmp_path) not in text


def test_both_sides_of_the_comparison_with_trl_learn_the_same(options: list[str], tmp_path: Path) -> None:
    shown = run("train_vs_trl", *options, *SHORT["train_vs_trl"], f"--out={tmp_path / 'record.json'}")
    [found] = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["rounds"]["short"]
    assert found["equal"]["learning_rates"] and "| short | onebase |" in shown
    trl, own, int8 = (found["sides"][who] for who in ("trl", "onebase", "onebase-int8"))
    assert own["losses"] == pytest.approx(trl["losses"], rel=1e-4)
    assert own["valid_loss"] == pytest.approx(trl["valid_loss"], rel=1e-4)
    assert int8["losses"] == pytest.approx(trl["losses"], rel=2e-2) and int8["losses"] != own["losses"]


def test_a_fast_path_that_computes_something_else_fails_the_ablation(tmp_path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    ablation = importlib.import_module("ablation")
    sides = {"low-rank": [2.0, 1.0], "full": [2.001, 1.0]}
    monkeypatch.setattr(
        ablation, "run_variant", lambda args, workload, name, scratch: {"losses": sides[name], "grad_norms": [1.0, 1.0]}
    )
    with pytest.raises(RuntimeError, match="short, low-rank: losses"):
        ablation.run_pair(None, "short", "low-rank", tmp_path, without_first=True)


def test_the_fitted_line_is_the_line_that_was_there_and_the_rows_have_the_tokens_and_the_longest_that_were_asked_for(
    monkeypatch,
) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    linear_cost = importlib.import_module("linear_cost")
    lines = [{"tokens": n, "onebase": {"processor": {"median": 0.5 + 0.002 * n}}} for n in (10, 20, 70)]
    found = linear_cost.fitted(lines, "tokens", "onebase", "processor")
    assert found == pytest.approx({"seconds": 0.5, "seconds_a_token": 0.002, "r_squared": 1.0})
    for total, share, longest in ((256, 1 / 8, 32), (256, 1 / 1.2, 213), (2048, 0.5, 1024)):
        lengths = linear_cost.lengths_of(total, share, 8)
        assert sum(lengths) == total and max(lengths) == longest and min(lengths) > 1


def test_the_sweep_skips_what_its_record_holds(options: list[str], tmp_path: Path) -> None:
    words = [*options, "--steps=1", f"--out={tmp_path / 'record.json'}"]
    run("learning_rate", *words, "--rates", "1e-3")
    first = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["trials"]
    run("learning_rate", *words, "--rates", "1e-3", "2e-3")
    both = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["trials"]
    assert both[0] == first[0] and [trial["learning_rate"] for trial in both] == [1e-3, 2e-3]


def test_the_comparison_goes_on_from_its_record_and_shows_table_and_plot(options: list[str], tmp_path: Path) -> None:
    words = [*options, "--steps=1", "--seeds=0", f"--out={tmp_path / 'record.json'}"]
    words += [f"--times={tmp_path / 'times.json'}", "--methods"]
    times = [
        *options,
        f"--out={tmp_path / 'times.json'}",
        "--rounds=1",
        "--steps=1",
        "--methods",
        "lora",
        "ia3",
        "bitfit",
    ]
    run("step_time", *[word for word in times if not word.startswith("--valid")])
    run("compare_methods", *words, "lora")
    first = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["trials"]
    shown = run("compare_methods", *words, "lora", "ia3", "bitfit")
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert record["trials"][0] == first[0] and [t["method"] for t in record["trials"]] == ["lora", "ia3", "bitfit"]
    assert "no bias" in record["refused"]["bitfit"]  # the model has none
    lora = next(line for line in record["by_method"] if line["method"] == "lora")
    assert f"{lora['trainable_parameters']:,}" in shown and "`bitfit` | refused" in shown
    drawn = xml.etree.ElementTree.parse(tmp_path / "record.svg").getroot()
    assert {"lora", "ia3"} <= {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}


def test_the_sweep_of_another_method_keeps_its_own_record(options: list[str], tmp_path: Path) -> None:
    words = [*options, "--steps=1", "--rates", "1e-2", f"--out={tmp_path / 'record.json'}"]
    run("learning_rate", *words, "--method=ia3")
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert record["same"]["adapter"] == {"method": "ia3"} and record["best_learning_rate"] == 1e-2


def test_the_benches_know_every_method() -> None:
    spec = importlib.util.spec_from_file_location("methods", BENCH / "methods.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert {settings["method"] for settings in module.METHODS.values()} == set(METHODS)
    for settings in module.METHODS.values():
        METHODS[settings["method"]](**settings)


def test_classes_and_numbers_are_compared_at_each_ways_best_rate(tmp_path: Path) -> None:
    encoder_folder(tmp_path / "model")
    for kind, count in (("train", 16), ("valid", 6), ("test", 6)):
        rows = [
            {
                "text": f"{'ab'[n % 2]} {n}",
                "label": "ab"[n % 2],
                "target": n % 2,
                "frequency": ["unseen", "common"][n // 2 % 2],
            }
            for n in range(count)
        ]
        (tmp_path / f"rows-{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    words = [f"--model={tmp_path / 'model'}", f"--category={tmp_path / 'rows'}", f"--depth={tmp_path / 'rows'}"]
    shown = run("tasks", *words, *SHORT["tasks"], f"--out={tmp_path / 'record.json'}")
    record = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))
    assert {(line["task"], line["way"]) for line in record["by_way"]} == {
        (task, way) for task in ("classify", "regress") for way in ("lora", "head", "full")
    }
    assert all(len(line["tail"]) == 2 for line in record["by_way"])  # two seeds at the best rate
    assert len(record["runs"]) == 18 and record["lora_of_full"] > 0
    assert "| classify |" in shown and "| regress |" in shown
    assert str(tmp_path) not in (tmp_path / "record.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("losses", "rate"),
    [
        ({1e-3: 2.0, 2e-3: 1.0, 4e-3: 3.0}, None),
        ({1e-3: 1.0, 2e-3: 2.0, 4e-3: 3.0}, 5e-4),
        ({1e-3: 3.0, 2e-3: 2.0, 4e-3: 1.0}, 8e-3),
        ({1e-3: 3.0}, None),
    ],
)
def test_a_sweep_goes_on_beyond_its_edge_while_the_best_rate_is_there(losses, rate, monkeypatch) -> None:
    monkeypatch.syspath_prepend(str(BENCH))
    tasks = importlib.import_module("tasks")
    same = {"task": "classify", "way": "lora", "seed": 0}
    runs = [{**same, "learning_rate": at, "valid_loss": loss} for at, loss in losses.items()]
    runs.append({**same, "seed": 1, "learning_rate": 1.0, "valid_loss": 0.0})  # of another seed: no part of the sweep
    assert tasks.rate_beyond(runs, "classify", "lora", 0) == (None if rate is None else pytest.approx(rate))
