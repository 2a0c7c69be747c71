"""Laws of rendering and labels, on tokenizers of several kinds and templates of several kinds."""

from pathlib import Path

import numpy as np
import pytest
import trl
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from onebase.data.building import build_examples
from onebase.data.check import label_segments
from onebase.data.examples import Example
from onebase.data.rows import Row
from onebase.errors import DataError
from tests.data import tiny

WORDS = tiny.word_tokenizer()
TOKENIZERS = [
    tiny.byte_tokenizer(),
    tiny.byte_tokenizer(trim_offsets=False),
    WORDS,
    tiny.piece_tokenizer(),
    tiny.piece_tokenizer(legacy=True),
]
ANSWERED = [tiny.CHATML, tiny.CHATML_MARKED, tiny.LLAMA2, tiny.GEMMA, tiny.PHI3, tiny.PLAIN_WORDS]
BYTES = tiny.byte_tokenizer()

contents = st.one_of(
    st.sampled_from(
        ["the dog", " a thing.", "What is it?\n", "é", "你好 🙂", "x\n\ny", "[INST] the", "<|im_end|> the"]
    ),
    st.text(min_size=1, max_size=12).filter(lambda text: text.strip()),
)


@st.composite
def conversations(draw, system=False):
    turns = draw(st.integers(1, 3))
    messages = [{"role": "system", "content": draw(contents)}] if system and draw(st.booleans()) else []
    for _ in range(turns):
        messages += [{"role": "user", "content": draw(contents)}, {"role": "assistant", "content": draw(contents)}]
    return messages


def examples_of(messages, tokenizer, template=None, **settings):
    values = messages if isinstance(messages, dict) else {"messages": messages}
    return build_examples([Row(values, "row 1")], tokenizer, template=template, **settings)


def theirs(tokenizer, messages, template, **more):
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=True, **more)


def labelled_pieces(example, tokenizer=BYTES):
    return [text for text, labelled in label_segments(example, tokenizer) if labelled]


@settings(max_examples=40)
@given(conversations(), st.sampled_from(TOKENIZERS), st.sampled_from(ANSWERED))
def test_token_ids_are_those_of_transformers(messages, tokenizer, template):
    examples, report = examples_of(messages, tokenizer, template)
    assert len(examples) == 1
    assert examples[0].token_ids.tolist() == theirs(tokenizer, messages, template)["input_ids"]
    assert not examples[0].labelled[0]
    assert report.tokens == len(examples[0].token_ids)


@settings(max_examples=40)
@given(conversations(system=True), st.sampled_from([t for t in TOKENIZERS if t is not WORDS]))
def test_labels_are_the_tokens_that_generation_markers_mark(messages, tokenizer):
    # Their mask is found by the turn's first character and the one after its last. A blank there that no token covers
    # makes them lose the edge; where tokens are words these are all blanks.
    assume(all(message["content"] == message["content"].strip() for message in messages))
    examples, _ = examples_of(messages, tokenizer, tiny.CHATML_MARKED)
    mask = theirs(tokenizer, messages, tiny.CHATML_MARKED, return_assistant_tokens_mask=True)["assistant_masks"]
    assert examples[0].labelled.tolist() == [bool(marked) for marked in mask]


@given(contents)
def test_blanks_that_end_a_turn_without_end_token_are_labels_whatever_the_offsets_leave_out(answer):
    messages = [{"role": "user", "content": "What"}, {"role": "assistant", "content": answer}]
    for trim_offsets in (True, False):
        tokenizer = tiny.byte_tokenizer(trim_offsets=trim_offsets)
        examples, _ = examples_of(messages, tokenizer, tiny.PLAIN_BLANKS)
        (learned,) = labelled_pieces(examples[0], tokenizer)
        assert learned.endswith(answer + "  ")


@settings(max_examples=40)
@given(conversations(system=True), st.booleans())
def test_the_labelled_text_is_each_answer_with_its_end_token_and_no_newline(messages, trim_offsets):
    tokenizer = tiny.byte_tokenizer(trim_offsets=trim_offsets)
    examples, _ = examples_of(messages, tokenizer, tiny.CHATML)
    answers = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
    assert labelled_pieces(examples[0], tokenizer) == answers


@given(conversations())
def test_a_template_without_generation_prompt_but_with_blank_opening_is_exact(messages):
    examples, _ = examples_of(messages, BYTES, tiny.LLAMA2)
    answers = [f" {message['content'].strip()} </s>" for message in messages if message["role"] == "assistant"]
    assert labelled_pieces(examples[0]) == answers


@given(conversations())
def test_labels_last_marks_only_the_last_answer(messages):
    examples, _ = examples_of(messages, BYTES, tiny.CHATML, labels="last")
    assert labelled_pieces(examples[0]) == [messages[-1]["content"] + "<|im_end|>"]
    assert examples[0].token_ids.tolist() == theirs(BYTES, messages, tiny.CHATML)["input_ids"]


@given(conversations())
def test_where_earlier_turns_are_rewritten_each_turn_is_an_example_of_its_own(messages):
    examples, report = examples_of(messages, BYTES, tiny.QWEN3)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    assert len(examples) == len(turns)
    assert report.split == (len(turns) > 1)
    for example, turn in zip(examples, turns, strict=True):
        assert example.token_ids.tolist() == theirs(BYTES, messages[: turn + 1], tiny.QWEN3)["input_ids"]
        assert labelled_pieces(example) == [f"<think>\n\n</think>\n\n{messages[turn]['content']}<|im_end|>"]


def test_labels_last_needs_no_split_where_only_earlier_turns_are_rewritten():
    messages = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "1"},
        {"role": "user", "content": "two"},
        {"role": "assistant", "content": "2", "reasoning_content": "so"},
    ]
    examples, report = examples_of(messages, BYTES, tiny.QWEN3, labels="last")
    assert (len(examples), report.split) == (1, 0)
    assert labelled_pieces(examples[0]) == ["<think>\nso\n</think>\n\n2<|im_end|>"]


def test_a_closing_end_of_text_token_does_not_split_a_row():
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    examples, _ = examples_of(messages, BYTES, tiny.PHI3)
    assert len(examples) == 1
    assert labelled_pieces(examples[0]) == ["assistant<|im_end|>", "assistant<|im_end|>\n</s>"]


def test_a_turn_that_would_lose_its_end_token_in_the_whole_becomes_its_own_example():
    messages = [{"role": role, "content": role} for role in ("user", "assistant", "user", "assistant")]
    examples, _ = examples_of(messages, BYTES, tiny.CLOSING_DIFFERS)
    assert [labelled_pieces(example) for example in examples] == [["assistant</s>"], ["assistant</s>"]]


def test_a_token_across_the_edge_of_a_turn_is_a_label():
    messages = [{"role": "user", "content": "What"}, {"role": "assistant", "content": "the dog"}]
    examples, report = examples_of(messages, BYTES, tiny.PLAIN_WORDS)
    assert labelled_pieces(examples[0]) == [" the dog\n"]  # "A: " and "the" share the token " the"
    assert any("no end token" in note for note in report.notes)


@settings(max_examples=25)
@given(conversations())
def test_a_tokenizer_without_offsets_is_exact_too(messages):
    tokenizer = ByT5Tokenizer(additional_special_tokens=["<|im_start|>", "<|im_end|>"], extra_ids=0)
    assert not tokenizer.is_fast
    examples, _ = examples_of(messages, tokenizer, tiny.CHATML)
    assert examples[0].token_ids.tolist() == theirs(tokenizer, messages, tiny.CHATML)["input_ids"]
    text = BYTES.apply_chat_template(messages, chat_template=tiny.CHATML, tokenize=False)
    answers = [message["content"] + "<|im_end|>" for message in messages if message["role"] == "assistant"]
    ids = [tokenizer(answer, add_special_tokens=False)["input_ids"] for answer in answers]
    assert text.count("assistant\n") >= len(answers)
    assert examples[0].token_ids[examples[0].labelled].tolist() == [token for answer in ids for token in answer]


def test_a_prompt_of_messages_is_given_and_never_learned():
    prompt = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "given"},
        {"role": "user", "content": "two"},
    ]
    examples, _ = examples_of({"prompt": prompt, "completion": "learned"}, BYTES)
    assert labelled_pieces(examples[0]) == ["learned<|im_end|>"]


TOOLS = [{"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"word": "dog"}}}
CALLING = [
    {"role": "user", "content": "dog?"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "content": "an animal"},
    {"role": "assistant", "content": "An animal."},
]


def test_tools_and_tool_calls_reach_the_template_and_calls_are_learned():
    examples, report = examples_of({"messages": CALLING, "tools": TOOLS}, BYTES, tiny.CHATML_TOOLS)
    assert examples[0].token_ids.tolist() == theirs(BYTES, CALLING, tiny.CHATML_TOOLS, tools=TOOLS)["input_ids"]
    call, answer = labelled_pieces(examples[0])
    assert '"word": "dog"' in call
    assert answer == "An animal.<|im_end|>"
    assert not report.notes


def test_a_template_that_ignores_tools_is_noted_and_one_that_ignores_calls_refused():
    plain = [CALLING[0], CALLING[3]]
    _, report = examples_of({"messages": plain, "tools": TOOLS}, BYTES, tiny.CHATML)
    assert report.notes == {"the chat template ignores the row's tools": 1}
    silent = tiny.CHATML.replace("message['content']", "(message['content'] or '')")
    with pytest.raises(DataError, match=r"row 1: message 2 \(assistant\): the chat template ignores 'tool_calls'"):
        examples_of(CALLING, BYTES, silent)


@pytest.mark.parametrize(
    ("messages", "template", "words"),
    [
        (["system", "user", "assistant"], tiny.GEMMA, "System role not supported"),
        (["user", "user", "assistant"], tiny.LLAMA2, "must alternate"),
        (["user", "assistant"], "{{ messages[0].nothing.more }}", "nothing"),
    ],
)
def test_what_a_template_raises_is_shown_with_the_place(messages, template, words):
    with pytest.raises(DataError, match=rf"row 1: the chat template refuses the row: .*{words}"):
        examples_of([{"role": role, "content": "x"} for role in messages], BYTES, template)


def test_an_opening_without_generation_prompt_is_refused():
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(DataError, match=r"opens an assistant turn with .*assistant.*no generation prompt"):
        examples_of(messages, BYTES, tiny.CHATML_WITHOUT_PROMPT)


def test_a_template_that_leaves_out_the_answer_is_refused():
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    parts = tiny.CHATML.replace("message['content']", "(message['content'][0].text or '')")
    with pytest.raises(DataError, match=r"leaves out what the assistant says.*list of parts"):
        examples_of(messages, BYTES, parts)


def test_a_generation_prompt_that_training_never_shows_is_refused():
    template = tiny.CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}")
    messages = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    with pytest.raises(DataError, match=r"ends the prompt with '<think>\\n', but writes 'y<|im_end|>"):
        examples_of(messages, BYTES, template)


def test_a_model_without_template_is_told_what_to_do():
    with pytest.raises(DataError, match=r"no chat template.*data\.template.*task: text"):
        examples_of([], tiny.byte_tokenizer(None))


@pytest.mark.parametrize("template", ["no jinja", "{% for x in %}", "{{ 'a' "])
def test_a_template_that_is_no_jinja_is_refused_before_any_row(template):
    with pytest.raises(DataError, match=r"data\.template"):
        examples_of([], BYTES, template)


UNFIT_TEMPLATES = {
    f"{name}_training"
    for name in (
        *("deepseek_r1_distill", "deepseekv3"),  # asks with <think>, learns without
        *("nemotron_3_5_lightning", "nemotron_3_nano", "nemotron_3_super", "nemotron_3_ultra"),  # likewise
        *("idefics3", "llava_next", "smolvlm"),  # take lists of parts, not strings
    )
}
REWRITING_TEMPLATES = {"gptoss_training", "phi3_training", "phi3_5_training"}
TRL_TEMPLATES = sorted((Path(trl.__file__).parent / "chat_templates").glob("*_training.jinja"))


@pytest.mark.parametrize("path", TRL_TEMPLATES, ids=lambda path: path.stem)
def test_on_trls_templates_labels_are_the_marked_text_without_the_prompt_and_closing_blanks(path):
    """Its marks may cover what the generation prompt writes already, and the newline after the end token."""
    template = path.read_text(encoding="utf-8")
    messages = [{"role": role, "content": f"the {role} dog"} for role in ("user", "assistant") * 2]
    tokenizer = tiny.byte_tokenizer(template, trim_offsets=False)
    if path.stem in UNFIT_TEMPLATES:
        with pytest.raises(DataError, match=r"ends the prompt with|leaves out|refuses"):
            examples_of(messages, tokenizer)
        return
    examples, _ = examples_of(messages, tokenizer)
    ours = [piece for example in examples for piece in labelled_pieces(example, tokenizer)]
    assert len(ours) == 2
    if path.stem in REWRITING_TEMPLATES:
        assert len(examples) == 2
        return
    assert len(examples) == 1
    marks = theirs(tokenizer, messages, template, return_assistant_tokens_mask=True)
    marked = Example(np.asarray(marks["input_ids"]), np.asarray(marks["assistant_masks"]) == 1, "", {})
    asked = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False)
    for our, their in zip(ours, labelled_pieces(marked, tokenizer), strict=True):
        assert their.rstrip().endswith(our.rstrip())
        assert asked.endswith(their.rstrip().removesuffix(our.rstrip()))
