"""Laws of `onebase eval`: the run's own numbers come back, one JSON object for scripts, and the right rows by default."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file

from tests.cli.world import chats, invoke, write_rows


def _json(*words):
    result = invoke("eval", *words, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def measured(trained):
    return _json(trained / "run", "--data", trained / "valid.jsonl")


@pytest.fixture(scope="module")
def result_file(trained):
    return json.loads((trained / "run/result.json").read_text())


def test_an_adapter_measures_as_its_run_says(measured, result_file):
    assert measured["loss"] == pytest.approx(result_file["valid_loss"], rel=1e-6)
    assert measured["base"]["loss"] == pytest.approx(result_file["valid_loss_before"], rel=1e-6)
    assert measured["base_fingerprint"] == result_file["base_fingerprint"]
    assert measured["loss"] < measured["base"]["loss"]
    assert measured["examples"] == 6
    assert 0 <= measured["token_accuracy"] <= 1


def test_the_base_alone_measures_the_same_by_every_way(trained, measured):
    by_flag = _json(trained / "run", "--data", trained / "valid.jsonl", "--base-only")
    by_name = _json(trained / "model", "--data", trained / "valid.jsonl")
    for found in (by_flag, by_name):
        assert found["adapter"] is None and "base" not in found
        assert found["loss"] == measured["base"]["loss"]


def test_without_data_the_runs_own_rows_are_measured(trained, measured):
    assert _json(trained / "run")["loss"] == measured["loss"]
    assert _json(trained / "run/adapter")["loss"] == measured["loss"]


def test_the_test_rows_come_before_the_validation_rows_and_a_fraction_is_held_out_again(world):
    write_rows(world / "test.jsonl", chats(4, start=50))
    invoke("train", "run.yaml", "--out", "a", "--set", "data.test=test.jsonl")
    assert _json("a")["examples"] == 4
    invoke("train", "run.yaml", "--out", "b", "--set", "data.valid=0.3")
    result = json.loads((world / "b/result.json").read_text())
    assert _json("b")["loss"] == pytest.approx(result["valid_loss"], rel=1e-6)


def test_slices_of_a_chat_are_refused(trained):
    done = invoke("eval", trained / "run", "--slice", "kind")
    assert done.exit_code == 2 and "--slice: is for classify and regress" in done.stderr


def test_without_any_rows_the_option_is_named(trained, tmp_path):
    shutil.copytree(trained / "run/adapter", tmp_path / "adapter")
    result = invoke("eval", tmp_path / "adapter")
    assert result.exit_code == 2
    assert "--data" in result.stderr


def test_an_adapter_that_left_its_run_measures_the_same_where_the_settings_are_defaults(trained, tmp_path, measured):
    shutil.copytree(trained / "run/adapter", tmp_path / "moved")
    assert _json(tmp_path / "moved", "--data", trained / "valid.jsonl")["loss"] == measured["loss"]


def test_training_rows_that_are_gone_are_not_missed(world):
    invoke("train", "run.yaml", "--out", "run")
    (world / "train.jsonl").unlink()
    assert _json("run", "--data", "valid.jsonl")["examples"] == 6


def test_rows_are_read_as_the_run_read_them(world):
    rows = [{"q": f"What is {i}?", "a": f"number {i}"} for i in range(12)]
    write_rows(world / "train.jsonl", rows)
    write_rows(world / "valid.jsonl", rows[:5])
    columns = "--set=data.columns={prompt: q, completion: a}"
    done = invoke("train", "run.yaml", "--out", "run", columns, "--set", "data.system=Be brief.")
    assert done.exit_code == 0, done.stderr
    result = json.loads((world / "run/result.json").read_text())
    assert _json("run", "--data", "valid.jsonl")["loss"] == pytest.approx(result["valid_loss"], rel=1e-6)


def test_the_template_that_was_trained_with_is_measured_with(world):
    (world / "own.jinja").write_text(
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    done = invoke("train", "run.yaml", "--out", "run", "--set", "data.template=own.jinja")
    assert done.exit_code == 0, done.stderr
    (world / "own.jinja").unlink()
    result = json.loads((world / "run/result.json").read_text())
    assert _json("run", "--data", "valid.jsonl")["loss"] == pytest.approx(result["valid_loss"], rel=1e-6)


def test_for_people_the_same_numbers_stand_in_a_table(trained, measured):
    result = invoke("eval", trained / "run", "--data", trained / "valid.jsonl")
    assert f"{measured['loss']:.4f}" in result.stdout
    assert f"{measured['base']['loss']:.4f}" in result.stdout
    assert f"{measured['loss'] - measured['base']['loss']:+.4f}" in result.stdout
    assert result.stderr == ""


def test_a_loss_that_is_no_number_is_a_failure(trained, tmp_path):
    shutil.copytree(trained / "run/adapter", tmp_path / "adapter")
    _fill(tmp_path / "adapter/adapter_model.safetensors", "lora_", 1e30)
    for more in (("--json",), ()):
        done = invoke("eval", tmp_path / "adapter", "--data", trained / "valid.jsonl", *more)
        assert done.exit_code == 1 and not done.stdout, done.output
        assert done.stderr.startswith(f"VerificationError: adapter {tmp_path / 'adapter'}: the loss on")
        assert "valid.jsonl is nan, no number" in done.stderr and "--base-only" in done.stderr


def _fill(path, part, value):
    """Put one number everywhere into the tensors of a file that have `part` in their names."""
    tensors = {name: tensor.fill_(value) if part in name else tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def test_another_base_is_refused_unless_it_is_meant(trained, tmp_path):
    from tests.cli.world import model_in
    from tests.tiny import model_of

    other = model_in(tmp_path / "other")
    model_of("llama", seed=9, vocab_size=400, max_position_embeddings=256).save_pretrained(other)
    words = [trained / "run", "--data", trained / "valid.jsonl", "--model", other]
    refused = invoke("eval", *words)
    assert refused.exit_code == 2
    assert "--allow-base-mismatch" in refused.stderr
    assert _json(*words, "--allow-base-mismatch")["model"] == str(other)


@pytest.mark.parametrize("target", ["nowhere", "./nowhere"])
def test_a_name_that_leads_nowhere_is_an_error_with_what_was_looked_for(trained, target):
    result = invoke("eval", target, "--data", trained / "valid.jsonl")
    assert result.exit_code == 2
    assert "nowhere" in result.stderr and "Traceback" not in result.stderr


def test_a_run_without_its_adapter_says_how_to_finish_it(trained, tmp_path):
    (tmp_path / "run").mkdir()
    shutil.copy(trained / "run/config.yaml", tmp_path / "run/config.yaml")
    result = invoke("eval", tmp_path / "run", "--data", trained / "valid.jsonl")
    assert result.exit_code == 2
    assert "--resume" in result.stderr


def test_a_settings_file_that_only_lies_beside_an_adapter_is_not_its_runs(trained, tmp_path, measured):
    shutil.copytree(trained / "run/adapter", tmp_path / "mine")
    (tmp_path / "config.yaml").write_text("model: other\ntask: text\ndata: {train: x, system: Shout.}\n")
    assert _json(tmp_path / "mine", "--data", trained / "valid.jsonl")["loss"] == measured["loss"]


def test_a_data_set_of_the_hub_is_named_as_in_the_settings(trained):
    result = invoke("eval", trained / "run", "--data", "hub:org/no-such-set:test")
    assert result.exit_code == 2
    assert result.stderr.startswith("DataError: hub:org/no-such-set:test")
