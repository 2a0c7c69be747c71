"""Laws of `onebase train`: what it says is what happens, and what stops it can be gone on with."""

import json
import os
import re
import shlex
import signal
import time

import pytest

from onebase.cli import terminal
from tests.cli.world import Terminal, chats, invoke, process, settings_in, write_rows


def _numbers_of(text, name):
    """Return the words of the line of a table that begins with `name`."""
    (line,) = [line for line in text.splitlines() if line.startswith(name)]
    return line.removeprefix(name).split()


def test_a_training_says_what_it_does_and_what_came_of_it(world):
    settings_in(world, train="steps: 10, batch_size: 4, eval_every: 5, save_every: 5")
    result = invoke("train", "run.yaml", "--out", "runs/a")
    assert result.exit_code == 0, result.stderr
    out, written = result.stdout, json.loads((world / "runs/a/result.json").read_text())
    assert _numbers_of(out, "rows") == ["24", "6"]
    trainable, total = written["trainable_parameters"], written["total_parameters"] - written["trainable_parameters"]
    assert _numbers_of(out, "trainable parameters") == [f"{trainable:,}", f"{total:,}"]
    assert _numbers_of(out, "optimiser state") == [
        *terminal.size(8 * trainable).split(),
        *terminal.size(8 * total).split(),
    ]
    assert "0.001 (the default for lora)" in out
    for step in range(1, 11):
        assert len(re.findall(rf"^step +{step}/10  loss ", out, re.M)) == 1
    assert re.findall(r"^step +(\d+)/10  valid loss", out, re.M) == ["0", "5", "10"]
    assert re.findall(r"^step +(\d+)/10  checkpoint (\S+)", out, re.M) == [("5", "runs/a/checkpoints/step-00000005")]
    table = out.partition("on data.valid")[2]
    assert _numbers_of(table, "loss") == [f"{written['valid_loss_before']:.4f}", f"{written['valid_loss']:.4f}"]
    assert "onebase chat runs/a" in out
    assert result.stderr == ""


def test_of_many_steps_about_ten_lines_are_printed(world):
    result = invoke("train", "run.yaml", "--out", "run", "--set", "train.steps=45", "--set", "data.valid=0.2")
    lines = re.findall(r"^step +(\d+)/45  loss", result.stdout, re.M)
    assert lines == ["5", "10", "15", "20", "25", "30", "35", "40", "45"]


def test_an_evaluation_is_printed_after_its_step(world):
    settings_in(world, train="steps: 4, batch_size: 4, eval_every: 2")
    out = invoke("train", "run.yaml", "--out", "run").stdout
    assert re.findall(r"^step (\d)/4  (loss|valid)", out, re.M) == [
        ("0", "valid"), ("1", "loss"), ("2", "loss"), ("2", "valid"), ("3", "loss"), ("4", "loss"), ("4", "valid"),
    ]  # fmt: skip


def test_rows_that_are_cut_dropped_or_seen_twice_are_told(world):
    rows = [*chats(20), {"messages": []}, {"messages": [{"role": "user", "content": "no answer"}]}]
    write_rows(world / "train.jsonl", rows)
    write_rows(world / "valid.jsonl", [*chats(3, start=30), rows[4]])
    settings_in(world, data=", max_length: 52, on_bad_row: skip", train="steps: 2, batch_size: 4")
    result = invoke("train", "run.yaml", "--out", "run")
    assert result.exit_code == 0, result.stderr
    assert _numbers_of(result.stdout, "dropped rows")[0] == "2"
    assert "train.jsonl line 21" in result.stdout and "train.jsonl line 22" in result.stdout
    assert re.search(r"train: \d+ rows truncated to data.max_length", result.stdout)
    assert "1 row of valid is in train too, token for token (valid.jsonl line 4 = train.jsonl line 5)" in result.stdout


def test_a_target_on_some_blocks_only_is_warned_of(world):
    words = ["--set", "adapter.target_modules=[q_proj, layers.1.self_attn.v_proj]"]
    out = invoke("train", "run.yaml", "--out", "run", *words).stdout
    assert re.search(r"^warning: .*v_proj.* 1/2 blocks", out, re.M)


def test_a_learning_rate_of_ones_own_is_not_called_a_default(world):
    out = invoke("train", "run.yaml", "--out", "run", "--set", "train.learning_rate=3e-4").stdout
    assert "0.0003 (train.learning_rate)" in out


def test_a_finished_run_resumed_shows_its_result_again_and_trains_nothing(world):
    invoke("train", "run.yaml", "--out", "run")
    before = (world / "run/result.json").read_bytes()
    result = invoke("train", "run.yaml", "--out", "run", "--resume")
    assert result.exit_code == 0
    assert "finished already" in result.stderr
    assert "on data.valid" in result.stdout and "step" not in result.stdout.partition("on data.valid")[0]
    assert (world / "run/result.json").read_bytes() == before


def test_an_existing_run_is_not_written_over(world):
    invoke("train", "run.yaml", "--out", "run")
    result = invoke("train", "run.yaml", "--out", "run")
    assert result.exit_code == 2
    assert "--resume" in result.stderr


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("--set=adapter.r=0", "adapter.r"),
        ("--set=train.lerning_rate=1", "learning_rate"),
        ("--set=adapter.target_modules=[q_prj]", "q_proj"),
        ("--set=data.train=nowhere.jsonl", "nowhere.jsonl"),
        ("--set=model=./nowhere", "nowhere"),
    ],
)
def test_wrong_settings_exit_with_2_before_anything_is_trained(world, change, told):
    result = invoke("train", "run.yaml", "--out", "run", change)
    assert result.exit_code == 2
    assert told in result.stderr and "Traceback" not in result.stderr
    assert not (world / "run/result.json").exists()
    assert invoke("train", "run.yaml", "--out", "run").exit_code == 0


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_saves_a_checkpoint_and_the_command_it_prints_goes_on(world, number, code):
    settings_in(world, train="steps: 100000, batch_size: 2")
    running = process(world, "train", "run.yaml", "--out", "runs/a b", "--set", "train.seed=3")
    assert running.stdout is not None
    for line in running.stdout:
        if line.startswith("step") and "valid loss" in line:
            break
    time.sleep(0.3)
    running.send_signal(number)
    _, err = running.communicate(timeout=240)
    assert running.returncode == code
    (checkpoint,) = (world / "runs/a b/checkpoints").iterdir()
    assert f"checkpoints/{checkpoint.name}" in err
    command = shlex.split(err.partition("Go on with: ")[2])
    assert command[0] == "onebase" and command[-1] == "--resume"
    step = int(checkpoint.name.removeprefix("step-"))

    again = process(world, *command[1:])
    assert again.stdout is not None
    first = next(line for line in again.stdout if line.startswith("steps "))
    again.kill()
    again.communicate(timeout=240)
    assert f"{step:,} of them done before" in first
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_closed_terminal_costs_no_step(world):
    settings_in(world, train="steps: 100000, batch_size: 2")
    window = Terminal(world, "train", "run.yaml", "--out", "run")
    window.wait_for("valid loss")
    time.sleep(1.0)
    os.close(window.own)
    assert window.process.wait(timeout=240) == 129
    (checkpoint,) = (world / "run/checkpoints").iterdir()
    done = [json.loads(line)["step"] for line in (world / "run/metrics.jsonl").read_text().splitlines()]
    assert int(checkpoint.name.removeprefix("step-")) == done[-1] > 0


def test_a_closed_output_does_not_end_a_training(world):
    config = settings_in(world)
    training = process(world, "train", config, "--out", "run")
    assert training.stdout is not None
    training.stdout.readline()
    training.stdout.close()
    assert training.wait(timeout=120) == 0
    assert (world / "run" / "result.json").exists()


@pytest.mark.parametrize("columns", ["80", "160"])
def test_a_profile_shows_the_parts_that_its_file_holds(world, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    result = invoke("train", "run.yaml", "--out", "runs/a", "--profile")
    assert result.exit_code == 0, result.stderr
    written = json.loads((world / "runs/a-profile/profile.json").read_text())
    assert max(map(len, result.stdout.splitlines())) <= int(columns)
    for line in written["lines"]:
        name = f"{line['part']}, {line['way']}" if line["way"] else line["part"]
        share = 100 * line["seconds"] / written["profiled_seconds"]
        assert _numbers_of(result.stdout, name)[:3] == [f"{1000 * line['seconds']:,.1f}", f"{share:.1f}", "%"]
    assert _numbers_of(result.stdout, "a step, profiled")[0] == f"{1000 * written['profiled_seconds']:,.1f}"
    assert f"{terminal.percent(written['floor_seconds'] / written['seconds'])} of the step" in " ".join(
        result.stdout.split()
    )
    assert not (world / "runs/a").exists()
    assert "no runs" in (shown := invoke("runs", "runs")).stdout + shown.stderr
    assert invoke("train", "run.yaml", "--out", "runs/a", "--profile").exit_code == 0  # in place of the one before


def test_a_profile_goes_on_with_no_run(world):
    result = invoke("train", "run.yaml", "--out", "runs/a", "--profile", "--resume")
    assert result.exit_code == 2 and "--profile" in result.stderr and "--resume" in result.stderr
    assert not (world / "runs").exists()
