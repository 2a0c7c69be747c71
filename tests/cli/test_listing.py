"""Laws of the verbs that look: tables for people and one JSON object for scripts say the same."""

import json
import re
import shutil

import pytest

from onebase.config import METHODS
from tests.cli.world import invoke


def _json(*words):
    result = invoke(*words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def test_the_targets_of_a_model_are_listed_with_what_presets_mean(trained):
    found = _json("targets", trained / "model")
    table = invoke("targets", trained / "model").stdout
    assert {row["pattern"] for row in found["targets"]} >= {"q_proj", "down_proj", "lm_head", "embed_tokens"}
    norms = {row["pattern"]: row["blocks"] for row in found["targets"] if row["kind"] == "norm"}
    assert norms == {"input_layernorm": 2, "post_attention_layernorm": 2, "norm": 0}
    assert set(found["presets"]["all-linear"]) == set(found["presets"]["attention"]) | set(found["presets"]["mlp"])
    for row in found["targets"]:
        blocks = f"{row['blocks']}/{row['of']}" if row["blocks"] else "-"
        assert re.search(rf"^{row['pattern']} .*{' x '.join(map(str, row['shape']))} +{blocks}$", table, re.M)
    for preset, names in found["presets"].items():
        assert re.search(rf"^{preset} +{', '.join(names)} \(\d+ modules\)", table, re.M)
    assert re.search(r"^embed_tokens +embedding ", table, re.M) and "cannot carry an adapter" not in table


def test_an_unknown_model_is_an_error(tmp_path):
    result = invoke("targets", tmp_path / "nowhere")
    assert result.exit_code == 2
    assert "nowhere" in result.stderr


def test_packaged_models_are_listed_and_whether_they_are_at_hand(tmp_path):
    found = _json("models")["models"]
    table = invoke("models").stdout
    assert {"smollm2-135m-instruct", "minilm-l6-v2"} <= {model["name"] for model in found}
    assert not any(model["at_hand"] for model in found if model["kind"] == "packaged")
    assert all(re.search(rf"^{re.escape(model['name'])} ", table, re.M) for model in found)
    assert "onebase models fetch" in table


def test_fetching_a_model_that_is_there_prints_its_folder(trained):
    assert invoke("models", "fetch", trained / "model").stdout == f"{trained / 'model'}\n"
    assert _json("models", "fetch", trained / "model")["folder"] == str(trained / "model")


def test_the_runs_of_a_folder_are_listed_with_their_results(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "runs/first")
    shutil.copytree(trained / "run", tmp_path / "runs/second")
    (tmp_path / "runs/second/result.json").unlink()
    shutil.rmtree(tmp_path / "runs/second/checkpoints", ignore_errors=True)
    (tmp_path / "runs/notes").mkdir()
    first, second = _json("runs", tmp_path / "runs")["runs"]
    table = invoke("runs", tmp_path / "runs").stdout
    written = json.loads((trained / "run/result.json").read_text())
    assert (first["name"], first["state"], first["result"]) == ("first", "finished", written)
    assert (second["name"], second["state"], second["result"]) == ("second", "failed", None)
    assert re.search(
        rf"^first +finished +8 +{written['valid_loss']:.4f} +{written['valid_loss_before']:.4f} ", table, re.M
    )
    assert "score" not in table
    assert re.search(r"^second +failed before its first checkpoint +8 ", table, re.M)


def test_a_result_that_is_damaged_is_told_beside_the_table(trained, tmp_path):
    shutil.copytree(trained / "run", tmp_path / "runs/first")
    (tmp_path / "runs/first/result.json").write_text("{")
    result = invoke("runs", tmp_path / "runs")
    assert result.exit_code == 0
    assert "result.json" in result.stderr and "first" in result.stdout


def test_a_loss_that_is_no_number_is_shown_as_it_stands(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").touch()
    (tmp_path / "run/metrics.jsonl").write_text('{"step": 1, "loss": "x", "valid_loss": [1]}\n')
    result = invoke("runs", tmp_path)
    assert result.exit_code == 0, result.stderr
    assert re.search(r"^run .* 1 +\[1\] +- +x ", result.stdout, re.M)


def test_a_folder_without_runs_says_how_to_start_one(tmp_path):
    result = invoke("runs", tmp_path)
    assert (result.exit_code, result.stdout) == (0, "")
    assert "onebase train" in result.stderr
    assert _json("runs", tmp_path) == {"runs": []}
    assert invoke("runs", tmp_path / "nowhere").exit_code == 2


def test_every_setting_is_shown_and_the_schema_takes_the_settings_of_a_run(trained):
    listed = re.findall(r"^(\S+)  .+; .+$", invoke("schema").stdout, re.M)
    schema = _json("schema")
    assert set(schema["properties"]) == {name.split(".")[0] for name in listed}
    assert {"model", "data.train", "adapter.r", "train.learning_rate"} <= set(listed)
    methods = re.findall(r"^with adapter.method (.+):$", invoke("schema").stdout, re.M)
    assert methods == list(METHODS)
    assert listed.count("adapter.method") == len(methods) and listed.count("data.train") == 1


@pytest.mark.parametrize("words", [["targets"], ["runs"]])
def test_what_must_be_named_is_asked_for(words):
    result = invoke(*words)
    assert result.exit_code == 2
    assert "Missing argument" in result.stderr
