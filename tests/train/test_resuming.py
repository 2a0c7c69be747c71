"""Starting over, resuming and stopping: what is refused, what is noted, what goes on."""

import hashlib
import json
import shutil
import signal

import pytest

from onebase.base import memory
from onebase.config.reading import read_settings
from onebase.errors import CapacityError, ConfigError, ResumeError
from onebase.files.result import read_result
from onebase.train import run as run_module
from onebase.train.stop import Stopped
from tests.train import runs
from tests.train.runs import FEW, Watching, Workshop, adapter_bytes, checkpoint_names, metrics


def test_a_folder_with_a_run_is_left_alone_without_resume(shop, finished):
    out, _ = finished
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and not path.name.startswith(".")}
    with pytest.raises(ConfigError, match=r"a run is there already \(finished\).*--resume"):
        runs.run(shop.settings(train={"steps": 1}), out)
    assert before == {path: path.read_bytes() for path in before}


def test_resuming_a_finished_run_returns_its_result_and_does_nothing(finished):
    out, _ = finished
    watching = Watching()
    stamp = (out / "result.json").stat().st_mtime_ns
    assert runs.run(read_settings(out / "config.yaml"), out, resume=True, watching=watching) == read_result(out)
    assert watching.steps == [] and "finished already" in watching.notes[0]
    assert (out / "result.json").stat().st_mtime_ns == stamp


def test_resuming_what_never_started_starts(shop, tmp_path):
    settings = shop.settings(adapter=FEW, train={"steps": 2})
    result = runs.run(settings, tmp_path / "run", resume=True)
    assert result.steps == 2 and len(metrics(tmp_path / "run")) == 2


@pytest.fixture
def halved(shop, tmp_path):
    """A run stopped after two of four steps, over its own copies of rows and model."""
    own = Workshop(tmp_path, tmp_path / "model", tmp_path / "train.jsonl", tmp_path / "valid.jsonl")
    shutil.copytree(shop.model, own.model)
    shutil.copy(shop.train, own.train)
    shutil.copy(shop.valid, own.valid)
    with pytest.raises(Stopped):
        runs.run(own.settings(adapter=FEW, train={"steps": 4}), tmp_path / "run", watching=Watching(stop_after={2}))
    return own


def test_resuming_with_other_settings_shows_each_difference(halved):
    settings = halved.settings(adapter=FEW | {"r": 8}, train={"steps": 4, "learning_rate": 0.5})
    with pytest.raises(ResumeError) as caught:
        runs.run(settings, halved.folder / "run", resume=True)
    text = str(caught.value)
    assert "2 problems" in text and "adapter.r: was 4, is 8." in text
    assert "train.learning_rate: was 0.01, is 0.5." in text
    assert "--resume" in text and checkpoint_names(halved.folder / "run") == ["step-00000002"]


@pytest.mark.parametrize(("part", "words"), [("train", "the training rows"), ("valid", "the validation rows")])
def test_resuming_with_other_rows_is_refused(halved, part, words):
    runs.write_rows(getattr(halved, part), runs.definitions(11, seed=5))
    with pytest.raises(ResumeError, match=f"changed since the run was started: {words}"):
        runs.run(halved.settings(adapter=FEW, train={"steps": 4}), halved.folder / "run", resume=True)
    assert [record["step"] for record in metrics(halved.folder / "run")] == [1, 2]


def test_resuming_on_another_base_is_refused(halved):
    shutil.rmtree(halved.model)
    runs.model_folder(halved.model, seed=9)
    with pytest.raises(ResumeError, match="changed since the run was started: the base"):
        runs.run(halved.settings(adapter=FEW, train={"steps": 4}), halved.folder / "run", resume=True)


def test_resuming_on_another_machine_is_noted(halved):
    state = halved.folder / "run" / "checkpoints" / "step-00000002" / "state.json"
    changed = json.loads(state.read_text())
    changed["identity"] |= {"torch": "2.0.0", "threads": 64}
    text = json.dumps(changed)
    state.write_text(text)
    manifest = state.parent / "manifest.json"
    sums = json.loads(manifest.read_text())
    sums["files"]["state.json"] = {"bytes": len(text), "sha256": hashlib.sha256(text.encode()).hexdigest()}
    manifest.write_text(json.dumps(sums))
    watching = Watching()
    runs.run(halved.settings(adapter=FEW, train={"steps": 4}), halved.folder / "run", resume=True, watching=watching)
    [note] = watching.notes
    assert "torch was 2.0.0" in note and "threads was 64, is 1" in note and "may differ" in note
    assert len(metrics(halved.folder / "run")) == 4


def test_resuming_on_the_same_machine_says_nothing(halved):
    watching = Watching()
    runs.run(halved.settings(adapter=FEW, train={"steps": 4}), halved.folder / "run", resume=True, watching=watching)
    assert watching.notes == [] and watching.plans[0].first_step == 2


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_says_where_it_stands(shop, tmp_path, number, code):
    watching = Watching(stop_after={2}, signal_number=number)
    with pytest.raises(Stopped, match=r"stopped after step 2 of 4; the checkpoint is in .*step-00000002") as caught:
        runs.run(shop.settings(adapter=FEW, train={"steps": 4}), tmp_path / "run", watching=watching)
    assert caught.value.exit_code == code
    assert read_result(tmp_path / "run") is None


def test_a_run_that_is_resumed_with_too_little_memory_says_so(shop, tmp_path, monkeypatch):
    watching = Watching(stop_after={2})
    settings = shop.settings(adapter=FEW, train={"steps": 4})
    with pytest.raises(Stopped):
        runs.run(settings, tmp_path / "run", watching=watching)
    monkeypatch.setattr(memory, "available_bytes", lambda: 10_000)
    monkeypatch.setattr(memory, "check_room_for", lambda *args: None)
    with pytest.raises(CapacityError, match=r"resumed run keeps the micro-batches.*another --out"):
        runs.run(settings, tmp_path / "run", resume=True)
    assert checkpoint_names(tmp_path / "run")


def test_an_edited_configuration_in_the_run_folder_is_noticed_on_resume(shop, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Stopped):
        runs.run(shop.settings(adapter=FEW, train={"steps": 4}), out, watching=Watching(stop_after={2}))
    config = out / "config.yaml"
    config.write_text(config.read_text().replace("steps: 4", "steps: 5"))
    with pytest.raises(ResumeError, match=r"the settings \(config\.yaml"):
        runs.run(read_settings(config), out, resume=True)


def test_a_run_whose_adapter_cannot_be_written_keeps_its_last_step(shop, tmp_path, monkeypatch):
    out, settings = tmp_path / "run", shop.settings(adapter=FEW, train={"steps": 3})
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_run_adapter", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            runs.run(settings, out)
    assert checkpoint_names(out) == ["step-00000003"]
    watching = Watching()
    assert runs.run(settings, out, resume=True, watching=watching).steps == 3
    assert watching.steps == [] and adapter_bytes(out)
