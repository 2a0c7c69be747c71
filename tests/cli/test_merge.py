"""`onebase merge`: what it writes, what it says, and how it refuses."""

import json
import shutil

import pytest
import torch
import transformers

from tests.cli.world import chats, invoke, model_in, write_rows

INTO = ("original", "dequantised")


@pytest.fixture
def run(trained, world):
    shutil.copytree(trained / "run", world / "run")
    return world / "run"


def test_a_merged_folder_is_opened_and_talks_as_the_adapter_does(run):
    result = invoke("merge", "run", "--out", "merged", "--model", "model")
    assert result.exit_code == 0, result.output
    assert "largest difference" in result.stdout
    assert result.stdout.splitlines()[-1].split(maxsplit=1) == ["next", "onebase eval merged --data FILE"]
    assert "6 rows: the run's data.valid" in result.stdout
    model = transformers.AutoModelForCausalLM.from_pretrained("merged")
    base = transformers.AutoModelForCausalLM.from_pretrained("model")
    assert not torch.equal(model.model.layers[0].mlp.up_proj.weight, base.model.layers[0].mlp.up_proj.weight)
    tokenizer = transformers.AutoTokenizer.from_pretrained("merged")
    assert tokenizer.chat_template == (run / "adapter" / "chat_template.jinja").read_text()
    asked = invoke("eval", "merged", "--data", "valid.jsonl", "--json")
    adapted = invoke("eval", "run", "--data", "valid.jsonl", "--json", "--model", "model")
    merged_loss, loss = json.loads(asked.stdout)["loss"], json.loads(adapted.stdout)["loss"]
    assert merged_loss == pytest.approx(loss, rel=1e-5)
    assert loss != pytest.approx(json.loads(adapted.stdout)["base"]["loss"], rel=1e-3)


def test_json_has_every_figure_and_nothing_else_is_on_standard_output(run):
    result = invoke("merge", "run/adapter", "--out", "merged", "--json", "--dtype", "bfloat16", "--rows", "train.jsonl")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["dtype"] == "bfloat16"
    assert found["rows"] == 16
    assert 0 < found["largest_difference"] < found["largest_difference_bound"]
    assert 0 < found["worst_module_difference"] < found["module_bound"]
    assert min(found[key] for key in ("merge_seconds", "merged_load_seconds", "adapter_load_seconds")) > 0


def test_rows_that_are_gone_are_said_and_texts_take_their_place(run):
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("valid.jsonl", "gone.jsonl"))
    result = invoke("merge", "run", "--out", "merged", "--model", "model")
    assert result.exit_code == 0, result.output
    assert "4 rows: a few built-in texts: the run's data.valid cannot be read" in result.stdout


def test_wrong_use_exits_with_2_and_writes_nothing(run, tmp_path):
    for words, told in (
        (("--rows", "nowhere.jsonl"), "nowhere.jsonl"),
        (("--dtype", "int3"), "dtype: must be one of"),
        (("--out", "model"), "model: is there already. Choose another --out."),
    ):
        result = invoke("merge", "run", "--model", "model", "--out", "merged", *words)
        assert result.exit_code == 2, words
        assert told in result.stderr
    assert not (tmp_path / "merged").exists()


def test_the_adapter_of_another_base_is_refused(run, tmp_path):
    other = model_in(tmp_path / "other", 128)
    weights = transformers.AutoModelForCausalLM.from_pretrained(other)
    weights.lm_head.weight.data += 1
    weights.save_pretrained(other)
    result = invoke("merge", "run", "--model", other, "--out", "merged")
    assert result.exit_code == 2
    assert "but" in result.stderr and "has weights" in result.stderr
    assert not (tmp_path / "merged").exists()


def test_a_method_without_weights_of_the_models_says_what_to_do_instead(world):
    rows = write_rows(world / "train.jsonl", chats(6))
    config = world / "run.yaml"
    config.write_text(
        f"model: ./model\ndata: {{train: {rows}}}\nadapter: {{method: prompt-tuning, num_virtual_tokens: 3}}\n"
        "train: {steps: 1, batch_size: 2}\n"
    )
    assert invoke("train", config, "--out", "prompted").exit_code == 0
    result = invoke("merge", "prompted", "--out", "merged")
    assert result.exit_code == 2
    assert "cannot be merged: its virtual tokens stand before the sequence" in result.stderr
    assert "Ship it as an adapter instead" in result.stderr
    assert not (world / "merged").exists()


def test_an_adapter_of_a_base_in_4_bits_goes_into_the_weights_it_was_trained_on_or_into_the_original_ones(
    trained, world
):
    pytest.importorskip("bitsandbytes", reason="the extra nf4 is not installed: pip install 'onebase[nf4]'")
    config = trained / "run" / "config.yaml"
    words = ("--set", "model=model", "--set", "quantize=nf4", "--set", "train.learning_rate=0.02")
    assert invoke("train", config, "--out", "run", *words).exit_code == 0
    asked = invoke("eval", "run", "--data", "valid.jsonl", "--json")
    loss = json.loads(asked.stdout)["loss"]
    dequantised = invoke("merge", "run", "--out", "dequantised", "--into", "dequantised", "--json")
    assert dequantised.exit_code == 0, dequantised.output
    assert json.loads(dequantised.stdout)["into"] == "dequantised"
    original = invoke("merge", "run", "--out", "original")
    assert original.exit_code == 0, original.output
    assert "its results differ. For the weights that it was trained on: --into dequantised" in original.stderr
    losses = [json.loads(invoke("eval", name, "--data", "valid.jsonl", "--json").stdout)["loss"] for name in INTO]
    assert losses[1] == pytest.approx(loss, rel=1e-5)
    assert losses[0] != pytest.approx(loss, rel=1e-4)
    unquantised = invoke("merge", "run/adapter", "--out", "again", "--model", "model")
    assert unquantised.exit_code == 0
    assert (world / "again" / "model.safetensors").read_bytes() == (
        world / "original" / "model.safetensors"
    ).read_bytes()
    checked = invoke("verify", "run", "--json")
    assert checked.exit_code == 0, checked.output
    assert {check["name"]: check["state"] for check in json.loads(checked.stdout)["checks"]}[
        "merged = unmerged"
    ] == "ok"


def test_there_are_no_dequantised_weights_of_a_base_that_has_none_or_that_rounds_more(run, trained, world):
    plain = invoke("merge", "run", "--model", "model", "--out", "merged", "--into", "dequantised")
    assert plain.exit_code == 2 and "not quantised (quantize: none). Leave --into out." in plain.stderr
    other = invoke("merge", "run", "--model", "model", "--out", "merged", "--into", "weights")
    assert other.exit_code == 2 and "--into: must be original or dequantised, got weights." in other.stderr
    config = trained / "run" / "config.yaml"
    assert invoke("train", config, "--out", "int8", "--set", "model=model", "--set", "quantize=int8").exit_code == 0
    rounded = invoke("merge", "int8", "--out", "merged", "--into", "dequantised")
    assert rounded.exit_code == 2 and "no weights do the same. Merge it --into original." in rounded.stderr
    assert not (world / "merged").exists()
