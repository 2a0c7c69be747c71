"""Tokens as text, one at a time: what each token adds, as soon as it is whole characters."""

from typing import Any


class TokenText:
    """Turns a stream of tokens into a stream of text; joined, the pieces are the decoded whole.

    A token's piece is what it adds to the text of the few tokens before it, so that blanks are right in every kind of
    tokenizer. A token that ends inside a character gives nothing; the one that completes the character gives it all.
    """

    def __init__(self, tokenizer: Any, *, skip_special: bool) -> None:
        self._tokenizer, self._skip_special = tokenizer, skip_special
        self._ids: list[int] = []
        self._start = 0
        self._done = 0

    def push(self, token: int) -> str:
        """Return the text that this token adds."""
        self._ids.append(token)
        before, now = self._text(self._done), self._text(len(self._ids))
        if now.endswith("\ufffd") or len(now) <= len(before):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return now[len(before) :]

    def rest(self) -> str:
        """Return what was held back because it ends inside a character."""
        held = self._text(len(self._ids))[len(self._text(self._done)) :]
        self._start = self._done = len(self._ids)
        return held

    def _text(self, end: int) -> str:
        text: str = self._tokenizer.decode(
            self._ids[self._start : end],
            skip_special_tokens=self._skip_special,
            clean_up_tokenization_spaces=False,
        )
        return text
