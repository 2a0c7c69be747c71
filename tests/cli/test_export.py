"""`onebase export`: what it writes, what it says, and how it refuses."""

import json
import shutil

import pytest

from tests.cli.world import invoke


@pytest.fixture
def run(trained, world):
    shutil.copytree(trained / "run", world / "run")
    return world / "run"


def test_a_portable_adapter_scores_as_the_adapter_does_and_says_what_was_found(run):
    result = invoke("export", "run", "--out", "plain", "--portable")
    assert result.exit_code == 0, result.output
    assert "plain LoRA of rank 2, lora_alpha 2" in result.stdout and "onebase lint plain" in result.stdout
    assert invoke("lint", "plain", "--for", "vllm,sglang,llama.cpp").exit_code == 0
    losses = [
        json.loads(invoke("eval", folder, "--data", "valid.jsonl", "--json").stdout)["loss"]
        for folder in ("run", "plain")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_json_has_every_figure(run):
    result = invoke("export", "run/adapter", "--out", "plain", "--portable", "--json")
    found = json.loads(result.stdout)
    assert found["r"] == 2 and found["pairs"] == 14 and found["zero_pairs"] == 0
    assert 0 <= found["update_difference"] < 1e-6 and 0 <= found["output_difference"] < 1e-4


def test_a_gguf_file_is_written_and_its_figures_are_said(run, tmp_path):
    result = invoke("export", "run", "--out", "run.gguf", "--gguf", "--type", "f16", "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["form"] == "gguf" and found["architecture"] == "llama" and found["pairs"] == 14
    assert 0 < found["largest_rounding"] < 1e-2
    assert (tmp_path / "run.gguf").read_bytes()[:4] == b"GGUF"


def test_wrong_use_exits_with_2_and_writes_nothing(run, tmp_path):
    for words, told in (
        (("--out", "plain"), "export needs one form. Give --portable or --gguf."),
        (("--out", "plain", "--portable", "--gguf"), "export needs one form. Give --portable or --gguf."),
        (("--out", "plain", "--gguf", "--merged"), "a merged model needs all three"),
        (("--out", "plain", "--gguf", "--base-gguf", "b.gguf"), "a merged model needs all three"),
        (("--out", "plain", "--gguf", "--merged", "--base-gguf", "b.gguf"), "b.gguf: there is no such file"),
        (("--out", "plain", "--gguf", "--type", "Q4_K"), "must be one of F32, F16, got Q4_K"),
        (("--out", "plain", "--portable", "--type", "F16"), "--type: is for --gguf"),
        (("--out", "model", "--portable"), "model: is there already. Choose another --out."),
        (("--out", "plain", "--portable", "--model", "nowhere/nothing"), "nothing"),
    ):
        result = invoke("export", "run", *words)
        assert result.exit_code == 2, words
        assert told in result.stderr
    assert not (tmp_path / "plain").exists()
