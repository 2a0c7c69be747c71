import json
import math

import pytest

from onebase.errors import FileFormatError
from onebase.files.result import read_result, write_result
from tests.files.samples import result

PROMISED = set(
    """schema_version steps examples tokens seconds compile_seconds examples_per_s tokens_per_s peak_rss_bytes
    peak_device_bytes optimizer_state_bytes train_loss valid_loss_before valid_loss best_step trainable_parameters
    total_parameters adapter_bytes base_fingerprint""".split()  # noqa: SIM905
)


@pytest.mark.parametrize("changes", [{}, {"valid_loss": None, "best_step": None}, {"more": {"accuracy": 0.5}}])
def test_a_result_comes_back_as_it_was_written(tmp_path, changes):
    write_result(tmp_path, result(**changes))
    assert read_result(tmp_path) == result(**changes)


def test_the_file_holds_every_field_that_scripts_may_rely_on(tmp_path):
    write_result(tmp_path, result(more={"accuracy": 0.5}))
    content = json.loads((tmp_path / "result.json").read_text())
    assert set(content) == PROMISED | {"accuracy"}


def test_a_run_without_a_result_has_none(tmp_path):
    assert read_result(tmp_path) is None


@pytest.mark.parametrize(
    "changes", [{"train_loss": math.nan}, {"steps": -1}, {"steps": 1.5}, {"more": {"steps": 1}}, {"valid_loss": "2"}]
)
def test_an_impossible_result_cannot_be_made(changes):
    with pytest.raises(AssertionError):
        result(**changes)


def test_all_faults_of_a_file_are_told_at_once(tmp_path):
    write_result(tmp_path, result())
    path = tmp_path / "result.json"
    content = json.loads(path.read_text())
    del content["steps"]
    path.write_text(json.dumps({**content, "tokens": "many", "train_loss": None}))
    with pytest.raises(FileFormatError, match=r"3 problems in .*result\.json") as error:
        read_result(tmp_path)
    for part in ("steps: is missing", "tokens: must be a whole number from 0, got 'many'", "train_loss", "delete it"):
        assert part in str(error.value)


@pytest.mark.parametrize(("version", "words"), [(2, "newer onebase"), (0, "whole number from 1"), ("1", "whole")])
def test_a_file_of_another_version_is_refused(tmp_path, version, words):
    (tmp_path / "result.json").write_text(json.dumps({**result().as_dict(), "schema_version": version}))
    with pytest.raises(FileFormatError, match=words):
        read_result(tmp_path)
