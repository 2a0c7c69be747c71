"""Laws of the checks that preview shows."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from onebase.data.building import build_examples
from onebase.data.check import label_segments, overlap
from onebase.data.rows import Row
from tests.data import tiny

contents = st.text(min_size=1, max_size=12).filter(str.strip)


def built(pairs, tokenizer, name="train"):
    rows = [Row({"prompt": q, "completion": a}, f"{name} line {n}") for n, (q, a) in enumerate(pairs, start=1)]
    return build_examples(rows, tokenizer)[0]


@given(contents, contents, st.sampled_from([tiny.byte_tokenizer(), tiny.piece_tokenizer(), tiny.word_tokenizer()]))
def test_segments_join_to_the_decoded_text_and_alternate(question, answer, tokenizer):
    example = built([(question, answer)], tokenizer)[0]
    segments = label_segments(example, tokenizer)
    assert "".join(text for text, _ in segments) == tokenizer.decode(example.token_ids.tolist())
    assert all(one[1] != other[1] for one, other in pairwise(segments))


@given(contents, contents)
def test_segments_of_a_byte_level_tokenizer_are_the_rendered_text(question, answer):
    tokenizer = tiny.byte_tokenizer()
    messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    segments = label_segments(built([(question, answer)], tokenizer)[0], tokenizer)
    assert "".join(text for text, _ in segments) == tokenizer.apply_chat_template(messages, tokenize=False)


def test_rows_in_both_train_and_valid_are_found_with_both_places():
    tokenizer = tiny.byte_tokenizer()
    train = built([("a", "1"), ("b", "2"), ("a", "1")], tokenizer)
    valid = built([("c", "3"), ("a", "1"), ("b", "3")], tokenizer, "valid")
    assert overlap(train, valid) == [("valid line 2", "train line 1")]
    assert overlap(train, valid[:1]) == []
