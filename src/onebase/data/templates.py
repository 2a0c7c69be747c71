"""Chats as training renders them against what transformers makes of them: the same token ids?

Ours: the template's text, tokenised once. Theirs: `apply_chat_template(tokenize=True)` of the tokenizer that was saved,
which is what anybody gets who opens it. Called by train/verifying.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from onebase.data.chat import Renderer
from onebase.data.rows import Row
from onebase.data.shapes import Conversation, conversation_of
from onebase.data.tokens import encode


def differing_chats(rows: Sequence[Row], renderer: Renderer, theirs: Any, labels: str, system: str | None) -> list[str]:
    """Return the places of the rows whose token ids differ, each with where they do.

    Raises:
        BadRow: a row that cannot be read, or that the template refuses.
    """
    found = []
    for row in rows:
        conversation, _ = conversation_of(row.values, system)
        renderings = renderer.renderings(conversation, labels)
        ends = [len(conversation.messages)] if len(renderings) == 1 else _ends(conversation, labels)
        for encoded, end in zip(encode([r.text for r in renderings], renderer.tokenizer), ends, strict=True):
            own = encoded.token_ids.tolist()
            other = theirs.apply_chat_template(
                [dict(message) for message in conversation.messages[:end]],
                tools=list(conversation.tools) if conversation.tools else None,
                tokenize=True,
                return_dict=False,
            )
            if own != list(other):
                found.append(f"{row.place}: {next(_differences(own, list(other)))}")
                break
    return found


def _ends(conversation: Conversation, labels: str) -> list[int]:
    """Return after which message each example of a row ends whose template rewrites earlier turns."""
    messages = conversation.messages
    turns = [
        i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= conversation.first_answer
    ]
    return [turn + 1 for turn in (turns[-1:] if labels == "last" else turns)]


def _differences(own: list[int], other: list[int]) -> Iterator[str]:
    for place, (mine, yours) in enumerate(zip(own, other, strict=False)):
        if mine != yours:
            yield f"token {place} is {mine} here, {yours} in transformers"
    yield f"{len(own)} tokens here, {len(other)} in transformers"
