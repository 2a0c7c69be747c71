"""Text: from one plain text to windows of tokens, none of them lost.

The tokenizer puts its own BOS in front, if it has that habit; the EOS token is appended once at the end, if there is
one. A text longer than `max_length` is cut into windows that follow each other without overlap. If the tokenizer starts
texts with BOS, every window starts with it, because the models that were trained so expect it there; then every token
of the text is a label in exactly one window. Without BOS the first token of each window has nothing that predicts it
and is no label.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise

import numpy as np

from onebase.data.tokens import BoolArray, IntArray, Tokenizer, encode


def text_windows(
    texts: Sequence[str], tokenizer: Tokenizer, max_length: int | None
) -> Iterator[list[tuple[IntArray, BoolArray]]]:
    """Yield for each text its windows: (token_ids, labelled)."""
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for encoded in encode(texts, tokenizer, special=True):
        ids = encoded.token_ids
        starts_with_bos = bos is not None and len(ids) > 0 and int(ids[0]) == bos and _adds_bos(tokenizer)
        if starts_with_bos:
            ids = ids[1:]
            if len(ids) and int(ids[0]) == bos:  # the text brought its own
                ids = ids[1:]
        if eos is not None and (len(ids) == 0 or int(ids[-1]) != eos):
            ids = np.append(ids, np.int32(eos))
        yield [_window(piece, bos if starts_with_bos else None) for piece in _cut(ids, max_length, starts_with_bos)]


def _adds_bos(tokenizer: Tokenizer) -> bool:
    ids = tokenizer("a", add_special_tokens=True)["input_ids"]
    return len(ids) > 0 and ids[0] == tokenizer.bos_token_id


def _cut(ids: IntArray, max_length: int | None, starts_with_bos: bool) -> list[IntArray]:
    size = len(ids) if max_length is None else max_length - int(starts_with_bos)
    edges = [*range(0, len(ids), size), len(ids)]
    if len(edges) > 2 and edges[-1] - edges[-2] == 1 and not starts_with_bos and size > 2:
        edges[-2] -= 1  # a window of one token would have no label: it takes one more from its neighbour
    return [ids[start:end] for start, end in pairwise(edges)]


def _window(piece: IntArray, bos: int | None) -> tuple[IntArray, BoolArray]:
    ids = piece if bos is None else np.concatenate([np.asarray([bos], np.int32), piece])
    labelled = np.ones(len(ids), dtype=np.bool_)
    labelled[:1] = False
    return ids, labelled
