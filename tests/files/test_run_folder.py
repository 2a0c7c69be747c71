import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from onebase.errors import CapacityError, ConfigError, FileFormatError
from onebase.files.atomic import ensure_writable
from onebase.files.metrics import read_metrics
from onebase.files.run_folder import RunFolder, list_runs, run_bytes, summarise
from tests.files.killing import killed_everywhere
from tests.files.samples import pairs, result, same

STEPS = 6


def train(path, *, until=STEPS, save_every=2):
    """A run that only keeps its files: the tensors of step n are pairs(seed=n)."""
    with RunFolder.open_for_resume(path) as run:
        if run.finished:
            return
        checkpoint = run.load_checkpoint()
        run.write_config("model: tiny\n")
        run.rewind(checkpoint.step if checkpoint else None)
        if checkpoint:
            assert same(checkpoint.tensors, pairs(seed=checkpoint.step))
        for step in range(checkpoint.step + 1 if checkpoint else 1, until + 1):
            run.append_metrics(step, {"loss": 1 / step})
            if step % save_every == 0:
                run.save_checkpoint(step, pairs(seed=step), {"step": step}, best=pairs(seed=1))
        if until == STEPS:
            run.finish(result(steps=STEPS))


def test_a_run_killed_anywhere_goes_on_and_ends_as_if_it_never_was(tmp_path):
    def content(path):
        return {file.relative_to(path): file.read_bytes() for file in path.rglob("*") if file.is_file()}

    train(tmp_path / "whole")
    killed = tmp_path / "killed"
    moments = 0
    for _ in killed_everywhere(tmp_path, lambda: shutil.rmtree(killed, True), lambda: train(killed)):
        train(killed)
        moments += 1
        assert content(killed) == content(tmp_path / "whole")
        assert [record["step"] for record in read_metrics(killed / "metrics.jsonl")] == list(range(1, STEPS + 1))
    assert moments > 50


def test_a_run_needs_a_place_of_its_own(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    (tmp_path / "empty").mkdir()
    for name in ("file", "full"):
        for start in (RunFolder.create, RunFolder.open_for_resume):
            with pytest.raises(ConfigError, match="Choose another --out"):
                start(tmp_path / name)
    for name in ("empty", "not/there/yet"):
        RunFolder.create(tmp_path / name).close()
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    ("until", "words"), [(6, "finished"), (5, "stopped at step 4"), (1, "failed before its first")]
)
def test_a_second_run_in_a_folder_is_refused_with_the_state_of_the_first(tmp_path, until, words):
    train(tmp_path / "run", until=until)
    with pytest.raises(ConfigError, match=rf"a run is there already \({words}.*\)\. Go on with --resume"):
        RunFolder.create(tmp_path / "run")
    assert len(read_metrics(tmp_path / "run" / "metrics.jsonl")) == until


def test_a_start_that_failed_before_the_settings_were_written_does_not_occupy_the_folder(tmp_path):
    RunFolder.create(tmp_path / "run").close()
    with RunFolder.create(tmp_path / "run") as run:
        run.write_config("model: tiny\n")
    with pytest.raises(ConfigError, match="a run is there already"):
        RunFolder.create(tmp_path / "run")


def test_the_settings_come_back_as_they_were_written(tmp_path):
    with RunFolder.create(tmp_path / "run") as run:
        assert run.config_text() is None
        run.write_config("model: tiny\n")
        assert run.config_text() == "model: tiny\n"


def test_opening_a_run_changes_no_record_before_it_is_rewound(tmp_path):
    train(tmp_path / "run", until=5)
    with RunFolder.open_for_resume(tmp_path / "run") as run:
        assert len(read_metrics(run.metrics.path)) == 5
        run.rewind(4)
        assert len(read_metrics(run.metrics.path)) == 4


def test_a_damaged_newest_checkpoint_is_an_error_until_it_is_deleted(tmp_path):
    train(tmp_path / "run", until=5)
    newest = tmp_path / "run" / "checkpoints" / "step-00000004"
    (newest / "state.json").write_text("{}")
    with pytest.raises(FileFormatError, match="To go on from step 2 delete the folder"):
        train(tmp_path / "run")
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    train(tmp_path / "run")
    assert [record["step"] for record in read_metrics(tmp_path / "run" / "metrics.jsonl")] == list(range(1, STEPS + 1))


def hold(path):
    """Start a process that trains in `path` until it is killed."""
    code = f"""
from pathlib import Path
from onebase.files.run_folder import RunFolder
run = RunFolder.create(Path({str(path)!r}))
run.write_config("model: tiny")
print("ready", flush=True)
input()
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    return process


def test_two_processes_never_train_in_one_folder_and_a_killed_one_lets_go(tmp_path):
    other = hold(tmp_path / "run")
    try:
        with pytest.raises(ConfigError, match=rf"process {other.pid} on .* is training there"):
            RunFolder.open_for_resume(tmp_path / "run")
        assert summarise(tmp_path / "run").state == "running"
        with pytest.raises(ConfigError, match=r"already \(running\)"):
            RunFolder.create(tmp_path / "run")
    finally:
        os.kill(other.pid, signal.SIGKILL)
        other.communicate()
    RunFolder.open_for_resume(tmp_path / "run").close()
    assert summarise(tmp_path / "run").state == "failed"


def test_one_process_cannot_open_a_folder_twice_either(tmp_path):
    with RunFolder.create(tmp_path / "run") as run:
        run.write_config("model: tiny\n")
        assert summarise(tmp_path / "run").state == "running"
        with pytest.raises(ConfigError, match=rf"process {os.getpid()} on"):
            RunFolder.open_for_resume(tmp_path / "run")
    RunFolder.open_for_resume(tmp_path / "run").close()


def test_a_list_of_runs_keeps_no_one_from_starting(tmp_path):
    train(tmp_path / "run", until=1)
    code = f"""
from pathlib import Path
from onebase.files.run_folder import list_runs
print("ready", flush=True)
while True:
    list_runs(Path({str(tmp_path)!r}))
"""
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as watcher:
        assert watcher.stdout is not None and watcher.stdout.readline() == "ready\n"
        for _ in range(20):
            RunFolder.open_for_resume(tmp_path / "run").close()
            time.sleep(0.005)
        watcher.kill()


def test_the_list_tells_the_state_of_every_run(tmp_path):
    for name, until in (("b-stopped", 5), ("a-finished", 6), ("c-failed", 1)):
        train(tmp_path / name, until=until)
    train(tmp_path / "d-damaged")
    (tmp_path / "d-damaged" / "result.json").write_text("{")
    (tmp_path / "no run").mkdir()
    (tmp_path / "file").touch()
    runs = {run.name: run for run in list_runs(tmp_path)}
    assert {name: run.state_text for name, run in runs.items()} == {
        "a-finished": "finished",
        "b-stopped": "stopped at step 4",
        "c-failed": "failed before its first checkpoint",
        "d-damaged": "stopped at step 6",
    }
    assert runs["a-finished"].result == result(steps=STEPS)
    assert runs["b-stopped"].step == 5 and runs["b-stopped"].last_metrics["loss"] == 1 / 5
    assert "result.json" in runs["d-damaged"].note and not runs["a-finished"].note
    assert list_runs(tmp_path / "a-finished") == [runs["a-finished"]]
    with pytest.raises(ConfigError, match="there is no such folder"):
        list_runs(tmp_path / "none")


@pytest.mark.parametrize("name", ["result.json", "metrics.jsonl"])
@pytest.mark.parametrize("odd", ["folder", "bytes"])
def test_a_file_that_cannot_be_read_is_a_note_of_its_run_and_hides_no_other(tmp_path, name, odd):
    for run in ("a", "b"):
        train(tmp_path / run)
    (tmp_path / "a" / name).unlink()
    if odd == "folder":
        (tmp_path / "a" / name).mkdir()
    else:
        (tmp_path / "a" / name).write_bytes(b"\xff\n")
    first, second = list_runs(tmp_path)
    assert str(tmp_path / "a" / name) in first.note
    assert second.state == "finished" and not second.note


def test_listing_runs_and_importing_the_room_needs_no_torch():
    code = "import sys, onebase.files.run_folder, onebase.files.peft_format, onebase.files.model_card; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_full_disk_names_the_checkpoint_to_go_on_from(tmp_path, monkeypatch):
    train(tmp_path / "run", until=5)
    with RunFolder.open_for_resume(tmp_path / "run") as run:
        run.rewind(4)
        with monkeypatch.context() as patched:
            patched.setattr("pathlib.Path.open", no_space)
            with pytest.raises(CapacityError) as error:
                run.append_metrics(5, {})
    assert "step-00000004 (--resume)" in str(error.value)


def no_space(*_):
    raise OSError(28, "No space left on device")


def test_the_space_for_a_run_is_checked_before_it_starts(tmp_path):
    needed = run_bytes(10**15, 2 * 10**15, keep=2, keep_best=True)
    assert needed >= 10**15 + 3 * 4 * 10**15
    with pytest.raises(CapacityError, match="the run needs about"):
        ensure_writable(tmp_path / "run", needed, writing="the run")
