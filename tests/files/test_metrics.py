import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.errors import CapacityError, FileFormatError
from onebase.files.metrics import Metrics, read_metrics

floats = st.floats(allow_nan=False, allow_infinity=False)
runs = st.lists(floats, min_size=1, max_size=12)


def write(path, losses):
    metrics = Metrics(path)
    for step, loss in enumerate(losses, start=1):
        metrics.append(step, {"loss": loss})
    return metrics


@given(runs, st.integers(0, 12), st.integers(0, 40), runs)
def test_a_run_that_went_on_holds_each_step_once_wherever_it_was_cut(tmp_path_factory, losses, checkpoint, cut, rest):
    path = tmp_path_factory.mktemp("run") / "metrics.jsonl"
    write(path, losses)
    path.write_bytes(path.read_bytes()[: path.stat().st_size - cut])  # a crash takes the end away
    survived = len(read_metrics(path))
    resumed = Metrics(path)
    resumed.rewind(checkpoint)
    first = min(survived, checkpoint)
    assert resumed.last_step == (first or None)
    for step, loss in enumerate(rest, start=first + 1):
        resumed.append(step, {"loss": loss})
    expected = [*losses[:first], *rest]
    assert read_metrics(path) == [{"step": step, "loss": loss} for step, loss in enumerate(expected, start=1)]


def test_cutting_back_to_the_end_changes_no_byte(tmp_path):
    write(tmp_path / "m", [1.0, 0.1 + 0.2, 3e-300])
    before = (tmp_path / "m").read_bytes()
    Metrics(tmp_path / "m").rewind(3)
    assert (tmp_path / "m").read_bytes() == before


def test_a_run_that_starts_again_begins_with_nothing_and_one_from_step_0_keeps_it(tmp_path):
    metrics = Metrics(tmp_path / "m")
    metrics.append(0, {"valid_loss": 3.5})
    metrics.append(1, {"loss": 3.0})
    metrics.rewind(0)
    assert read_metrics(tmp_path / "m") == [{"step": 0, "valid_loss": 3.5}]
    metrics.rewind(None)
    assert read_metrics(tmp_path / "m") == []


def test_a_record_is_in_the_file_as_soon_as_its_step_is_done_and_any_json_reader_takes_it(tmp_path):
    metrics = write(tmp_path / "m", [1.0])
    metrics.append(2, {"loss": math.nan, "rate": math.inf, "memory": 5, "note": "\N{SNOWMAN}"})
    line = (tmp_path / "m").read_text(encoding="utf-8").splitlines()[-1]
    assert json.loads(line) == {"step": 2, "loss": None, "rate": None, "memory": 5, "note": "\N{SNOWMAN}"}


def test_a_step_that_does_not_ascend_is_our_own_mistake(tmp_path):
    metrics = write(tmp_path / "m", [1.0, 2.0])
    with pytest.raises(AssertionError):
        metrics.append(2, {})


@pytest.mark.parametrize("line", ["{", "[]", '{"loss": 1}', '{"step": "1"}', '{"step": 1}', ""])
def test_a_damaged_line_in_the_middle_is_named(tmp_path, line):
    (tmp_path / "m").write_text(f'{{"step": 1}}\n{line}\n{{"step": 2}}\n')
    with pytest.raises(FileFormatError, match="m line 2: "):
        read_metrics(tmp_path / "m")


def test_a_full_disk_names_what_is_safe(tmp_path, monkeypatch):
    metrics = write(tmp_path / "m", [1.0])

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("pathlib.Path.open", full)
    with pytest.raises(CapacityError, match=r"the metrics of step 2: the disk is full\. Step 1 is safe\."):
        metrics.append(2, {}, kept="Step 1 is safe.")
