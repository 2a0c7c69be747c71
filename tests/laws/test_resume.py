"""Killed at any step and resumed equals never killed: the same adapter to the byte, each step once in the metrics."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from onebase.files.metrics import read_metrics
from onebase.files.result import Result, read_result
from onebase.ops import bits
from onebase.train.stop import Stopped
from tests.train import runs
from tests.train.runs import Watching, Workshop, adapter_bytes, checkpoint_names, metrics

# Everything that could carry a run's past: dropout, epochs, clipping, the best weights, patience, micro-batches,
# recomputation, moments of the optimiser, checkpoints of its own.
EVERYTHING: dict[str, Any] = {
    "adapter": {"lora_dropout": 0.2, "target_modules": ["q_proj", "v_proj", "down_proj"]},
    "train": {
        "epochs": 5,
        "learning_rate": 0.05,
        "lr_scheduler_type": "linear",
        "warmup_steps": 2,
        "weight_decay": 0.01,
        "eval_every": 1,
        "early_stopping_patience": 3,
        "keep_best": True,
        "micro_batch_tokens": 100,
        "activation_checkpointing": True,
        "save_every": 2,
    },
}
CLOCKS_AND_MEMORY = {"seconds", "examples_per_s", "tokens_per_s", "peak_rss_bytes"}


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shop")
    with runs.own_home(folder / "home"):
        made = runs.workshop(folder)
        # Rows of another kind: their format is learned first, then they get worse, so that patience ends the run.
        other = [
            {"prompt": f"Define the noun {word}.", "completion": "Zebra!"} for word in ("dog", "cat", "away", "sat")
        ]
        runs.write_rows(made.valid, other)
        yield made


@pytest.fixture(scope="module")
def uninterrupted(shop: Workshop) -> Path:
    out = shop.folder / "uninterrupted"
    runs.run(shop.settings(**EVERYTHING), out)
    return out


def assert_same_run(out: Path, uninterrupted: Path) -> None:
    assert adapter_bytes(out) == adapter_bytes(uninterrupted)
    assert metrics(out) == metrics(uninterrupted)
    assert _repeatable(read_result(out)) == _repeatable(read_result(uninterrupted))


def _repeatable(result: Result | None) -> dict:
    assert result is not None
    return {name: value for name, value in result.as_dict().items() if name not in CLOCKS_AND_MEMORY}


def test_the_run_of_this_law_stops_early_and_keeps_weights_that_are_not_its_last(uninterrupted):
    result = read_result(uninterrupted)
    assert result is not None and result.best_step is not None
    assert 1 < result.best_step < result.steps < 15  # else patience and keep-best would have no part in the law
    assert [record["step"] for record in metrics(uninterrupted)] == list(range(1, result.steps + 1))


def test_stopped_after_any_step_and_resumed_equals_never_stopped(shop, uninterrupted):
    settings = shop.settings(**EVERYTHING)
    steps = len(metrics(uninterrupted))
    for step in range(steps):
        out = shop.folder / f"stopped-{step}"
        with pytest.raises(Stopped):
            runs.run(settings, out, watching=Watching(stop_after={step}))
        assert checkpoint_names(out)[-1] == f"step-{step:08d}"
        runs.run(settings, out, resume=True)
        assert_same_run(out, uninterrupted)


def test_stopped_after_every_step_in_turn_equals_never_stopped(shop, uninterrupted):
    settings = shop.settings(**EVERYTHING)
    out = shop.folder / "stumbling"
    steps = len(metrics(uninterrupted))
    for step in range(steps):
        with pytest.raises(Stopped):
            runs.run(settings, out, resume=True, watching=Watching(stop_after={step}))
    runs.run(settings, out, resume=True)
    assert_same_run(out, uninterrupted)


@pytest.mark.parametrize("kind", ["cosine", "step"])
def test_a_run_without_validation_rows_resumes_under_every_schedule(shop, tmp_path, kind):
    extra = {"lr_step_size": 2} if kind == "step" else {}
    settings = shop.settings(
        valid=False,
        adapter={"lora_dropout": 0.1, "target_modules": ["v_proj"]},
        train={"steps": 7, "lr_scheduler_type": kind, **extra},
    )
    runs.run(settings, tmp_path / "whole")
    with pytest.raises(Stopped):
        runs.run(settings, tmp_path / "halved", watching=Watching(stop_after={4}))
    runs.run(settings, tmp_path / "halved", resume=True)
    assert_same_run(tmp_path / "halved", tmp_path / "whole")


# ------------------------------------------------------------------------------------------------ kill -9, for real

# Runs `onebase train ...` and dies by SIGKILL before the n-th operation of a kind on a path that holds some text.
DYING = """
import os, signal, sys
import onebase
kind, part, number, *arguments = sys.argv[1:]
left = int(number)

def count(found, place):
    global left
    if found == kind and part in str(place):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

def on_event(event, values):
    if event == "os.rename":
        count("rename", values[1])
    elif event == "open" and isinstance(values[0], str) and isinstance(values[1], str) and set(values[1]) & set("wa"):
        count("open", values[0])
    elif event == "shutil.rmtree":
        count("delete", values[0])

sync = os.fsync
def counted(handle):
    sync(handle)
    count("synced", os.readlink(f"/proc/self/fd/{handle}"))
os.fsync = counted
sys.addaudithook(on_event)
sys.argv = ["onebase", "train", *arguments]
from onebase.cli.app import main
main()
"""
MOMENTS = {
    "in the middle of a step's metrics": ("open", "metrics.jsonl", 6, 2),
    "while the tensors of a checkpoint are written": ("open", "best.safetensors", 2, 2),
    "before a complete checkpoint gets its name": ("rename", "checkpoints/step-00000006", 1, 4),
    "while an old checkpoint is deleted": ("delete", "step-00000002", 1, 6),
    "while the adapter is written": ("synced", "adapter_model.safetensors", 1, None),
    "between the adapter and the result": ("rename", "result.json", 1, None),
}
QUICK = {"before a complete checkpoint gets its name", "while the adapter is written"}


def config_file(shop: Workshop, **sections) -> Path:
    path = shop.folder / "run.yaml"
    path.write_text(yaml.safe_dump(shop.values(**sections)), encoding="utf-8")
    return path


def onebase(
    *arguments: str, program: tuple[str, ...] = ("-m", "onebase", "train"), env: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *program, *arguments]
    return subprocess.run(command, check=False, capture_output=True, text=True, env=env or environment())


def environment() -> dict[str, str]:
    source = str(Path(__file__).parents[2] / "src")
    return os.environ | {"PYTHONPATH": source, "OMP_NUM_THREADS": "1"}


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="the moments are found through /proc")
@pytest.mark.parametrize(
    "moment", [moment if moment in QUICK else pytest.param(moment, marks=pytest.mark.slow) for moment in MOMENTS]
)
def test_killed_at_any_moment_and_resumed_equals_never_killed(shop, uninterrupted, moment, tmp_path):
    kind, part, number, newest = MOMENTS[moment]
    out = tmp_path / "run"
    config = config_file(shop, **EVERYTHING)
    died = onebase(kind, part, str(number), str(config), "--out", str(out), program=("-c", DYING))
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert read_result(out) is None
    if newest is not None:
        assert checkpoint_names(out)[-1] == f"step-{newest:08d}"
    runs.run(shop.settings(**EVERYTHING), out, resume=True)
    assert_same_run(out, uninterrupted)
    assert not [path for path in out.rglob("*") if ".onebase-" in path.name]  # nothing of the crash is left


@pytest.mark.slow
def test_a_run_without_batch_invariance_is_resumed_to_the_bit_and_a_change_of_it_is_said(shop, tmp_path):
    shell = {name: value for name, value in environment().items() if name != bits.VARIABLE}
    config = str(config_file(shop, **EVERYTHING))
    whole = onebase(config, "--out", str(tmp_path / "whole"), env=shell)
    assert whole.returncode == 0, whole.stderr
    for out, way_on in (("part", shell), ("moved", shell | {bits.VARIABLE: "COMPATIBLE"})):
        moment = ("rename", "checkpoints/step-00000006", "1")
        died = onebase(*moment, config, "--out", str(tmp_path / out), program=("-c", DYING), env=shell)
        assert died.returncode == -signal.SIGKILL, died.stderr
        resumed = onebase(config, "--out", str(tmp_path / out), "--resume", env=way_on)
        assert resumed.returncode == 0, resumed.stderr
        assert ("products was" in resumed.stderr + resumed.stdout) == (way_on is not shell)
    assert_same_run(tmp_path / "part", tmp_path / "whole")


@pytest.mark.slow
def test_a_run_killed_from_outside_goes_on_from_the_command_line(shop, uninterrupted, tmp_path):
    out = tmp_path / "run"
    command = [str(config_file(shop, **EVERYTHING)), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "onebase", "train", *command], env=environment(), stdout=subprocess.DEVNULL
    )
    while process.poll() is None and len(read_metrics(out / "metrics.jsonl")) < 4:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    with (out / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 5, "loss": 1.')  # what a torn write leaves
    done = onebase(*command, "--resume")
    assert done.returncode == 0, done.stderr
    assert_same_run(out, uninterrupted)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_command_with_a_checkpoint_and_the_way_on(shop, uninterrupted, tmp_path, number, code):
    out = tmp_path / "run"
    command = [str(config_file(shop, **EVERYTHING)), "--out", str(out)]
    process = subprocess.Popen(
        [sys.executable, "-m", "onebase", "train", *command],
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while process.poll() is None and len(read_metrics(out / "metrics.jsonl")) < 2:
        time.sleep(0.02)
    process.send_signal(number)
    said = process.communicate()[1]
    assert process.returncode == code, said
    steps = read_metrics(out / "metrics.jsonl")[-1]["step"]
    assert checkpoint_names(out)[-1] == f"step-{steps:08d}"
    assert "--resume" in said and "Traceback" not in said
    runs.run(shop.settings(**EVERYTHING), out, resume=True)
    assert_same_run(out, uninterrupted)


def test_the_checkpoint_a_stopped_run_goes_on_from_may_be_an_older_one(shop, uninterrupted, tmp_path):
    """A damaged checkpoint is refused by name; without it the run goes on from the one before."""
    from onebase.errors import FileFormatError

    out = tmp_path / "run"
    settings = shop.settings(**EVERYTHING)
    with pytest.raises(Stopped):
        runs.run(settings, out, watching=Watching(stop_after={5}))
    state = out / "checkpoints" / "step-00000005" / "state.json"
    changed = json.loads(state.read_text())
    changed["books"]["loss_sum"] += 1
    state.write_text(json.dumps(changed))
    with pytest.raises(FileFormatError, match=r"step-00000005.*delete the folder"):
        runs.run(settings, out, resume=True)
    for file in state.parent.iterdir():
        file.unlink()
    state.parent.rmdir()
    runs.run(settings, out, resume=True)
    assert_same_run(out, uninterrupted)
