"""Laws of prompts: the tokens that stand before an answer in training, whether the row holds its answer or not."""

import json

import numpy as np
import pytest

from onebase.data.building import build_examples
from onebase.data.rows import Fault, Row
from onebase.errors import DataError
from onebase.measure.prompts import Asking
from tests.data import tiny

QUESTION, ANSWER = "What is a dog?", "An animal."
TURNS = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]
SHAPES = {
    "messages": ({"messages": TURNS}, {"messages": TURNS[:1]}),
    "messages as CSV": ({"messages": json.dumps(TURNS)}, {"messages": json.dumps(TURNS[:1])}),
    "prompt": ({"prompt": QUESTION, "completion": ANSWER}, {"prompt": QUESTION}),
    "empty completion": ({"prompt": QUESTION, "completion": ANSWER}, {"prompt": QUESTION, "completion": ""}),
    "alpaca": ({"instruction": QUESTION, "output": ANSWER}, {"instruction": QUESTION, "output": None}),
    "sharegpt": (
        {"conversations": [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]},
        {"conversations": [{"from": "human", "value": QUESTION}]},
    ),
}


def _rows(*values):
    return [Row(value, f"rows.jsonl line {number}") for number, value in enumerate(values, start=1)]


@pytest.mark.parametrize(
    "template", [tiny.CHATML, tiny.LLAMA2, tiny.GEMMA, tiny.QWEN3], ids=["chatml", "llama2", "gemma", "qwen3"]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_prompt_is_what_stands_before_the_labels_in_training(shape, template):
    tokenizer = tiny.byte_tokenizer(template)
    answered, unanswered = SHAPES[shape]
    examples, _ = build_examples(_rows(answered), tokenizer)
    first_label = int(np.flatnonzero(examples[0].labelled)[0])
    expected = examples[0].token_ids[:first_label].tolist()
    assert Asking(tokenizer).of_rows(_rows(answered, unanswered)) == [expected, expected]


def test_a_conversation_is_asked_at_its_last_turn():
    tokenizer = tiny.byte_tokenizer()
    longer = [*TURNS, {"role": "user", "content": "And a cat?"}]
    asking = Asking(tokenizer)
    assert asking.of_row(_rows({"messages": longer})[0]) == asking.of_messages(longer)
    assert asking.of_row(_rows({"messages": [*longer, TURNS[1]]})[0]) == asking.of_messages(longer)


def test_the_system_message_is_that_of_training():
    tokenizer = tiny.byte_tokenizer()
    row = _rows({"messages": TURNS})
    examples, _ = build_examples(row, tokenizer, system="Be brief.")
    first_label = int(np.flatnonzero(examples[0].labelled)[0])
    asking = Asking(tokenizer, system="Be brief.")
    expected = examples[0].token_ids[:first_label].tolist()
    assert asking.of_rows(row) == [expected]
    assert asking.of_messages(TURNS[:1]) == expected


def test_a_text_is_continued_without_its_end():
    tokenizer = tiny.byte_tokenizer(None, bos=True)
    examples, _ = build_examples(_rows({"text": "the cat sat"}), tokenizer, task="text")
    whole = examples[0].token_ids.tolist()
    assert whole[-1] == tokenizer.eos_token_id
    assert Asking(tokenizer, "text").of_rows(_rows({"text": "the cat sat"})) == [whole[:-1]]


def test_every_row_without_a_question_is_named():
    rows = [
        *_rows({"messages": []}, {"prompt": QUESTION}, {"text": "only text"}),
        Row({}, "rows.jsonl line 4", Fault("not valid JSON", "not valid JSON: oh")),
    ]
    with pytest.raises(DataError) as raised:
        Asking(tiny.byte_tokenizer()).of_rows(rows)
    message = str(raised.value)
    assert message.startswith("3 problems in 4 rows")
    assert "line 1:" in message and "line 2:" not in message and "line 3:" in message and "line 4: not valid" in message


def test_an_answers_text_has_no_special_tokens():
    tokenizer = tiny.byte_tokenizer()
    ids = tokenizer("\nthe cat sat <|im_end|>\n</s>", add_special_tokens=False)["input_ids"]
    assert Asking(tokenizer).text_of(ids) == "the cat sat"
    assert Asking(tokenizer, "text").text_of(ids) == "\nthe cat sat \n"
