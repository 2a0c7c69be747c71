"""Laws of the way from characters to tokens."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from onebase.data.tokens import Encoded, encode, special_ids, token_span
from tests.data import tiny


@given(st.lists(st.integers(0, 3), min_size=1, max_size=8), st.data())
def test_the_tokens_of_a_span_are_those_that_cover_a_character_of_it_or_stand_in_it(widths, data):
    ends = np.cumsum(widths).astype(np.int32)
    starts = (ends - widths).astype(np.int32)
    start = data.draw(st.integers(0, int(ends[-1])))
    end = data.draw(st.integers(start, int(ends[-1])))
    encoded = Encoded("x" * int(ends[-1]), np.arange(len(widths), dtype=np.int32), starts, ends)
    inside = [
        place
        for place, (a, b) in enumerate(zip(starts, ends, strict=True))
        if (a < end and b > start and a < b and start < end) or (a == b and start <= a < end)
    ]
    first, last = token_span(encoded, (start, end), tiny.byte_tokenizer())
    if start < end:
        assert list(range(first, last)) == inside


@given(st.text(max_size=30))
def test_covers_follow_each_other_and_leave_no_character_out(text):
    for tokenizer in (tiny.byte_tokenizer(), tiny.byte_tokenizer(trim_offsets=False), tiny.piece_tokenizer()):
        (encoded,) = encode([text], tokenizer)
        assert encoded.starts is not None
        assert encoded.ends is not None
        covered = set()
        for start, end in zip(encoded.starts.tolist(), encoded.ends.tolist(), strict=True):
            covered |= set(range(start, end))
        assert covered >= {place for place, letter in enumerate(text) if not letter.isspace()}
        assert encoded.ends.tolist() == sorted(encoded.ends.tolist())
        assert encoded.starts.tolist() == sorted(encoded.starts.tolist())


def test_the_token_for_unknown_words_ends_no_turn():
    tokenizer = tiny.word_tokenizer()
    assert tokenizer.unk_token_id not in special_ids(tokenizer)
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in special_ids(tokenizer)
    tokenizer.unk_token = tokenizer.eos_token
    assert tokenizer.eos_token_id in special_ids(tokenizer)
