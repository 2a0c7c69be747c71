"""Checks on finished examples, for `onebase preview`: what is labelled, and what is in both train and valid."""

import hashlib
from typing import Any

import numpy as np

from onebase.data.examples import Example, Examples


def label_segments(example: Example, tokenizer: Any) -> list[tuple[str, bool]]:
    """Return the example's text in pieces, each with whether it is labelled; joined, they are the decoded text.

    A piece is what the text gains as its tokens are added, so that nothing is lost where a tokenizer decodes a token
    differently at the start of a text. (Of a character whose bytes lie on both sides of an edge, all goes to the right.)
    """
    ids = example.token_ids
    edges = [0, *(np.flatnonzero(np.diff(example.labelled)) + 1).tolist(), len(ids)]
    whole = _decoded(ids, tokenizer)
    places = [0]
    for edge in edges[1:-1]:
        before = _decoded(ids[:edge], tokenizer)
        same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        places.append(max(places[-1], min(same, len(whole))))
    places.append(len(whole))
    return [
        (whole[start:end], bool(example.labelled[edge]))
        for start, end, edge in zip(places[:-1], places[1:], edges[:-1], strict=True)
    ]


def overlap(train: Examples, valid: Examples) -> list[tuple[str, str]]:
    """Return (place in valid, place in train) for each example of valid that train holds too, token for token."""
    known = {_key(example): example.place for example in reversed(train)}
    return [(example.place, known[key]) for example in valid if (key := _key(example)) in known]


def _key(example: Example) -> bytes:
    return hashlib.blake2b(example.token_ids.tobytes(), digest_size=16).digest()


def _decoded(ids: Any, tokenizer: Any) -> str:
    text = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text
