"""Laws of `onebase preview`: the very tokens and labels of the training, and no weights needed for it."""

import io
import json
import re

import numpy as np
import pytest
from rich.console import Console

from onebase.cli.preview import example_text, show_examples
from onebase.data.building import build_examples
from onebase.data.examples import Example, Examples
from onebase.data.rows import Row
from tests.cli.world import chats, invoke, settings_in, write_rows
from tests.data.tiny import byte_tokenizer


def _examples(*texts):
    tokenizer = byte_tokenizer()
    rows = [Row({"prompt": "What is it?", "completion": text}, f"x line {n}") for n, text in enumerate(texts, start=1)]
    return build_examples(rows, tokenizer)[0], tokenizer


def test_marks_part_tokens_and_hold_the_labelled_ones():
    examples, tokenizer = _examples("A dog.")
    (example,) = examples
    plain = Console(file=io.StringIO())
    text = example_text(example, tokenizer, plain).plain
    labelled = re.findall(r"\[\[(.*?)\]\]", text, re.S)
    assert labelled == ["|".join(tokenizer.decode([t]) for t in example.token_ids[example.labelled])]
    bare = re.sub(r"\[\[|\]\]", "|", text)
    assert bare.replace("|", "") == tokenizer.decode(example.token_ids).replace("|", "")


def test_colours_say_on_a_terminal_what_marks_say_elsewhere():
    examples, tokenizer = _examples("A dog.")
    (example,) = examples
    terminal = Console(file=io.StringIO(), force_terminal=True)
    text = example_text(example, tokenizer, terminal)
    assert text.plain == tokenizer.decode(example.token_ids)
    coloured = "".join(text.plain[s.start : s.end] for s in text.spans if "bold" in str(s.style))
    assert coloured == tokenizer.decode(example.token_ids[example.labelled])


def test_of_a_long_row_the_first_tokens_are_shown_and_the_rest_counted():
    tokenizer = byte_tokenizer()
    ids = np.array(tokenizer("dog " * 900, add_special_tokens=False)["input_ids"], np.int32)
    labelled = np.ones(len(ids), np.bool_)
    console = Console(file=io.StringIO(), width=1000)
    show_examples(console, Examples([Example(ids, labelled, "x", {})]), tokenizer, 1)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert f"... {len(ids) - 600:,} more tokens" in shown


def test_rows_and_counts_are_shown(world):
    result = invoke("preview", "run.yaml", "--rows", 2)
    assert result.exit_code == 0, result.stderr
    assert re.findall(r"^train.jsonl line (\d+): \d+ tokens, \d+ labelled$", result.stdout, re.M) == ["1", "2"]
    assert re.search(r"^rows +24 +6$", result.stdout, re.M)
    assert result.stderr == ""
    assert "line 1:" not in invoke("preview", "run.yaml", "--rows", 0).stdout


def test_settings_can_be_tried_without_editing_the_file(world):
    result = invoke("preview", "run.yaml", "--set", "data.max_length=52", "--set", "data.valid=0.2")
    assert re.search(r"^warning: train: \d+ rows truncated", result.stdout, re.M)


def test_the_counts_are_those_that_training_shows(world):
    write_rows(world / "train.jsonl", [*chats(20), {"messages": []}])
    settings_in(world, data=", on_bad_row: skip")
    table = ("rows ", "examples ", "tokens  ", "labelled tokens", "dropped rows", "warning: ")

    def counts(text):
        return [line for line in text.splitlines() if line.startswith(table)]

    previewed, trained = invoke("preview", "run.yaml"), invoke("train", "run.yaml", "--out", "run")
    assert counts(previewed.stdout) == counts(trained.stdout)
    assert len(counts(previewed.stdout)) == 6


def test_the_weights_are_not_read(world):
    (world / "model/model.safetensors").rename(world / "weights")
    from safetensors.torch import save_file
    from torch import zeros

    save_file({"nothing": zeros(1)}, world / "model/model.safetensors", metadata={"format": "pt"})
    assert invoke("preview", "run.yaml").exit_code == 0


@pytest.mark.parametrize("row", ['{"messages": [', '{"prompt": "x", "completion": ""}'])
def test_a_bad_row_is_named_with_its_line(world, row):
    with (world / "train.jsonl").open("a") as file:
        file.write(row + "\n")
    result = invoke("preview", "run.yaml")
    assert result.exit_code == 2
    assert "train.jsonl line 25" in result.stderr


def test_json_holds_the_counts_of_both_parts_and_every_token_with_its_label(world):
    given = [*chats(3), {"messages": []}]
    given[0]["messages"][1]["content"] = "A dog \U0001f436."  # one character in several tokens
    write_rows(world / "train.jsonl", given)
    settings_in(world, data=", on_bad_row: skip")
    result = invoke("preview", "run.yaml", "--rows", 2, "--json")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)
    tokenizer = byte_tokenizer()
    rows = [Row(row, f"train.jsonl line {number}") for number, row in enumerate(given[:3], start=1)]
    examples, report = build_examples(rows, tokenizer)
    assert found["counts"]["train"]["tokens"] == report.tokens
    assert found["counts"]["train"]["labelled_tokens"] == report.labelled_tokens
    assert (found["counts"]["train"]["rows"], found["counts"]["train"]["dropped_rows"]) == (4, 1)
    assert [place for places in found["counts"]["train"]["dropped"].values() for place in places] == [
        "train.jsonl line 4"
    ]
    assert found["counts"]["valid"]["rows"] == 6
    assert any("dropped" in warning for warning in found["warnings"])
    assert len(found["rows"]) == 2
    for shown, example in zip(found["rows"], examples, strict=False):
        assert shown["place"] == example.place
        assert shown["token_ids"] == example.token_ids.tolist()
        assert shown["labelled"] == example.labelled.tolist()
        assert "".join(shown["pieces"]) == tokenizer.decode(example.token_ids)
        assert len(shown["pieces"]) == len(example.token_ids)
