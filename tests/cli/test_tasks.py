"""Classes and numbers from the command line: trained, measured by slices, predicted; and what is wrong with such rows."""

import json
import math
import runpy
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from safetensors.torch import load_file, save_file
from sklearn.metrics import accuracy_score, f1_score, precision_recall_fscore_support

from onebase.cli.labelling import _answer
from onebase.config.labels import Labels
from onebase.measure import judge
from tests.classifiers import encoder_folder
from tests.cli.world import invoke, write_rows

ANIMALS = ("cat", "dog", "owl")
TRAIN = {"steps": 12, "batch_size": 6, "learning_rate": 0.02, "threads": 1, "save_every": 5}


def rows_of(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Return rows whose first word says the class, with a number to learn and a column to slice by."""
    return [
        {
            "text": f"{ANIMALS[n % 3]} number {n}",
            "label": ANIMALS[n % 3],
            "labels": [ANIMALS[n % 3], *(["dog"] if n % 2 and n % 3 != 1 else [])],
            "target": float(n % 3) * 10,
            "kind": "odd" if n % 2 else "even",
        }
        for n in range(start, start + count)
    ]


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random encoder, whose files hold no head, and rows."""
    folder = tmp_path_factory.mktemp("tasks")
    encoder_folder(folder / "model")
    write_rows(folder / "train.jsonl", rows_of(30))
    write_rows(folder / "valid.jsonl", rows_of(9, start=30))
    return folder


def settings(shop: Path, task: str, **sections: Any) -> Path:
    data = {"train": str(shop / "train.jsonl"), "valid": str(shop / "valid.jsonl")} | sections.pop("data", {})
    own = {"train": TRAIN | sections.pop("train", {}), "adapter": {"r": 4}} | sections
    path = shop / f"{task}.yaml"
    path.write_text(json.dumps({"model": str(shop / "model"), "task": task, "data": data, **own}))
    return path


@pytest.fixture(scope="module")
def classified(shop: Path) -> Path:
    out = shop / "classified"
    config = settings(shop, "classify", eval={"slices": ["kind"]})
    done = invoke("train", config, "--out", out, env={"ONEBASE_HOME": str(shop / "home")})
    assert done.exit_code == 0, done.stderr
    assert "accuracy" in done.stdout and f"onebase predict {out}" in done.stdout
    return out


def predicted(run: Path, data: Path) -> list[dict[str, Any]]:
    done = invoke("predict", run, "--data", data)
    assert done.exit_code == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_run_learns_classes_and_what_it_predicts_is_what_it_is_measured_by(classified: Path, shop: Path) -> None:
    measured = json.loads(invoke("eval", classified, "--json").stdout)
    result = json.loads((classified / "result.json").read_text())
    scores = {"accuracy", "macro_f1", "auroc", "ece", "brier"}  # what docs/run-folder.md lists
    assert set(measured["intervals"]) == scores and all(len(ends) == 2 for ends in measured["intervals"].values())
    assert {name: result[f"valid_{name}"] for name in scores} == pytest.approx(
        {name: measured[name] for name in scores}
    )
    assert {f"valid_{name}_before" for name in scores} <= set(result)
    assert measured["loss"] == pytest.approx(result["valid_loss"], rel=1e-6)
    assert result["valid_loss"] < result["valid_loss_before"]
    rows = predicted(classified, shop / "valid.jsonl")
    wanted, found = ([row[name] for row in rows] for name in ("label", "prediction"))
    assert measured["accuracy"] == pytest.approx(accuracy_score(wanted, found))
    assert measured["macro_f1"] == pytest.approx(f1_score(wanted, found, average="macro"))
    expected = precision_recall_fscore_support(wanted, found, labels=[*ANIMALS], zero_division=np.nan)
    for name, own in zip(("precision", "recall", "f1", "n"), expected, strict=True):
        given = [math.nan if one[name] is None else one[name] for one in measured["classes"]]
        assert given == pytest.approx([float(value) for value in own], nan_ok=True)
    lines = invoke("eval", classified).stdout.splitlines()
    table = lines[next(number for number, line in enumerate(lines) if line.startswith("class ")) :][2:5]
    assert [line.split()[:2] for line in table] == [[one["name"], str(one["n"])] for one in measured["classes"]]
    assert [line.split()[-1] for line in table] == [f"{f1:.4f}" for f1 in expected[2]]
    assert all(sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-4) for row in rows)


def test_a_slice_that_is_not_there_is_told_before_anything_is_measured(
    classified: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[Any] = []
    monkeypatch.setattr(judge, "judge", lambda *given, **named: measured.append(given))
    assert invoke("eval", classified, "--slice", "knid").exit_code == 2 and not measured


def test_a_loss_of_classes_that_is_no_number_is_a_failure(classified: Path, tmp_path: Path) -> None:
    shutil.copytree(classified / "adapter", tmp_path / "adapter")
    path = tmp_path / "adapter/adapter_model.safetensors"
    large = {name: one.fill_(1e30) if "lora_" in name else one for name, one in load_file(path).items()}
    save_file(large, path, metadata={"format": "pt"})
    rows = write_rows(tmp_path / "rows.jsonl", rows_of(6))
    done = invoke("eval", tmp_path / "adapter", "--data", rows, "--json")
    assert done.exit_code == 1 and not done.stdout
    assert f"the loss on {rows} is nan, no number" in done.stderr


def test_a_class_is_likely_by_its_probability_not_by_what_is_printed_of_it() -> None:
    labels = Labels("multi_label_classification", ("a", "b", "c"))
    answer = _answer(labels, [0.5000001, 0.4999999, 0.9], "p")
    assert answer == {"p": ["a", "c"], "probabilities": {"a": 0.5, "b": 0.5, "c": 0.9}}


def test_slices_are_those_of_the_run_or_of_the_command_line_each_with_n(classified: Path) -> None:
    measured = json.loads(invoke("eval", classified, "--json").stdout)
    assert {(one["column"], one["value"], one["n"]) for one in measured["slices"]} == {
        ("kind", "even", 5),
        ("kind", "odd", 4),
    }
    other = json.loads(invoke("eval", classified, "--json", "--slice", "label").stdout)
    assert {one["value"] for one in other["slices"]} == set(ANIMALS)
    assert all(one["scores"]["accuracy"]["low"] <= one["scores"]["accuracy"]["value"] for one in other["slices"])
    shown = invoke("eval", classified)
    assert "95 % interval" in shown.stdout and "kind = odd" in shown.stdout
    refused = invoke("eval", classified, "--slice", "knid")
    assert refused.exit_code == 2
    assert refused.stderr.startswith("ConfigError: --slice: no row has the column 'knid'; closest is 'kind'")


def test_runs_of_classes_are_listed_with_their_accuracy(classified: Path) -> None:
    result = json.loads((classified / "result.json").read_text())
    head, _, line = invoke("runs", classified).stdout.splitlines()[:3]
    assert "score" in head
    assert f"{result['valid_loss']:.4f}   accuracy {100 * result['valid_accuracy']:.2f} %   " in line


def test_options_for_written_answers_are_refused_where_the_answer_is_a_class(classified: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", [{"text": "a cat"}])
    asked = invoke("predict", str(classified), "--data", str(rows), "--temperature", "0", "--seed", "1")
    assert asked.exit_code == 2
    assert "--temperature, --seed: for answers that are written token by token" in asked.stderr
    unnamed = invoke("predict", str(classified), "--data", str(rows), "--column", "")
    assert unnamed.exit_code == 2 and "--column: must be a name, got ''" in unnamed.stderr


def test_rows_that_predicting_cuts_or_would_overwrite_are_told(classified: Path, tmp_path: Path) -> None:
    rows = rows_of(3)
    long = write_rows(tmp_path / "long.jsonl", [*rows, {"text": "cat " * 1000}])
    done = invoke("predict", classified, "--data", long)
    assert done.exit_code == 0 and len(done.stdout.splitlines()) == 4
    assert "1 row of 4 truncated to 512 tokens" in " ".join(done.stderr.split())
    taken = write_rows(tmp_path / "taken.jsonl", [*rows, {"text": "cat", "probabilities": 1}])
    done = invoke("predict", classified, "--data", taken)
    assert done.exit_code == 2 and "taken.jsonl line 4: there is a column 'probabilities' already" in done.stderr


def test_slices_stand_whole_in_a_narrow_terminal(classified: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured = json.loads(invoke("eval", classified, "--json").stdout)["slices"]
    monkeypatch.setenv("COLUMNS", "80")
    shown = invoke("eval", classified).stdout.partition("slice")[2].splitlines()
    for one in measured:
        found = one["scores"]["ece"]
        wanted = f"{found['value']:.4f} {found['low']:.4f} to {found['high']:.4f}"
        assert any(wanted in " ".join(line.split()) for line in shown)
    assert sum("kind = " in line for line in shown) == len(measured)


def test_what_answers_with_labels_cannot_chat(classified: Path) -> None:
    done = invoke("chat", classified, stdin="hello\n")
    assert done.exit_code == 2 and f"onebase predict {classified}" in done.stderr and "bug" not in done.stderr


def test_the_adapter_names_its_classes_for_everybody(classified: Path) -> None:
    config = transformers.AutoConfig.from_pretrained(classified / "adapter")
    assert config.id2label == dict(enumerate(ANIMALS)) and config.problem_type == "single_label_classification"
    record = json.loads((classified / "adapter/onebase.json").read_text())
    assert record["labels"] == {"problem": "single_label_classification", "names": list(ANIMALS)}
    assert json.loads((classified / "adapter/adapter_config.json").read_text())["task_type"] == "SEQ_CLS"


@pytest.mark.parametrize(
    ("task", "columns"), [("classify", {}), ("classify", {"label": "labels"}), ("regress", {})], ids=str
)
def test_the_model_card_says_what_was_measured_and_its_script_answers_as_predict_does(
    shop: Path, tmp_path: Path, task: str, columns: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert invoke("train", settings(shop, task, data={"columns": columns}), "--out", run).exit_code == 0
    card, result = (run / "adapter/README.md").read_text(), json.loads((run / "result.json").read_text())
    if task == "classify":
        assert f"| accuracy | {result['valid_accuracy_before']:.2%} |".replace("%", " %") in card
        assert f" {result['valid_macro_f1']:.4f} |" in card and "`cat`, `dog`, `owl`" in card
    else:
        assert f"| MSE | {result['valid_mse_before']:.4f} | {result['valid_mse']:.4f} |" in card
    row = {"text": "owl number 7"}
    (wanted,) = predicted(run, write_rows(tmp_path / "rows.jsonl", [row]))
    script = card.partition("```python\n")[2].partition("```")[0].replace('"ADAPTER"', repr(str(run / "adapter")))
    script = script.replace('"model"', repr(str(shop / "model"))).replace('"A text."', repr(row["text"]))
    capsys.readouterr()
    (tmp_path / "script.py").write_text(script)
    runpy.run_path(str(tmp_path / "script.py"))
    answer = capsys.readouterr().out.splitlines()[-1]
    if task == "regress":
        assert float(answer) == pytest.approx(wanted["prediction"], rel=1e-4)
    else:
        assert answer == str(wanted["prediction"])


def test_a_number_is_learned_from_the_mean_of_the_targets_on(shop: Path) -> None:
    config = settings(shop, "regress")
    assert invoke("train", config, "--out", shop / "number").exit_code == 0
    result = json.loads((shop / "number/result.json").read_text())
    assert result["valid_loss_before"] < 200  # the mean of 0, 10 and 20 misses by 67; zero by 167
    measured = json.loads(invoke("eval", shop / "number", "--json").stdout)
    assert measured["mse"] == pytest.approx(result["valid_loss"], rel=1e-6) and {"mae", "r2"} <= set(measured)
    rows = predicted(shop / "number", shop / "valid.jsonl")
    assert measured["mse"] == pytest.approx(
        sum((r["prediction"] - r["target"]) ** 2 for r in rows) / len(rows), rel=1e-5
    )


def test_several_classes_a_row_come_from_lists(shop: Path) -> None:
    config = settings(shop, "classify", data={"columns": {"label": "labels"}})
    done = invoke("train", config, "--out", shop / "several")
    assert done.exit_code == 0, done.stderr
    rows = predicted(shop / "several", shop / "valid.jsonl")
    assert all(isinstance(row["prediction"], list) for row in rows)


def test_rows_come_back_under_their_own_names_and_need_no_label(shop: Path, tmp_path: Path) -> None:
    named = {"sentence": "text", "topic": "label"}
    rows = [{new: row[old] for new, old in named.items()} for row in rows_of(30)]
    data = {"train": str(write_rows(tmp_path / "t.jsonl", rows)), "valid": 0.2}
    config = settings(shop, "classify", data=data | {"columns": {"text": "sentence", "label": "topic"}})
    assert invoke("train", config, "--out", tmp_path / "run").exit_code == 0
    asked = [rows[0], {"sentence": "dog number 4", "text": "a note", "label": 7}]
    found = predicted(tmp_path / "run", write_rows(tmp_path / "asked.jsonl", asked))
    assert [{name: row[name] for name in own} for row, own in zip(found, asked, strict=True)] == asked
    assert all(set(row) - set(own) == {"prediction", "probabilities"} for row, own in zip(found, asked, strict=True))
    done = invoke("predict", tmp_path / "run", "--data", tmp_path / "asked.jsonl", "--column", "topic")
    assert done.exit_code == 2 and "asked.jsonl line 1: there is a column 'topic' already" in done.stderr


def test_a_warm_start_from_an_adapter_for_other_classes_says_what_to_write(
    classified: Path, shop: Path, tmp_path: Path
) -> None:
    def train(name: str, *classes: str, **data: Any) -> Any:
        rows = [row for row in rows_of(30) if row["label"] in classes]
        data |= {"train": str(write_rows(tmp_path / f"{name}.jsonl", rows)), "valid": 0.2}
        config = settings(shop, "classify", data=data, adapter={"r": 4, "init_from": str(classified / "adapter")})
        return invoke("train", config, "--out", tmp_path / name)

    refused = train("two", "cat", "owl")
    told = " ".join(refused.stderr.split())
    assert refused.exit_code == 2 and "a head for one of 3 classes (cat, dog, owl), and" in told
    assert "is open for one of 2 classes (cat, owl)" in told and "data.label_names: [cat, dog, owl]" in told
    assert train("named", "cat", "owl", label_names=list(ANIMALS)).exit_code == 0


def test_a_stopped_run_goes_on_to_the_same_bytes(classified: Path, shop: Path) -> None:
    config, out = settings(shop, "classify", eval={"slices": ["kind"]}), shop / "again"
    assert invoke("train", config, "--out", out).exit_code == 0
    (out / "result.json").unlink()
    assert invoke("train", config, "--out", out, "--resume").exit_code == 0
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (classified / name).read_bytes()


def test_a_run_does_not_go_on_with_classes_of_other_names(shop: Path, tmp_path: Path) -> None:
    rows = rows_of(30)
    data = write_rows(tmp_path / "train.jsonl", rows)
    config, out = settings(shop, "classify", data={"train": str(data), "valid": 0.2}), tmp_path / "run"
    assert invoke("train", config, "--out", out).exit_code == 0
    (out / "result.json").unlink()
    write_rows(data, [{**row, "label": row["label"].replace("owl", "pig")} for row in rows])
    done = invoke("train", config, "--out", out, "--resume")
    assert done.exit_code == 2 and "have changed since the run was started: the names of the classes" in done.stderr


@pytest.mark.parametrize(
    ("task", "changes", "said"),
    [
        ("classify", {"label": "cow"}, "label 'cow' is none of the 3 classes that are learned (cat, dog, owl)"),
        ("classify", {"label": ["cat"]}, "'label' must be one class, got list"),
        ("regress", {"target": "tall"}, "'target' must be a number, got 'tall'"),
        ("regress", {"target": float("nan")}, "'target' must be a finite number, got nan"),
    ],
)
def test_a_row_of_the_test_file_that_says_nothing_is_named(shop: Path, tmp_path: Path, task, changes, said) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [*rows_of(2), {**rows_of(1)[0], **changes}])
    config = settings(shop, task, data={"valid": str(bad)})
    done = invoke("train", config, "--out", tmp_path / "run")
    assert done.exit_code == 2 and f"bad.jsonl line 3: {said}" in done.stderr.replace("\n", " ")


@pytest.mark.parametrize(
    ("task", "sections", "said"),
    [
        ("classify", {"train": {"loss": "binary_cross_entropy"}}, "is no loss for these labels"),
        ("regress", {"train": {"loss": "cross_entropy"}}, "'cross_entropy' is no loss of task 'regress'"),
        ("chat", {"train": {"loss": "cross_entropy"}}, "'cross_entropy' is no loss of task 'chat'"),
        ("regress", {"data": {"columns": {"label": "n"}}}, "task 'regress' has no such role; its rows have 'text' and"),
        ("regress", {"data": {"label_names": ["a", "b"]}}, "is for task: classify, but task is 'regress'"),
        ("classify", {"data": {"label_names": ["a", "b", "a"]}}, "data.label_names: names 'a' twice"),
        ("classify", {"data": {"label_names": ["a"]}}, "data.label_names: must be a list of at least 2, got ['a']"),
        ("classify", {"data": {"system": "Be brief."}}, "is for chats, but task is 'classify'"),
        ("text", {"eval": {"slices": ["kind"]}}, "eval.slices: is for classify and regress, but task is 'text'"),
    ],
)
def test_settings_of_another_task_are_refused(shop: Path, tmp_path: Path, task, sections, said) -> None:
    done = invoke("train", settings(shop, task, **sections), "--out", tmp_path / "run")
    assert done.exit_code == 2 and said in " ".join(done.stderr.split())


def test_squared_error_of_classes_is_possible_and_warned_about(shop: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = invoke("train", settings(shop, "classify", train={"loss": "squared_error"}), "--out", run)
    measured, result = json.loads(invoke("eval", run, "--json").stdout), json.loads((run / "result.json").read_text())
    assert measured["loss"] == pytest.approx(result["valid_loss"], rel=1e-6) == pytest.approx(measured["brier"])
    assert done.exit_code == 0 and "the gradient vanishes where the model is sure and wrong" in " ".join(
        done.stdout.split()
    )


def test_one_class_alone_is_refused(shop: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "one.jsonl", [{**row, "label": "cat"} for row in rows_of(6)])
    done = invoke("train", settings(shop, "classify", data={"train": str(rows)}), "--out", tmp_path / "run")
    assert done.exit_code == 2 and "every row has the label 'cat'" in done.stderr


def test_one_target_alone_is_refused(shop: Path, tmp_path: Path) -> None:
    same = write_rows(tmp_path / "same.jsonl", [{**row, "target": 3} for row in rows_of(6)])
    done = invoke("train", settings(shop, "regress", data={"train": str(same)}), "--out", tmp_path / "run")
    assert done.exit_code == 2 and "same.jsonl: every row has the 'target' 3" in " ".join(done.stderr.split())


def test_a_slice_that_is_not_there_is_told_before_the_training(shop: Path, tmp_path: Path) -> None:
    done = invoke("train", settings(shop, "classify", eval={"slices": ["knid"]}), "--out", tmp_path / "run")
    assert done.exit_code == 2 and "eval.slices: no row has the column 'knid'; closest is 'kind'" in " ".join(
        done.stderr.split()
    )


def test_a_preview_shows_each_rows_label(shop: Path) -> None:
    shown = invoke("preview", settings(shop, "classify"), "--rows", "2")
    assert shown.exit_code == 0 and "label cat" in shown.stdout and "label dog" in shown.stdout
    lines = [line.split() for line in shown.stdout.splitlines()]
    assert lines[lines.index(["class", "train", "valid"]) + 2 :] == [[name, "10", "3"] for name in ANIMALS]
    counted = json.loads(invoke("preview", settings(shop, "classify"), "--json").stdout)["classes"]
    assert counted == {"train": dict.fromkeys(ANIMALS, 10), "valid": dict.fromkeys(ANIMALS, 3)}
    several = settings(shop, "classify", data={"columns": {"label": "labels"}})
    counted = json.loads(invoke("preview", several, "--json").stdout)["classes"]["train"]
    assert counted == {name: sum(name in row["labels"] for row in rows_of(30)) for name in ANIMALS}
    numbers = json.loads(invoke("preview", settings(shop, "regress"), "--rows", "2", "--json").stdout)
    assert "classes" not in numbers
    assert [row["target"] for row in numbers["rows"]] == [0.0, 10.0]


def test_a_preview_speaks_of_labelled_tokens_only_where_tokens_are_labelled(shop: Path) -> None:
    assert "labelled tokens" not in invoke("preview", settings(shop, "classify"), "--rows", "1").stdout


@pytest.mark.parametrize("task", ["classify", "regress"])
def test_a_merged_model_is_measured_and_predicts_as_the_adapter_does(shop: Path, tmp_path: Path, task: str) -> None:
    done = invoke("train", settings(shop, task), "--out", tmp_path / "run")
    assert done.exit_code == 0, done.stderr
    done = invoke("merge", tmp_path / "run", "--out", tmp_path / "merged")
    assert done.exit_code == 0, done.stderr
    data = shop / "valid.jsonl"
    ours, merged = (
        json.loads(invoke("eval", tmp_path / name, "--data", data, "--json").stdout) for name in ("run", "merged")
    )
    assert merged["task"] == task and merged["adapter"] is None
    assert merged["loss"] == pytest.approx(ours["loss"], rel=1e-4)
    both = [predicted(tmp_path / name, data) for name in ("run", "merged")]
    for one, other in zip(*both, strict=True):
        name = "prediction" if task == "regress" else "probabilities"
        assert one[name] == pytest.approx(other[name], rel=1e-4, abs=1e-5)
        assert task == "regress" or one["prediction"] == other["prediction"]


def test_a_model_that_predicts_neither_tokens_nor_labels_is_asked_nothing(shop: Path) -> None:
    asked = invoke("predict", shop / "model", "--data", shop / "valid.jsonl")
    assert asked.exit_code == 2 and "predicts no tokens" in " ".join(asked.stderr.split())


def test_a_base_whose_head_is_new_is_not_measured_alone(classified: Path) -> None:
    refused = invoke("eval", classified, "--base-only")
    assert refused.exit_code == 2 and "hold no head for this task (classifier)" in " ".join(refused.stderr.split())


def test_a_column_of_many_values_makes_no_slices(classified: Path, tmp_path: Path) -> None:
    many = write_rows(tmp_path / "many.jsonl", [{**row, "id": number} for number, row in enumerate(rows_of(101))])
    refused = invoke("eval", classified, "--data", many, "--slice", "id")
    assert refused.exit_code == 2 and "'id' has 101 values, at most 100 make slices" in " ".join(refused.stderr.split())
