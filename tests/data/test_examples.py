"""Laws of examples: what is stored is what was made, what is dropped is counted, what is wrong is said at once."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.config.labels import Labels
from onebase.config.settings import SHORTEST_MAX_LENGTH
from onebase.data.building import build_examples
from onebase.data.examples import Example, Examples
from onebase.data.reading import read_rows
from onebase.data.rows import Fault, Row
from onebase.errors import ConfigError, DataError
from tests.data import tiny

BYTES = tiny.byte_tokenizer()


@st.composite
def example_lists(draw):
    lengths = draw(st.lists(st.integers(1, 6), max_size=6))
    ids = st.integers(0, 2**31 - 1)
    return [
        Example(
            np.asarray(draw(st.lists(ids, min_size=n, max_size=n)), np.int32),
            np.asarray([False, *draw(st.lists(st.booleans(), min_size=n - 1, max_size=n - 1))]),
            f"row {number}",
            {"number": number},
        )
        for number, n in enumerate(lengths)
    ]


def same(one, other):
    return (
        one.token_ids.tolist() == other.token_ids.tolist()
        and one.labelled.tolist() == other.labelled.tolist()
        and (one.place, one.values) == (other.place, other.values)
    )


@given(example_lists())
def test_examples_give_back_what_was_put_in(made):
    examples = Examples(made)
    assert len(examples) == len(made)
    assert all(same(one, other) for one, other in zip(examples, made, strict=True))
    assert all(same(examples[-1 - i], made[-1 - i]) for i in range(len(made)))
    assert all(same(one, other) for one, other in zip(examples[1::2], made[1::2], strict=True))
    assert examples.token_count == sum(len(example.token_ids) for example in made)
    assert examples.label_count == sum(int(example.labelled.sum()) for example in made)
    assert examples.lengths.tolist() == [len(example.token_ids) for example in made]
    with pytest.raises(IndexError):
        examples[len(made)]


@given(example_lists(), st.data())
def test_a_fingerprint_changes_with_any_token_label_or_border_and_with_nothing_else(made, data):
    examples = Examples(made)
    renamed = [Example(e.token_ids, e.labelled, "elsewhere", {}) for e in made]
    assert Examples(renamed).fingerprint == examples.fingerprint
    if not made:
        return
    number = data.draw(st.integers(0, len(made) - 1))
    chosen = made[number]
    place = data.draw(st.integers(0, len(chosen.token_ids) - 1))
    ids, labelled = chosen.token_ids.copy(), chosen.labelled.copy()
    ids[place] ^= 1
    labelled[place] ^= True
    for changed in (
        [Example(ids, chosen.labelled, "", {})],
        [Example(chosen.token_ids, labelled, "", {})],
        [
            Example(chosen.token_ids[:place], chosen.labelled[:place], "", {}),
            Example(chosen.token_ids[place:], chosen.labelled[place:], "", {}),
        ],
    ):
        assert Examples([*made[:number], *changed, *made[number + 1 :]]).fingerprint != examples.fingerprint


def chat_row(answer, number=1, question="the dog"):
    return Row({"prompt": question, "completion": answer, "slice": answer}, f"rows.jsonl line {number}")


@given(
    st.lists(st.sampled_from(["a", "a thing", "", "the house " * 9]), min_size=1, max_size=12),
    st.sampled_from([40, 60, None]),
)
def test_every_row_is_an_example_or_counted_with_its_place(answers, max_length):
    rows = [chat_row(answer, number) for number, answer in enumerate(answers, start=1)]
    kept = [row for row in rows if row.values["completion"]]
    if not kept:
        with pytest.raises(DataError, match="no row is left"):
            build_examples(rows, BYTES, max_length=max_length, on_bad_row="skip")
        return
    examples, report = build_examples(rows, BYTES, max_length=max_length, on_bad_row="skip")
    assert [example.place for example in examples] == [row.place for row in kept]
    assert [example.values for example in examples] == [{"slice": row.values["slice"]} for row in kept]
    dropped = [row.place for row in rows if not row.values["completion"]]
    assert report.dropped == ({"an empty assistant turn": dropped} if dropped else {})
    assert report.rows == len(rows) == report.examples + report.dropped_rows
    assert (report.tokens, report.labelled_tokens) == (examples.token_count, examples.label_count)
    full, _ = build_examples(kept, BYTES)
    assert report.truncated == sum(
        len(one.token_ids) < len(other.token_ids) for one, other in zip(examples, full, strict=True)
    )
    for one, other in zip(examples, full, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()[:max_length]
        assert one.labelled.tolist() == other.labelled.tolist()[:max_length]


def test_a_row_whose_labels_are_all_cut_off_is_a_bad_row_with_its_numbers():
    with pytest.raises(DataError, match=r"rows\.jsonl line 7: all labels are cut off: .* max_length is 8"):
        build_examples([chat_row("a", 7)], BYTES, max_length=8)


def test_turns_beyond_max_length_are_left_out_of_a_row_that_is_split():
    messages = [{"role": role, "content": "the dog " * 20} for role in ("user", "assistant") * 3]
    row = Row({"messages": messages}, "row 1")
    whole, _ = build_examples([row], BYTES, template=tiny.QWEN3)
    limit = len(whole[0].token_ids)
    cut, report = build_examples([row], BYTES, template=tiny.QWEN3, max_length=limit)
    assert (len(whole), len(cut), report.truncated, report.split) == (3, 1, 1, 1)
    assert same(cut[0], whole[0])


@pytest.mark.parametrize("on_bad_row", ["error", "skip"])
def test_what_can_be_done_about_bad_rows_is_said_once(on_bad_row):
    labels = Labels("single_label_classification", ("cat", "dog"))
    rows = [Row({"text": "a", "label": "dgo"}, f"line {n}") for n in range(12)] + [Row({"text": "a"}, "line 12")]
    with pytest.raises(DataError) as caught:
        build_examples(reversed(rows), BYTES, task=labels, on_bad_row=on_bad_row)
    message = str(caught.value)
    assert message.count("is none of the 2 classes") == 9 and message.count("closest is 'dog'") == 9
    assert message.count("Correct it, or leave the row out") == message.count("data.on_bad_row: skip") == 1
    assert message.count("Name its column: data.columns: {label: COLUMN}") == 1
    with pytest.raises(DataError, match=r"^(no row is left\n)?line 3: label 'dgo' .*'dog'\. Correct it, or leave"):
        build_examples([rows[3]], BYTES, task=labels, on_bad_row=on_bad_row)


def test_bad_rows_are_reported_together_the_first_ten_with_places_and_all_counted(tmp_path):
    lines = ['{"prompt": "a", "completion": "b"}'] * 3 + ['{"prompt": "a", "completion": ""}', "{"] * 8
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    with pytest.raises(DataError) as caught:
        build_examples(read_rows(tmp_path / "rows.jsonl"), BYTES)
    message = str(caught.value)
    assert message.startswith("16 problems in 19 rows\n")
    assert "rows.jsonl line 4: message 2 (assistant) is empty" in message
    assert "rows.jsonl line 5: not valid JSON" in message
    assert "line 13" in message
    assert "line 14" not in message
    assert "and 6 more" in message
    assert "data.on_bad_row: skip" in message
    examples, report = build_examples(read_rows(tmp_path / "rows.jsonl"), BYTES, on_bad_row="skip")
    assert len(examples) == 3
    assert {reason: len(places) for reason, places in report.dropped.items()} == {
        "an empty assistant turn": 8,
        "not valid JSON": 8,
    }


def test_one_bad_row_is_one_line():
    with pytest.raises(DataError) as caught:
        build_examples([Row({}, "rows.jsonl line 2", Fault("broken", "broken here."))], BYTES)
    assert str(caught.value) == "rows.jsonl line 2: broken here."


def test_no_rows_at_all_are_refused():
    with pytest.raises(DataError, match="there are no rows"):
        build_examples([], BYTES)


def test_texts_become_windows_and_are_counted():
    rows = [Row({"text": text, "id": text}, f"row {n}") for n, text in enumerate(["the dog " * 20, "the dog"])]
    examples, report = build_examples(rows, BYTES, task="text", max_length=16)
    assert report.windowed == 1
    assert report.truncated == 0
    assert [example.place for example in examples] == ["row 0"] * (len(examples) - 1) + ["row 1"]
    assert report.tokens == sum(len(BYTES(row.values["text"])["input_ids"]) + 1 for row in rows)
    with pytest.raises(DataError, match="are for task: chat"):
        build_examples([chat_row("a")], BYTES, task="text")


def test_a_template_file_overrides_the_models_own(tmp_path):
    (tmp_path / "template.jinja").write_text(tiny.GEMMA, encoding="utf-8")
    from_file, _ = build_examples([chat_row("a")], BYTES, template=tmp_path / "template.jinja")
    from_text, _ = build_examples([chat_row("a")], BYTES, template=tiny.GEMMA)
    assert from_file.fingerprint == from_text.fingerprint
    assert "<start_of_turn>model" in BYTES.decode(from_file[0].token_ids)
    with pytest.raises(DataError, match=r"data\.template: .*nothing\.jinja cannot be read"):
        build_examples([chat_row("a")], BYTES, template=tmp_path / "nothing.jinja")


@pytest.mark.parametrize(
    "wrong",
    [{"task": "classify"}, {"labels": "first"}, {"on_bad_row": "warn"}, {"max_length": SHORTEST_MAX_LENGTH - 1}],
)
def test_a_choice_that_is_none_is_refused(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        build_examples([chat_row("a")], BYTES, **wrong)


def test_a_row_that_keeps_its_own_system_message_is_noted():
    rows = [Row({"prompt": "a", "completion": "b", "system": "own"}, "row 1"), chat_row("a", 2)]
    examples, report = build_examples(rows, BYTES, system="given")
    assert [name in BYTES.decode(e.token_ids) for e in examples for name in ("own", "given")] == [
        True,
        False,
        False,
        True,
    ]
    assert list(report.notes.values()) == [1]
