"""Laws of tokens as text: the pieces are the whole, and none of them is half a character."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.cli.token_text import TokenText
from tests.data import tiny

TOKENIZERS: dict[str, Callable[[], Any]] = {
    "bytes": tiny.byte_tokenizer,
    "pieces": tiny.piece_tokenizer,
    "words": tiny.word_tokenizer,
}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("skip_special", [True, False])
@given(text=st.text(st.sampled_from("the cat dog \n\u00e4\u20ac\U0001f600\u4e2d"), max_size=30))
def test_the_pieces_of_a_text_joined_are_the_text(kind, skip_special, text):
    tokenizer = TOKENIZERS[kind]()
    ids = tokenizer(text + "<|im_end|>" + text, add_special_tokens=False)["input_ids"]
    pieces = TokenText(tokenizer, skip_special=skip_special)
    told = [pieces.push(token) for token in ids]
    whole = tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False)
    assert "".join(told) + pieces.rest() == whole
    assert not any("\ufffd" in piece for piece in told)


def test_bytes_that_never_become_a_character_are_not_lost():
    tokenizer = tiny.byte_tokenizer()
    half = tokenizer("\u20ac", add_special_tokens=False)["input_ids"][:1]
    pieces = TokenText(tokenizer, skip_special=True)
    assert pieces.push(half[0]) == ""
    assert pieces.rest() == tokenizer.decode(half)
    assert pieces.rest() == ""
