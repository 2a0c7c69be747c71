"""Laws of reading: every format gives the same rows, every row knows its place, every fault names it."""

import csv
import json
import re
import time

import datasets
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet  # type: ignore[import-untyped]
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from onebase.data.reading import read_rows
from onebase.data.rows import Row
from onebase.errors import DataError

cells = st.text(max_size=12).filter(lambda text: "\x00" not in text)
tables = st.lists(
    st.fixed_dictionaries({"prompt": cells, "completion": cells.map(lambda cell: cell + "x")}), min_size=1, max_size=6
)


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8", newline="")


def write_json(path, rows):
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def write_csv(path, rows):
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)


def write_parquet(path, rows):
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)


WRITERS = {
    "rows.jsonl": write_jsonl,
    "rows.ndjson": write_jsonl,
    "rows.json": write_json,
    "rows.csv": write_csv,
    "rows.tsv": write_csv,
    "rows.parquet": write_parquet,
}


def message_of(row):
    assert row.fault is not None
    return row.fault.message


def values(source, **more):
    rows = list(read_rows(source, **more))
    assert not [row.fault for row in rows if row.fault]
    return [dict(row.values) for row in rows]


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=tables)
def test_every_format_gives_back_the_rows_that_were_written(tmp_path, name, rows):
    WRITERS[name](tmp_path / name, rows)
    assert values(tmp_path / name) == rows


def test_nested_rows_come_back_from_parquet_without_the_keys_of_other_rows(tmp_path):
    rows = [{"messages": [{"role": "user", "content": "a"}]}, {"messages": [{"role": "tool", "name": "b"}]}]
    write_parquet(tmp_path / "rows.parquet", rows)
    assert values(tmp_path / "rows.parquet") == rows


def test_a_place_is_the_file_as_given_and_the_line_counted_from_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text('{"a": 1}\n\n  \n{"a": 2}\n')
    (tmp_path / "b.json").write_text('[\n{"a":\n1},\n\n{"a": 2}]')
    (tmp_path / "c.csv").write_text('a,b\n"1\n1",x\n\n2,y\n')
    write_parquet(tmp_path / "d.parquet", [{"a": 1}, {"a": 2}])
    places = [row.place for row in read_rows(["a.jsonl", tmp_path / "b.json", "c.csv", "d.parquet"])]
    assert places == [
        "a.jsonl line 1", "a.jsonl line 4", "b.json line 2", "b.json line 5",
        "c.csv line 2", "c.csv line 5", "d.parquet row 1", "d.parquet row 2",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"a": 1', r"not valid JSON: Expecting ',' delimiter at column 8: '\{\"a\": 1'"),
        ("plain", "not valid JSON: Expecting value at column 1: 'plain'"),
        ('{"a": 1, "a": 2}', r"not valid JSON: 'a' stands twice in one object: '\{\"a\": 1"),
        ("[1, 2]", r"a row must be a JSON object, got a list: '\[1, 2\]'"),
        ('"text"', "a row must be a JSON object, got a str"),
        ('{"a": "\\ud83d"}', "half of a surrogate pair"),
        ('{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_a_broken_line_is_a_fault_of_its_row_and_the_others_are_read(tmp_path, line, message):
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n' + line + '\n{"a": 3}\n')
    rows = list(read_rows(tmp_path / "rows.jsonl"))
    assert [row.fault is None for row in rows] == [True, False, True]
    assert rows[1].place.endswith("rows.jsonl line 2")
    assert re.search(message, message_of(rows[1]))


@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), max_size=5), max_size=4),
    mark=st.booleans(),
)
def test_bytes_that_are_not_utf8_are_named_with_line_and_offset(tmp_path, before, mark):
    head = (
        b"\xef\xbb\xbf" * mark + "".join(json.dumps({"a": text}, ensure_ascii=False) + "\n" for text in before).encode()
    )
    content = head + b'{"a": "caf\xe9"}\n'
    (tmp_path / "rows.jsonl").write_bytes(content)
    bad = list(read_rows(tmp_path / "rows.jsonl"))[-1]
    assert bad.place.endswith(f"line {len(before) + 1}")
    assert f"byte 0xe9 at offset {content.index(b'caf') + 3} of the file" in message_of(bad)


def test_formats_that_cannot_skip_a_row_raise_for_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "rows.json").write_bytes(b'[\n{"a": "caf\xe9"}]')
    with pytest.raises(DataError, match=r"rows\.json line 2: not UTF-8: byte 0xe9 at offset 12"):
        list(read_rows(tmp_path / "rows.json"))
    (tmp_path / "rows.csv").write_bytes(b"a\nb\ncaf\xe9\n")
    with pytest.raises(DataError, match=r"rows\.csv line 3: not UTF-8: byte 0xe9 at offset 7"):
        list(read_rows(tmp_path / "rows.csv"))


def test_a_byte_order_mark_is_no_content_and_utf16_is_refused(tmp_path):
    for name, text in {"a.jsonl": '{"a": "1"}\n', "a.json": '[{"a": "1"}]', "a.csv": "a\n1\n"}.items():
        (tmp_path / name).write_text(text, encoding="utf-8-sig")
        assert values(tmp_path / name) == [{"a": "1"}]
        (tmp_path / name).write_text(text, encoding="utf-16")
        with pytest.raises(DataError, match="UTF-16"):
            values(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"\n \n"])
@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.json", "a.parquet"])
def test_an_empty_file_is_refused_by_name(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=name):
        values(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "[]", "holds no rows"),
        ("a.csv", "a,b\n", "holds no rows"),
        ("a.csv", "a,a\n1,2\n", "line 1: the header names 'a' twice"),
        ("a.csv", 'a,b\n1,2\n"x', r"line 3: not valid CSV"),
        ("a.json", '[{"a": 1},\n{"a": }]', "line 2: not valid JSON in the row that starts here"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', "line 2: not valid JSON: expected ',' or ']'"),
        ("a.json", '[{"a": 1}', "not valid JSON"),
        ("a.json", '[{"a": 1, "a": 2}]', "line 1: not valid JSON .*: 'a' stands twice"),
        ("a.json", '[{"a": 1}]\n[{"a": 2}]', "line 1: not valid JSON: .* follows the end of the list"),
        ("a.parquet", "PAR1 no", "not a readable Parquet file"),
        ("a.txt", "hello", r"'\.txt' is no known data format; known are \.jsonl"),
    ],
)
def test_a_damaged_file_is_refused_with_its_place(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=f"{name}.*{message}"):
        values(tmp_path / name)


def test_a_csv_row_that_does_not_fit_the_header_is_a_fault(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n1,2\n1,2,3\n")
    rows = list(read_rows(tmp_path / "a.csv"))
    assert rows[1].place.endswith("line 3")
    assert message_of(rows[1]).startswith("3 fields, but the header names 2")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file or folder"):
        values(tmp_path / "nowhere.jsonl")


def test_a_folder_is_its_data_files_in_order_of_name(tmp_path):
    for name in ("b.jsonl", "a.jsonl", "sub/c.jsonl", ".cache/d.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write_jsonl(tmp_path / name, [{"name": name}])
    (tmp_path / "README.md").write_text("words")
    assert [row["name"] for row in values(tmp_path)] == ["a.jsonl", "b.jsonl", "sub/c.jsonl"]


def test_a_folder_that_mixes_splits_or_has_no_data_is_refused(tmp_path):
    with pytest.raises(DataError, match="it holds nothing"):
        values(tmp_path)
    (tmp_path / "words.txt").write_text("x")
    with pytest.raises(DataError, match=r"it holds words\.txt"):
        values(tmp_path)
    for name in ("define-train.jsonl", "define-test.jsonl"):
        write_jsonl(tmp_path / name, [{"a": 1}])
    with pytest.raises(
        DataError, match=r"mixes training and evaluation files \(define-test\.jsonl, define-train\.jsonl\)"
    ):
        values(tmp_path)


def test_weights_repeat_and_subsample_by_content(tmp_path):
    rows = [{"text": str(number)} for number in range(400)]
    write_jsonl(tmp_path / "a.jsonl", rows)
    write_jsonl(tmp_path / "b.jsonl", rows[::-1])

    def weighed(name, weight):
        return [row["text"] for row in values([{"path": tmp_path / name, "weight": weight}])]

    half = weighed("a.jsonl", 0.5)
    assert weighed("b.jsonl", 0.5) == half[::-1]
    assert 150 < len(half) < 250
    assert weighed("a.jsonl", 2) == [row["text"] for row in rows for _ in range(2)]
    assert sorted(weighed("a.jsonl", 1.5)) == sorted([row["text"] for row in rows] + half)
    assert values([{"path": tmp_path / "a.jsonl"}, tmp_path / "b.jsonl"]) == rows + rows[::-1]


@pytest.mark.parametrize("weight", [0, -1, "2", True, float("inf")])
def test_a_weight_that_is_no_positive_number_is_refused(weight):
    with pytest.raises(DataError, match=r"a\.jsonl: weight must be a number above 0"):
        values([{"path": "a.jsonl", "weight": weight}])


def test_rows_from_python_pass_through():
    assert [row.place for row in read_rows([{"text": "a"}, {"text": "b"}])] == ["row 1", "row 2"]
    row = Row({"text": "c"}, "here")
    assert list(read_rows([row])) == [row]
    with pytest.raises(DataError, match="got 3"):
        values(3)


def test_columns_name_the_roles(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", [{"q": "1", "a": "2", "text": "3", "id": 4}])
    assert values(tmp_path / "a.jsonl", columns={"prompt": "q", "completion": "a"}) == [
        {"prompt": "1", "completion": "2", "id": 4}
    ]
    assert values([{"prompt": "a", "completion": "b"}], columns={"prompt": "completion", "completion": "prompt"}) == [
        {"prompt": "b", "completion": "a"}
    ]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"question": "prompt"}, "'question' is no role; the form is role: column"),
        ({"prompt": "q", "output": "a"}, "belong to different row shapes"),
        ({"messages": "q", "tools": "functions"}, r"data\.columns\.tools: no row has a column 'functions'"),
    ],
)
def test_columns_that_cannot_be_meant_are_refused(columns, message):
    with pytest.raises(DataError, match=message):
        list(read_rows([{"q": [{"role": "user", "content": "x"}], "a": "2"}], columns=columns))


def test_a_mapped_column_that_is_missing_is_a_fault_with_the_columns_there():
    rows = list(
        read_rows([{"q": "1", "a": "2"}, {"question": "1", "a": "2"}], columns={"prompt": "q", "completion": "a"})
    )
    assert rows[0].fault is None
    assert message_of(rows[1]).startswith("'q' is missing; the row has 'question', 'a'")


def test_nothing_is_written_where_the_files_or_the_user_are(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "cwd").mkdir()
    for name, write in WRITERS.items():
        write(tmp_path / "data" / name, [{"a": "1", "b": "2"}])
    monkeypatch.chdir(tmp_path / "cwd")
    assert len(values(tmp_path / "data")) == len(WRITERS)
    assert len(list((tmp_path / "data").iterdir())) == len(WRITERS)
    assert not list((tmp_path / "cwd").iterdir())


@pytest.mark.parametrize("name", ["hub:", "hub:org/name", "hub:name:train", "hub:org/:train", "hub:a/b/c/d:train"])
def test_a_hub_name_of_the_wrong_form_is_refused(name):
    with pytest.raises(DataError, match="must be hub:org/name:split"):
        values(name)


def test_a_hub_that_cannot_be_reached_is_named_within_seconds(monkeypatch):
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(
        DataError, match=r"hub:org/name:train: http://127\.0\.0\.1:9 cannot be reached .*HF_HUB_OFFLINE=1"
    ):
        values("hub:org/name:train")
    assert time.monotonic() - started < 10


def test_offline_a_data_set_without_a_copy_is_named_with_where_it_was_looked_for(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    started = time.monotonic()
    with pytest.raises(DataError, match=r"looked for 'onebase-tests/nothing', split 'train', on the hub and in"):
        values("hub:onebase-tests/nothing:train")
    assert time.monotonic() - started < 10


def test_hub_rows_have_places_and_no_foreign_keys(monkeypatch):
    asked = []

    def load_dataset(*names, split):
        asked.append((*names, split))
        return datasets.Dataset.from_list([{"m": {"a": "1", "b": None}}, {"m": {"a": None, "b": "2"}}])

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = list(read_rows("hub:org/name/config:train[:2]"))
    assert asked == [("org/name", "config", "train[:2]")]
    assert [(row.values, row.place) for row in rows] == [
        ({"m": {"a": "1"}}, "hub:org/name/config:train[:2] row 1"),
        ({"m": {"b": "2"}}, "hub:org/name/config:train[:2] row 2"),
    ]
