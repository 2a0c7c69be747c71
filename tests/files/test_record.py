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
        ({"labels": {"problem": "regression", "names": ["a"]}}, "labels: must be the problem and the names"),
        ({"labels": {"problem": "single_label_classification", "names": ["a", "a"]}}, "each name once, or null"),
        ({"labels": {"problem": "single_label_classification", "names": []}}, "labels: must be the problem and"),
        ({"task": "chatt"}, "task: must be one of chat, text, classify, regress, got 'chatt'"),
        ({"task": None}, "task: must be one of"),
        ({"task": []}, "task: must be one of"),
        ({"schema_version": 9}, "written by a newer onebase"),
        ({"schema_version": None}, "schema_version must be"),
    ],
)
def test_a_wrong_field_is_named_with_what_to_do(tmp_path, changes, words):
    (tmp_path / RECORD_NAME).write_text(json.dumps({**json.loads(record().to_text()), **changes}))
    with pytest.raises(FileFormatError, match=words) as error:
        read_record(tmp_path)
    assert str(tmp_path / RECORD_NAME) in str(error.value)


def test_classes_in_another_order_than_transformers_reads_are_refused(tmp_path):
    labels = {"problem": "single_label_classification", "names": ["cat", "dog"]}
    (tmp_path / RECORD_NAME).write_text(record(labels=labels).to_text())
    for names, fits in ((["cat", "dog"], True), (["dog", "cat"], False)):
        (tmp_path / "config.json").write_text(json.dumps({"id2label": dict(enumerate(names))}))
        if fits:
            assert read_record(tmp_path) == record(labels=labels)
            continue
        with pytest.raises(
            FileFormatError, match=r"names the classes \['cat', 'dog'\], config\.json beside it \['dog', 'cat'\]"
        ):
            read_record(tmp_path)
