"""Laws of plain text: windows lose no token, and every token that something precedes is a label."""

from hypothesis import given
from hypothesis import strategies as st

from onebase.data.text import text_windows
from tests.data import tiny

texts = st.text(min_size=1, max_size=60)
lengths = st.one_of(st.none(), st.integers(3, 12))


def windows_of(text, tokenizer, max_length):
    return next(text_windows([text], tokenizer, max_length))


@given(texts, lengths)
def test_windows_follow_each_other_and_end_with_one_eos(text, max_length):
    tokenizer = tiny.byte_tokenizer()
    windows = windows_of(text, tokenizer, max_length)
    joined = [token for ids, _ in windows for token in ids.tolist()]
    assert joined == [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
    for ids, labelled in windows:
        assert max_length is None or len(ids) <= max_length
        assert labelled.tolist() == [False] + [True] * (len(ids) - 1)
        assert labelled.any() or len(joined) == 1


@given(texts, lengths)
def test_with_a_bos_every_window_starts_with_it_and_every_token_of_the_text_is_a_label_once(text, max_length):
    tokenizer = tiny.byte_tokenizer(bos=True)
    windows = windows_of(text, tokenizer, max_length)
    assert all(int(ids[0]) == tokenizer.bos_token_id for ids, _ in windows)
    learned = [token for ids, labelled in windows for token in ids[labelled].tolist()]
    assert learned == [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]


def test_bos_and_eos_that_the_text_brings_are_not_doubled():
    tokenizer = tiny.byte_tokenizer(bos=True)
    ((ids, _),) = windows_of("<s>the dog</s>", tokenizer, None)
    assert ids.tolist() == tokenizer("<s>the dog</s>", add_special_tokens=False)["input_ids"]


def test_a_tokenizer_without_eos_adds_none():
    tokenizer = tiny.byte_tokenizer()
    tokenizer.eos_token = None
    ((ids, _),) = windows_of("the dog", tokenizer, None)
    assert ids.tolist() == tokenizer("the dog")["input_ids"]
