"""Laws of what a verb is about."""

import json
import shutil

import pytest

from onebase.cli.opening import BaseOptions, open_adapter, open_adapter_or_model
from tests.cli.world import invoke, settings_in


def test_an_adapter_taken_out_of_its_run_is_asked_as_in_training(world):
    config = settings_in(world, train="steps: 3, batch_size: 4", data=", system: Be brief., max_length: 120")
    assert invoke("train", config, "--out", "run").exit_code == 0
    shutil.copytree("run/adapter", "elsewhere")
    in_run, alone = open_adapter("run"), open_adapter("elsewhere")
    assert alone.data["system"] == "Be brief."
    assert alone.data["max_length"] == 120
    chat = [{"role": "user", "content": "Define the noun dog."}]
    assert alone.asking().of_messages(chat) == in_run.asking().of_messages(chat)


def _copy_of_run(trained, folder, more):
    """Copy a run with other lines in its settings."""
    shutil.copytree(trained / "run", folder / "run")
    path = folder / "run/config.yaml"
    kept = [line for line in path.read_text().splitlines() if not line.startswith(("dtype:", "device:", "trust_"))]
    path.write_text("\n".join([*kept, more, ""]))
    return str(folder / "run")


def test_the_base_has_the_number_format_of_the_run_unless_another_is_asked_for(trained, tmp_path):
    run = _copy_of_run(trained, tmp_path, "dtype: bfloat16")
    assert str(open_adapter(run).bank.base.dtype) == "torch.bfloat16"
    assert str(open_adapter(f"{run}/adapter").bank.base.dtype) == "torch.bfloat16"
    assert str(open_adapter(run, BaseOptions(dtype="float32")).bank.base.dtype) == "torch.float32"
    alone = open_adapter_or_model(str(trained / "model"), BaseOptions(dtype="bfloat16"))
    assert str(alone.bank.base.dtype) == "torch.bfloat16"


def test_eval_says_what_it_computed_with(trained, tmp_path):
    run = _copy_of_run(trained, tmp_path, "dtype: bfloat16")
    words = ["eval", run, "--data", trained / "valid.jsonl"]
    found = json.loads(invoke(*words, "--json").stdout)
    assert (found["dtype"], found["device"]) == ("bfloat16", "cpu")
    assert f"base {found['model']}, bfloat16 on cpu" in invoke(*words).stdout
    assert ", float32 on cpu" in invoke(*words, "--dtype", "float32").stdout


@pytest.mark.parametrize("by", ["run", "option"])
def test_a_device_that_is_not_here_is_told_with_the_way_out(trained, tmp_path, by):
    run = _copy_of_run(trained, tmp_path, "device: cuda:99" if by == "run" else "device: cpu")
    words = ["eval", run, "--data", trained / "valid.jsonl"]
    result = invoke(*words, *(["--device", "cuda:99"] if by == "option" else []))
    assert result.exit_code == 2
    assert "cuda:99" in result.stderr and "--device auto" in result.stderr
    if by == "run":
        assert invoke(*words, "--device", "cpu").exit_code == 0


def test_a_number_format_that_does_not_exist_is_told_with_those_that_do(trained):
    result = invoke("eval", trained / "run", "--data", trained / "valid.jsonl", "--dtype", "float17")
    assert result.exit_code == 2
    assert "bfloat16" in result.stderr and "float17" in result.stderr


def test_batches_and_threads_are_the_runs(world):
    config = settings_in(world, train="steps: 1, batch_size: 4, threads: 1", more="eval: {batch_tokens: 77}\n")
    assert invoke("train", config, "--out", "run").exit_code == 0
    threads: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("torch.set_num_threads", threads.append)
        assert open_adapter("run").batch_tokens == 77
    assert threads == [1]


@pytest.mark.parametrize("verb", ["eval", "chat", "predict"])
def test_code_of_the_base_runs_only_where_the_command_line_says_so(trained, tmp_path, monkeypatch, verb):
    run = _copy_of_run(trained, tmp_path, "trust_remote_code: true")
    trusted = []

    def open_pretrained(place, *, trust_remote_code, **more):
        trusted.append(trust_remote_code)
        return real(place, trust_remote_code=trust_remote_code, **more)

    from onebase.base import pretrained

    real = pretrained.open_pretrained
    monkeypatch.setattr(pretrained, "open_pretrained", open_pretrained)
    words = {"eval": ["--data", trained / "valid.jsonl"], "chat": [], "predict": ["--data", trained / "valid.jsonl"]}
    few = [] if verb == "eval" else ["--max-new-tokens", 1]
    for target in (run, trained / "model"):
        for more in ([], ["--trust-remote-code"]):
            assert invoke(verb, target, *words[verb], *few, *more, stdin="").exit_code == 0
    assert trusted == [False, True, False, True]
