"""Laws of `onebase predict`: an answer for every row, in their order, whole or not at all."""

import json
import os

import pytest

from onebase.cli import predict
from tests.cli.world import chats, invoke, write_rows


def _lines(text):
    return [json.loads(line) for line in text.splitlines()]


def _predict(*words):
    result = invoke("predict", *words, "--max-new-tokens", 6)
    assert result.exit_code == 0, result.stderr
    return _lines(result.stdout)


def test_every_row_comes_back_with_its_columns_and_an_answer(trained):
    rows = chats(6, start=24)
    found = _predict(trained / "run", "--data", trained / "valid.jsonl")
    assert [{key: value for key, value in line.items() if key != "prediction"} for line in found] == rows
    assert all(isinstance(line["prediction"], str) for line in found)
    assert any(line["prediction"] for line in found)


def test_a_file_gets_the_same_lines_at_once(trained, tmp_path):
    to_stdout = invoke("predict", trained / "run", "--data", trained / "valid.jsonl", "--max-new-tokens", 6)
    out = tmp_path / "new" / "answers.jsonl"
    to_file = invoke("predict", trained / "run", "--data", trained / "valid.jsonl", "--max-new-tokens", 6, "--out", out)
    assert to_file.exit_code == 0
    assert to_file.stdout == ""
    assert "6 answers" in to_file.stderr and str(out) in to_file.stderr
    assert out.read_text() == to_stdout.stdout
    assert [path.name for path in out.parent.iterdir()] == ["answers.jsonl"]


def test_answers_need_not_be_there(trained, tmp_path):
    rows = chats(6, start=24)
    asked = [{"messages": row["messages"][:1]} for row in rows]
    data = write_rows(tmp_path / "asked.jsonl", asked)
    with_answers = _predict(trained / "run", "--data", trained / "valid.jsonl")
    without = _predict(trained / "run", "--data", data)
    assert [line["prediction"] for line in without] == [line["prediction"] for line in with_answers]


def test_a_column_that_holds_answers_may_be_missing_too(world):
    rows = [{"q": f"What is {i}?", "a": f"number {i}"} for i in range(12)]
    write_rows(world / "train.jsonl", rows)
    write_rows(world / "valid.jsonl", rows[:5])
    invoke("train", "run.yaml", "--out", "run", "--set=data.columns={prompt: q, completion: a}")
    write_rows(world / "asked.jsonl", [{"q": "What is 3?"}])
    (found,) = _predict("run", "--data", "asked.jsonl")
    assert set(found) == {"q", "prediction"} and found["q"] == "What is 3?"
    assert len(_predict("run", "--data", "valid.jsonl")) == 5


def test_what_is_drawn_depends_on_the_seed_alone(trained):
    words = [trained / "run", "--data", trained / "valid.jsonl", "--temperature", 1.5]
    assert _predict(*words, "--seed", 1) == _predict(*words, "--seed", 1)
    assert _predict(*words, "--seed", 1) != _predict(*words, "--seed", 2)


def test_the_adapter_answers_otherwise_than_its_base(trained):
    data = ["--data", trained / "valid.jsonl"]
    assert _predict(trained / "run", *data) != _predict(trained / "model", *data)


def test_answers_that_were_cut_off_are_counted(trained):
    result = invoke("predict", trained / "model", "--data", trained / "valid.jsonl", "--max-new-tokens", 1)
    answers = _lines(result.stdout)
    assert len(answers) == 6
    cut = sum(bool(line["prediction"]) for line in answers)  # an end token has no text
    assert f"{cut} answers cut off at 1 tokens" in result.stderr


def test_a_row_without_a_question_stops_everything_before_the_first_answer(trained, tmp_path):
    rows = [*chats(2), {"text": "no question"}]
    out = tmp_path / "answers.jsonl"
    data = write_rows(tmp_path / "asked.jsonl", rows)
    result = invoke("predict", trained / "run", "--data", data, "--out", out)
    assert result.exit_code == 2
    assert "line 3" in result.stderr
    assert list(tmp_path.glob("answers*")) == []


@pytest.mark.parametrize("kind", ["file in the way", "folder"])
def test_a_place_that_cannot_be_written_is_told_before_the_model_is_opened(tmp_path, kind):
    (tmp_path / "file").write_text("x")
    out = tmp_path / "file" / "answers.jsonl" if kind == "file in the way" else tmp_path
    result = invoke("predict", tmp_path / "no-such-run", "--data", tmp_path / "no.jsonl", "--out", out)
    assert result.exit_code == 2
    assert "the answers" in result.stderr and "no-such-run" not in result.stderr


@pytest.mark.parametrize("name", ["rows.jsonl", "link.jsonl", "hard.jsonl", "before.jsonl", "fifo", "device"])
@pytest.mark.parametrize("data", ["rows.jsonl", "."])
def test_nothing_that_is_there_is_replaced_and_that_is_told_before_the_model_is_opened(tmp_path, name, data):
    rows = write_rows(tmp_path / "rows.jsonl", chats(2))
    (tmp_path / "link.jsonl").symlink_to(rows)
    (tmp_path / "hard.jsonl").hardlink_to(rows)
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "device").symlink_to("/dev/null")
    before = write_rows(tmp_path / "before.jsonl", chats(1))
    held = {path: path.read_bytes() for path in (rows, before)}
    result = invoke("predict", tmp_path / "no-such-run", "--data", tmp_path / data, "--out", tmp_path / name)
    assert result.exit_code == 2
    assert "--out: " in result.stderr and name in result.stderr and "no-such-run" not in result.stderr
    if name in ("fifo", "device"):
        assert "no regular file" in result.stderr
    elif name == "before.jsonl" and data == "rows.jsonl":
        assert "is there already; choose another --out or delete it" in result.stderr
    else:
        assert "take the place of the rows" in result.stderr
    assert {path: path.read_bytes() for path in held} == held


def test_rows_are_never_taken_for_the_rest_of_an_interrupted_prediction(tmp_path):
    rows = write_rows(tmp_path / "a.jsonl.partial", chats(2))
    result = invoke("predict", tmp_path / "no-such-run", "--data", rows, "--out", tmp_path / "a.jsonl")
    assert result.exit_code == 2
    assert "take the place of the rows" in result.stderr and "delete" not in result.stderr


def _interrupted(monkeypatch, error, after):
    """Let the answers be interrupted when so many are there."""
    real = predict.Answers._take

    def take(self, number, token):
        ended = real(self, number, token)
        if len(self._lines) == after:
            raise error
        return ended

    monkeypatch.setattr(predict.Answers, "_take", take)


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt(), 130), (SystemExit(143), 143), (MemoryError(), 1)])
def test_an_interruption_keeps_the_answers_that_are_finished(trained, tmp_path, monkeypatch, error, code):
    words = [trained / "run", "--data", trained / "valid.jsonl"]
    whole = _predict(*words)
    _interrupted(monkeypatch, error, after=2)
    out = tmp_path / "answers.jsonl"
    result = invoke("predict", *words, "--max-new-tokens", 6, "--out", out)
    assert result.exit_code == code
    assert f"2 of 6 answers came; they are kept in {out}.partial" in result.stderr
    kept = _lines((tmp_path / "answers.jsonl.partial").read_text())
    assert len(kept) == 2 and all(line in whole for line in kept)
    assert not out.exists()
    again = invoke("predict", *words, "--max-new-tokens", 6, "--out", out)
    assert again.exit_code == 2 and "answers.jsonl.partial" in again.stderr
    assert _lines((tmp_path / "answers.jsonl.partial").read_text()) == kept


def test_an_interruption_before_the_first_answer_leaves_nothing(trained, tmp_path, monkeypatch):
    _interrupted(monkeypatch, KeyboardInterrupt(), after=0)
    words = ["--data", trained / "valid.jsonl", "--out", tmp_path / "answers.jsonl"]
    assert invoke("predict", trained / "run", *words).exit_code == 130
    assert list(tmp_path.glob("answers*")) == []


def test_an_interruption_prints_what_is_finished_where_there_is_no_file(trained, monkeypatch):
    words = [trained / "run", "--data", trained / "valid.jsonl"]
    whole = _predict(*words)
    _interrupted(monkeypatch, KeyboardInterrupt(), after=3)
    result = invoke("predict", *words, "--max-new-tokens", 6)
    assert result.exit_code == 130
    found = _lines(result.stdout)
    assert len(found) == 3 and [line for line in whole if line in found] == found
    assert "3 of 6 answers came" in result.stderr


def test_questions_that_are_too_long_are_all_named_by_their_lines(trained, tmp_path):
    rows = chats(5)
    for number in (1, 3):
        rows[number]["messages"] = [{"role": "user", "content": "dog " * 300}]
    data = write_rows(tmp_path / "asked.jsonl", [*rows, {"text": "no question"}])
    result = invoke("predict", trained / "run", "--data", data)
    assert result.exit_code == 2
    assert "asked.jsonl line 2: the prompt has" in result.stderr and "at most 256" in result.stderr
    assert "asked.jsonl line 4: the prompt has" in result.stderr
    assert "asked.jsonl line 6: " in result.stderr
    assert "line 1:" not in result.stderr


def test_answers_that_the_models_limit_cut_off_are_counted_as_such(trained, tmp_path, monkeypatch):
    monkeypatch.setattr("onebase.measure.generate.end_ids", lambda base: frozenset())
    rows = [{"messages": [{"role": "user", "content": "x" * length}]} for length in (1, 180, 190)]
    data = write_rows(tmp_path / "asked.jsonl", rows)
    result = invoke("predict", trained / "model", "--data", data, "--max-new-tokens", 100)
    assert result.exit_code == 0
    assert "1 answer cut off at 100 tokens" in result.stderr
    assert "2 answers cut off at the model's limit, 256 tokens" in result.stderr


def test_a_column_of_the_rows_is_never_replaced_by_answers(trained, tmp_path):
    data = write_rows(tmp_path / "asked.jsonl", [{**row, "prediction": "mine"} for row in chats(3)])
    refused = invoke("predict", trained / "run", "--data", data)
    assert refused.exit_code == 2
    assert "line 1" in refused.stderr and "2 more rows" in refused.stderr and "--column" in refused.stderr
    found = _predict(trained / "run", "--data", data, "--column", "second")
    assert [line["prediction"] for line in found] == ["mine"] * 3
    assert all(isinstance(line["second"], str) for line in found)
