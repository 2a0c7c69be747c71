import json

import pytest

import onebase
from onebase.errors import FileFormatError
from onebase.files.record import RECORD_NAME, read_record
from tests.files.samples import record


@pytest.mark.parametrize("changes", [{}, {"base_fingerprint": None, "seed": None}, {"extras": {"head": [1, 2.5]}}])
def test_a_record_comes_back_as_it_was_written(tmp_path, changes):
    (tmp_path / RECORD_NAME).write_text(record(**changes).to_text())
    assert read_record(tmp_path) == record(**changes)


def test_a_record_names_the_onebase_that_made_it():
    content = json.loads(record().to_text())
    assert content["onebase_version"] == onebase.__version__
    assert content["schema_version"] == 1


def test_a_field_that_a_later_onebase_added_does_no_harm(tmp_path):
    (tmp_path / RECORD_NAME).write_text(json.dumps({**json.loads(record().to_text()), "later": 1}))
    assert read_record(tmp_path) == record()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"base": ""}, "base: must be text"),
        ({"seed": 1.5}, "seed: must be a whole number or null, got 1.5"),
        ({"base_fingerprint": 7}, "base_fingerprint: must be text or null"),
        ({"schema_version": 9}, "written by a newer onebase"),
        ({"schema_version": None}, "schema_version must be"),
    ],
)
def test_a_wrong_field_is_named_with_what_to_do(tmp_path, changes, words):
    (tmp_path / RECORD_NAME).write_text(json.dumps({**json.loads(record().to_text()), **changes}))
    with pytest.raises(FileFormatError, match=words) as error:
        read_record(tmp_path)
    assert str(tmp_path / RECORD_NAME) in str(error.value)
