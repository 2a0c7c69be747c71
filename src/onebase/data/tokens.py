"""Tokens: what this room asks of a tokenizer, and from characters of a text to labels on its tokens.

The text is tokenised once, as a whole, so its ids are those that transformers gives for it. Which tokens belong to a
stretch of characters is read from the tokenizer's offsets. Three rules make that exact:

- A token covers the characters from the end of the token before it to its own end (tokenizers trim blanks off their
  offsets); the pieces of one character that was cut into bytes all cover that character.
- A token that covers at least one character of the stretch is in it, also where it reaches over the stretch's edge: the
  model has to predict it. A token without characters (the blank that SentencePiece puts in front) is in it where it
  stands in it or at its start.
- A turn ends with its end token, the last special token in it; blanks after that (the newline after "<|im_end|>") are
  no labels. Where nothing but blanks ends the turn, they are its end and stay labels.

Tokenizers without offsets (written in Python) are asked for the tokens of the prefixes. If these are prefixes of the
whole text's tokens the edges are exact, and otherwise the row is a bad row: nothing is guessed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from onebase.data.rows import BadRow

IntArray: TypeAlias = NDArray[np.int32]
BoolArray: TypeAlias = NDArray[np.bool_]
Span: TypeAlias = tuple[int, int]


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    is_fast: bool
    chat_template: Any
    bos_token_id: int | None
    eos_token: str | None
    eos_token_id: int | None
    unk_token_id: int | None
    all_special_ids: list[int]
    all_special_tokens: list[str]
    added_tokens_decoder: Mapping[int, Any]

    def __call__(self, text: Any, **kwargs: Any) -> Any:
        """Tokenise a text or a list of texts."""

    def apply_chat_template(self, conversation: Any, **kwargs: Any) -> Any:
        """Render messages with the chat template."""

    def decode(self, token_ids: Any, **kwargs: Any) -> Any:
        """Return the text of token ids."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """The tokens of one text; token i covers the characters starts[i] to ends[i]. Without offsets both are None."""

    text: str
    token_ids: IntArray
    starts: IntArray | None
    ends: IntArray | None


def encode(texts: Sequence[str], tokenizer: Tokenizer, *, special: bool = False) -> list[Encoded]:
    """Return the tokens of each text; `special` lets the tokenizer add its own BOS and the like."""
    if not texts:
        return []
    given = tokenizer(
        list(texts),
        add_special_tokens=special,
        padding=False,
        truncation=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        return_offsets_mapping=tokenizer.is_fast,
        verbose=False,
    )
    ids = [np.asarray(row, dtype=np.int32) for row in given["input_ids"]]
    if not tokenizer.is_fast:
        return [Encoded(text, row, None, None) for text, row in zip(texts, ids, strict=True)]
    encoded = []
    for text, row, offsets in zip(texts, ids, given["offset_mapping"], strict=True):
        starts, ends = np.asarray(offsets, dtype=np.int32).reshape(-1, 2).T
        ends = np.maximum.accumulate(ends) if len(ends) else ends
        before = np.concatenate([np.zeros(1, np.int32), ends[:-1]])[: len(ends)]
        encoded.append(Encoded(text, row, np.minimum(starts, before), ends))
    return encoded


def special_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the ids that can end a turn: special tokens, except the one for unknown words."""
    ids = set(tokenizer.all_special_ids)
    ids |= {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    if tokenizer.unk_token_id is not None and tokenizer.unk_token_id != tokenizer.eos_token_id:
        ids.discard(tokenizer.unk_token_id)
    return frozenset(ids)


def special_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return how the special tokens are written."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(dict.fromkeys([*tokenizer.all_special_tokens, *added]))


def token_span(encoded: Encoded, span: Span, tokenizer: Tokenizer) -> Span:
    """Return the range of tokens that belong to a stretch of characters, by the rules above.

    Raises: BadRow if a tokenizer without offsets has tokens across an edge.
    """
    start, end = span
    if encoded.starts is None or encoded.ends is None:
        return _prefix_length(encoded, start, tokenizer), _prefix_length(encoded, end, tokenizer)
    # Covers are in order, so both edges are found by bisection. First token: the first that ends after `start`, or that
    # stands at `start` without characters. Last: the last that starts before `end`, and does not stand at it.
    first = int(np.searchsorted(encoded.ends, start, side="right"))
    while first > 0 and encoded.starts[first - 1] == encoded.ends[first - 1] == start:
        first -= 1
    last = int(np.searchsorted(encoded.starts, end, side="left"))
    return first, last


def _prefix_length(encoded: Encoded, position: int, tokenizer: Tokenizer) -> int:
    if position == len(encoded.text):
        return len(encoded.token_ids)
    prefix = encode([encoded.text[:position]], tokenizer)[0].token_ids
    if not np.array_equal(encoded.token_ids[: len(prefix)], prefix):
        raise BadRow(
            "a token across the edge of a turn",
            "a token reaches over the edge of an assistant turn, and this tokenizer gives no offsets to find it by. "
            "Use the fast tokenizer of the model (tokenizer.json).",
        )
    return len(prefix)


def turn_end(encoded: Encoded, span: Span, specials: frozenset[int], tokenizer: Tokenizer) -> tuple[int, bool]:
    """Return where a turn's labels end (the token after the last label), and whether an end token was found."""
    first, last = span
    position = last
    while position > first:
        token = int(encoded.token_ids[position - 1])
        if token in specials:
            return position, True
        if encoded.starts is not None and encoded.ends is not None:
            piece = encoded.text[encoded.starts[position - 1] : encoded.ends[position - 1]]
        else:
            piece = str(tokenizer.decode([token]))
        if piece.strip():
            break
        position -= 1
    return last, False
