"""Laws of `onebase train` with several settings files: each run by its name, failures told, killed and gone on with."""

import json
import signal
import time

import pytest

from tests.cli.world import Terminal, invoke, process, settings_in


@pytest.fixture
def two(world):
    """Return the names of two settings files, one of rank 2 and one of rank 4."""
    text = settings_in(world, train="steps: 4, batch_size: 4").read_text()
    (world / "two.yaml").write_text(text)
    (world / "four.yaml").write_text(text.replace("r: 2", "r: 4"))
    return ["two.yaml", "four.yaml"]


def test_runs_train_together_and_are_told_by_name(world, two):
    result = invoke("train", *two, "--out", "runs")
    assert result.exit_code == 0, result.stderr
    for name in ("two", "four"):
        own = json.loads((world / "runs" / name / "result.json").read_text())
        assert f"{own['valid_loss']:.4f}" in result.stdout
    alone = invoke("train", "four.yaml", "--out", "alone")
    assert alone.exit_code == 0, alone.stderr
    one, other = (world / place / "adapter/adapter_model.safetensors" for place in ("runs/four", "alone"))
    assert one.read_bytes() == other.read_bytes()
    again = invoke("train", *two, "--out", "runs", "--resume")
    assert again.exit_code == 0, again.stderr
    assert "2 of 2" in again.stdout


def test_one_that_fails_is_named_and_the_exit_code_says_so(world, two):
    (world / "bad.jsonl").write_text('{"prompt": "alone"}\n')
    (world / "bad.yaml").write_text((world / "two.yaml").read_text().replace("train.jsonl", "bad.jsonl"))
    result = invoke("train", *two, "bad.yaml", "--out", "runs")
    assert result.exit_code == 1
    assert "bad: " in result.stderr and "bad.jsonl" in result.stderr
    assert "1 of 3 runs failed: bad" in result.stderr
    assert (world / "runs/two/adapter").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["two.yaml", "two.yaml"], "two: two runs cannot have one name"),
        (["two.yaml", "four.yaml", "--profile"], "--profile"),
        (["two.yaml", "none.yaml"], "none.yaml"),
    ],
)
def test_what_cannot_train_together_is_refused_before_anything_is_made(world, two, words, message):
    result = invoke("train", *words, "--out", "runs")
    assert result.exit_code == 2
    assert message in result.stderr
    assert not (world / "runs").exists()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL])
def test_a_gang_that_was_ended_goes_on_to_the_same_bytes(world, two, sent):
    settings_in(world)
    more = ["--set", "train.steps=60", "--set", "train.save_every=5"]
    whole = invoke("train", *two, "--out", "whole", *more)
    assert whole.exit_code == 0, whole.stderr
    running = process(world, "train", *two, "--out", "cut", *more)
    deadline = time.monotonic() + 120
    while not list((world / "cut").glob("four/checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    running.send_signal(sent)
    _, said = running.communicate(timeout=60)
    assert running.returncode == (143 if sent == signal.SIGTERM else -signal.SIGKILL)
    assert sent == signal.SIGKILL or "--resume" in said
    on = invoke("train", *two, "--out", "cut", *more, "--resume")
    assert on.exit_code == 0, on.stderr
    for name in ("two", "four"):
        files = [world / place / name / "adapter/adapter_model.safetensors" for place in ("whole", "cut")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_on_a_terminal_all_runs_are_seen_moving(world, two):
    shown = Terminal(world, "train", *two, "--out", "runs", "--set", "train.steps=40")
    shown.wait_for("/40")
    shown.wait_for("finished (2 of 2)")
    shown.wait_for("runs/NAME/adapter")


def test_a_closed_output_ends_no_run(world, two):
    training = process(world, "train", *two, "--out", "runs")
    assert training.stdout is not None
    training.stdout.close()
    assert training.wait(timeout=120) == 0
    assert (world / "runs/result.json").exists()
