"""Prompts: from a conversation, or a row of a data file, to the tokens that a model is asked to continue.

They are the tokens that training put before an answer: the same chat template, the same tokenisation. A row may hold
its answer (then that is what was expected, and is left out of the prompt) or not. Called by `onebase chat` and `predict`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onebase.data.chat import Messages, Renderer
from onebase.data.rows import BadRow, Fault, Row, list_faults
from onebase.data.shapes import conversation_of, text_of
from onebase.data.tokens import encode
from onebase.errors import DataError

_STAND_IN = "?"
_ANSWER_OF = {"prompt": "completion", "instruction": "output"}


@dataclass(frozen=True)
class Asking:
    """How prompts are made for one model: `task` chat renders its chat template, text continues what is given."""

    tokenizer: Any
    task: str = "chat"
    system: str | None = None

    def of_messages(self, messages: Messages, tools: Sequence[Any] | None = None) -> list[int]:
        """Return the tokens of a conversation that ends where the model is to answer.

        Raises:
            BadRow: the chat template refuses the messages.
        """
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        (encoded,) = encode([Renderer(self.tokenizer).render(messages, tools, asking=True)], self.tokenizer)
        ids: list[int] = encoded.token_ids.tolist()
        return ids

    def of_text(self, text: str) -> list[int]:
        """Return the tokens of a text that is to be continued: with its BOS, without an end."""
        (encoded,) = encode([text], self.tokenizer, special=True)
        ids: list[int] = encoded.token_ids.tolist()
        if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id:
            ids.pop()
        return ids

    def of_row(self, row: Row) -> list[int]:
        """Return the tokens of a row's question.

        Raises:
            BadRow: the row cannot be read, or holds no question.
        """
        if row.fault is not None:
            raise BadRow(row.fault.reason, row.fault.message, row.fault.todo)
        if self.task == "text":
            return self.of_text(text_of(row.values)[0])
        conversation, _ = conversation_of(_answered(row.values), self.system)
        return self.of_messages(conversation.messages[:-1], conversation.tools)

    def of_rows(self, rows: Sequence[Row], limit: int | None = None) -> list[list[int]]:
        """Return the prompt of every row.

        Raises:
            DataError: rows that have none, or one that leaves a model of `limit` tokens no room for an answer; the first
                ten of them and their number.
        """
        prompts, faults = [], []
        for row in rows:
            try:
                prompts.append(self.of_row(row))
            except BadRow as bad:
                faults.append((row.place, bad.fault))
                continue
            fault = prompt_fault(prompts[-1], limit)
            if fault is not None:
                faults.append((row.place, Fault("a prompt without room", f"the prompt {fault}")))
        if faults:
            raise DataError(list_faults(faults, len(rows)))
        return prompts

    def text_of(self, token_ids: Sequence[int]) -> str:
        """Return an answer's text, without special tokens and the blanks around it."""
        text: str = self.tokenizer.decode(list(token_ids), skip_special_tokens=True)
        return text.strip() if self.task == "chat" else text


def prompt_fault(prompt: Sequence[int], limit: int | None) -> str | None:
    """Return what is wrong with a prompt for a model that takes `limit` tokens (None: any number), None if nothing is."""
    if not prompt:
        return "has no tokens. Give it some text."
    if limit is not None and len(prompt) >= limit:
        return f"has {len(prompt)} tokens; with an answer the model takes at most {limit}. Shorten it."
    return None


def _answered(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row whose conversation ends with an answer: its own, or a stand-in where it ends with a question."""
    whole = dict(values)
    for asked, answer in _ANSWER_OF.items():
        if whole.get(asked) is not None and not whole.get(answer):
            whole[answer] = _STAND_IN
    for column in ("messages", "conversations"):
        messages = _from_json(whole.get(column))
        if isinstance(messages, Sequence) and messages and not _is_answer(messages[-1]):
            whole[column] = [*messages, {"role": "assistant", "content": _STAND_IN}]
    return whole


def _from_json(given: Any) -> Any:
    """Return a list of messages that CSV holds as text; anything else as it is."""
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given)
    except ValueError:
        return given


def _is_answer(message: Any) -> bool:
    if not isinstance(message, Mapping):
        return False
    return message.get("role") == "assistant" or message.get("from") in ("gpt", "chatgpt", "assistant", "model")
