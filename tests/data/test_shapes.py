"""Laws of shapes: the same conversation in any usual shape is the same conversation; what is wrong is named."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.data.rows import BadRow
from onebase.data.shapes import conversation_of, text_of

words = st.text(min_size=1, max_size=8).filter(str.strip)


def messages_of(values, system=None):
    return conversation_of(values, system)[0].messages


def fault_of(values, read=conversation_of):
    with pytest.raises(BadRow) as caught:
        read(values)
    return caught.value.fault


@given(words, words)
def test_one_conversation_is_the_same_in_every_shape(question, answer):
    expected = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    shapes = [
        {"messages": expected},
        {"messages": json.dumps(expected)},
        {"messages": [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in expected]},
        {"messages": [m | {"tool_calls": None, "name": None} for m in expected]},
        {"prompt": question, "completion": answer},
        {"prompt": expected[:1], "completion": expected[1:]},
        {"prompt": expected[:1], "completion": answer},
        {"instruction": question, "output": answer},
        {"instruction": question, "input": "", "output": answer},
        {"conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]},
        {"conversations": expected},
        {"messages": expected, "text": "the same, rendered", "prompt_id": 3},
    ]
    assert all(messages_of(shape) == expected for shape in shapes)


def test_alpacas_input_follows_its_instruction():
    assert messages_of({"instruction": "Add.", "input": "1 + 1", "output": "2"})[0]["content"] == "Add.\n\n1 + 1"


def test_columns_that_no_shape_takes_are_the_rest():
    conversation, _ = conversation_of({"prompt": "a", "completion": "b", "slice": "rare", "tools": "[]"})
    assert conversation.rest == {"slice": "rare"}
    assert conversation.tools is None
    assert text_of({"text": "a", "slice": "rare"}) == ("a", {"slice": "rare"})


def test_tools_may_be_json_text():
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = {"prompt": "a", "completion": "b"}
    assert conversation_of(row | {"tools": json.dumps(tools)})[0].tools == tools
    assert conversation_of(row | {"tools": tools})[0].tools == tools


def test_a_system_setting_is_for_rows_without_one_of_their_own():
    asked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    own = {"role": "system", "content": "own"}
    given_first = {"role": "system", "content": "given"}
    for values, first in (
        ({"messages": asked}, given_first),
        ({"messages": [own, *asked]}, own),
        ({"prompt": "a", "completion": "b"}, given_first),
        ({"prompt": "a", "completion": "b", "system": "own"}, own),
        ({"prompt": "a", "completion": "b", "system": ""}, given_first),
    ):
        conversation, keeps_own = conversation_of(values, "given")
        assert conversation.messages == [first, *asked]
        assert keeps_own == (first is own)
        without = conversation_of(values)[0].messages
        assert without == ([own, *asked] if first is own else asked)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"question": "a", "answer": "b"},
            "'messages' is missing; the row has 'question', 'answer'. "
            "Map them: data.columns: {prompt: question, completion: answer}",
        ),
        ({"x": "a"}, "Map them: data.columns: {prompt: COLUMN, completion: COLUMN}"),
        ({}, "the row has no columns"),
        ({"text": "a"}, "Plain 'text' is for task: text."),
        ({"prompt": "a", "completion": "b", "messages": []}, "several shapes at once: 'messages', 'prompt'"),
        ({"prompt": "a", "completion": ""}, "message 2 (assistant) is empty"),
        ({"prompt": "a", "completion": " \n"}, "message 2 (assistant) is empty"),
        ({"prompt": "a", "completion": 3}, "'completion' must be text or a list of messages, got int"),
        ({"instruction": 1, "output": "b"}, "'instruction' must be a string, got int"),
        ({"messages": []}, "'messages' is an empty list"),
        ({"messages": "hello"}, "'messages' is a string, and not the JSON text of a list"),
        ({"messages": ["hello"]}, "messages[0] must be an object, got str"),
        ({"messages": [{"content": "a"}]}, "messages[0] needs 'role' and 'content'; it has 'content'"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0] (user) has no 'content'"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content must be a string or text parts, got int"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "parts that are not text"),
        ({"messages": [{"role": "user", "content": "a"}]}, "no assistant turn to learn from; the roles are 'user'"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "starts with an assistant turn"),
        ({"conversations": [{"from": "alien", "value": "a"}]}, "conversations[0].from: 'alien' is none of 'human'"),
        ({"prompt": "a", "completion": None}, "'completion' is null. Fill it in"),
        ({"messages": None}, "'messages' is null. Fill it in"),
        ({"messages": [{"role": None, "content": "a"}]}, "messages[0].role is null. Write who speaks"),
        ({"messages": [{"role": 3, "content": "a"}]}, "messages[0].role must be a string, got int"),
        ({"prompt": "a", "completion": "b", "tools": ["f"]}, "'tools' must be a list of objects"),
    ],
)
def test_a_row_that_cannot_be_learned_says_what_it_has_and_what_to_do(values, message):
    assert message in fault_of(values).told


def test_prompt_and_completion_are_not_taken_for_plain_text():
    fault = fault_of({"prompt": "a", "completion": "b"}, text_of)
    assert "Rows with 'prompt', 'completion' are for task: chat" in fault.told
    assert "data.columns: {text: body}" in fault_of({"body": "a"}, text_of).told
    assert "'text' is empty" in fault_of({"text": " "}, text_of).told
    assert "must be a string, got int" in fault_of({"text": 1}, text_of).told


def test_a_text_that_is_null_says_so():
    assert fault_of({"text": None}, text_of).told.startswith("'text' is null. Fill it in")
