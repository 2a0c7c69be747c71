"""The shapes of rows: from any usual set of columns to one conversation or one text.

Known without configuration: `messages` (with `tools`), `prompt`/`completion` (strings or lists of messages),
`instruction`/`input`/`output` (alpaca), `conversations` (sharegpt: `from`/`value`), `text`. Anything else is mapped by
`columns`, a role -> column table. Here is also where a row's messages are checked; rendering them is `chat.py`'s work.

What a row's author wrote is never repaired by guessing: a row with two complete shapes, an unknown sharegpt speaker or
an empty answer is a bad row.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from onebase.data.rows import CONTENT_ROLES, BadRow
from onebase.errors import DataError

SHAPES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "messages": (("messages",), ("tools", "system")),
    "prompt": (("prompt", "completion"), ("tools", "system")),
    "instruction": (("instruction", "output"), ("input", "system")),
    "conversations": (("conversations",), ("tools", "system")),
    "text": (("text",), ()),
}
"""Name of the shape -> (columns it needs, columns it takes besides)."""

OPTIONAL_ROLES = ("tools", "system", "input")
ROLES = (*CONTENT_ROLES, "label", "target")

SPEAKERS = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""Sharegpt's `from` -> role."""

_ASKING = ("prompt", "question", "query", "problem", "instruction", "input", "user", "request")
_SKIP = "; a training leaves such rows out with data.on_bad_row: skip."
_ANSWERING = ("completion", "answer", "response", "output", "solution", "assistant", "reply")


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages as the chat template takes them; those before `first_answer` are given and never learned."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None
    first_answer: int
    rest: dict[str, Any]


def check_columns(columns: Mapping[str, str]) -> None:
    """Raise a DataError if `columns` names an unknown role or mixes two shapes."""
    unknown = [role for role in columns if role not in ROLES]
    if unknown:
        raise DataError(
            f"data.columns: {_listed(unknown)} is no role; the form is role: column, and the roles are {_listed(ROLES)}."
        )
    needed = [name for name, (needs, _) in SHAPES.items() if any(role in columns for role in needs)]
    if len(needed) > 1:
        raise DataError(
            f"data.columns maps {_listed(columns)}, which belong to different row shapes. Map one of: {_listed_shapes()}."
        )


def apply_columns(values: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the row with each mapped column under its role's name.

    Where a shape's own column is mapped, unmapped columns with the names of other shapes are left out: the mapping
    says which shape is meant. An optional role (tools, system, input) may be missing in a row.

    Raises: BadRow if a mapped column is not there.
    """
    missing = [column for role, column in columns.items() if column not in values and role not in OPTIONAL_ROLES]
    if missing:
        raise BadRow(
            "a mapped column is missing",
            f"{_listed(missing)} is missing; the row has {_listed(values)}.",
            "Correct data.columns, which maps it.",
        )
    kept = {key: value for key, value in values.items() if key not in columns.values()}
    for needs, takes in SHAPES.values():
        if any(role in columns for role in needs):
            foreign = [role for role in CONTENT_ROLES if role not in needs and role not in takes]
            kept = {key: value for key, value in kept.items() if key not in foreign}
    kept.update({role: values[column] for role, column in columns.items() if column in values})
    return kept


def conversation_of(values: Mapping[str, Any], system: str | None = None) -> tuple[Conversation, bool]:
    """Return the row as a conversation, and whether it keeps a system message of its own instead of `system`.

    `system` is for conversations that have none; a row's own (its first message, or a `system` column) stays.

    Raises: BadRow if the row has no chat shape, two of them, or messages that cannot be learned from.
    """
    name = _chat_shape(values)
    needs, takes = SHAPES[name]
    first_answer = 0
    if name in ("messages", "conversations"):
        messages = _messages(values[name], name)
    elif name == "prompt":
        asked = _messages(values["prompt"], "prompt", role="user")
        messages = asked + _messages(values["completion"], "completion", role="assistant")
        first_answer = len(asked)
    else:
        messages = [_alpaca_question(values), *_messages(values["output"], "output", role="assistant")]
    messages, first_answer, keeps_own = _with_system(messages, first_answer, system, values.get("system"))
    _check_answers(messages, first_answer)
    rest = {key: value for key, value in values.items() if key not in needs and key not in takes}
    return Conversation(messages, _tools(values.get("tools")), first_answer, rest), keeps_own


def text_of(values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Return the row's text and its other columns.

    Raises: BadRow if there is no `text` column, or nothing in it.
    """
    if values.get("text") is None:
        chat = [name for name in SHAPES if name != "text" and _complete(values, name)]
        if not chat:
            _check_nulls(values, [SHAPES["text"][0]])
        advice = (
            f"Rows with {_listed(SHAPES[chat[0]][0])} are for task: chat; for plain text map a column: "
            "data.columns: {text: COLUMN}"
            if chat
            else f"Map one: data.columns: {{text: {next(iter(values), 'COLUMN')}}}"
        )
        raise BadRow("no 'text' column", f"'text' is missing; the row has {_listed(values)}.", advice)
    text = values["text"]
    if not isinstance(text, str):
        raise BadRow("a text that is no string", f"'text' must be a string, got {type(text).__name__}.")
    if not text.strip():
        raise BadRow("an empty text", "'text' is empty.", f"Remove the row{_SKIP}")
    return text, {key: value for key, value in values.items() if key != "text"}


def _chat_shape(values: Mapping[str, Any]) -> str:
    found = [name for name in SHAPES if name != "text" and _complete(values, name)]
    if len(found) == 1:
        return found[0]
    if found:
        needs = SHAPES[found[0]][0]
        mapping = ", ".join(f"{role}: {role}" for role in needs)
        raise BadRow(
            "more than one row shape",
            f"the row has several shapes at once: {_listed(found)}.",
            f"Choose one: data.columns: {{{mapping}}}",
        )
    _check_nulls(values, [needs for name, (needs, _) in SHAPES.items() if name != "text"])
    if _complete(values, "text"):
        raise BadRow(
            "no chat shape",
            f"'messages' is missing; the row has {_listed(values)}.",
            "Plain 'text' is for task: text.",
        )
    question = next((name for word in _ASKING for name in values if word in str(name).lower()), None)
    answer = next(
        (name for word in _ANSWERING for name in values if word in str(name).lower() and name != question), None
    )
    if question is not None and answer is None:
        raise BadRow(
            "no answer column",
            f"the row has a question and no answer; its columns are {_listed(values)}.",
            f"To learn or to measure, name the answer's: data.columns: {{prompt: {question}, completion: COLUMN}}. To get answers: onebase predict",
        )
    mapping = f"prompt: {question or 'COLUMN'}, completion: {answer or 'COLUMN'}"
    raise BadRow(
        "no chat shape",
        f"'messages' is missing; the row has {_listed(values)}.",
        f"Map them: data.columns: {{{mapping}}}",
    )


def _complete(values: Mapping[str, Any], name: str) -> bool:
    return all(values.get(role) is not None for role in SHAPES[name][0])


def _check_nulls(values: Mapping[str, Any], shapes: Sequence[Sequence[str]]) -> None:
    """Raise a BadRow if the row has all columns of a shape, one of them null: no mapping would help it."""
    for needs in shapes:
        nulls = [role for role in needs if role in values and values[role] is None]
        if nulls and all(role in values for role in needs):
            raise BadRow(
                "a null column",
                f"{_listed(nulls)} {'is' if len(nulls) == 1 else 'are'} null.",
                f"Fill it in, or remove the row{_SKIP}",
            )


def _messages(given: Any, column: str, role: str | None = None) -> list[dict[str, Any]]:
    """Return the messages of a column: a list of them, its JSON text (CSV has no lists), or one string of `role`."""
    if isinstance(given, str):
        if role is not None:
            return [{"role": role, "content": given}]
        given = _from_json(given, column)
    if not isinstance(given, Sequence):
        allowed = "a list" if role is None else "text or a list of messages"
        raise BadRow("messages of the wrong type", f"'{column}' must be {allowed}, got {type(given).__name__}.")
    if not given:
        raise BadRow("no messages", f"'{column}' is an empty list.")
    return [_message(message, f"{column}[{index}]") for index, message in enumerate(given)]


def _message(given: Any, where: str) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise BadRow("a message that is no object", f"{where} must be an object, got {type(given).__name__}.")
    # None is how Arrow and other tools write "not there"; templates would print it.
    message = {key: value for key, value in given.items() if value is not None}
    if "role" not in message and "from" in message:
        speaker = str(message.pop("from"))
        if speaker not in SPEAKERS:
            raise BadRow("an unknown speaker", f"{where}.from: '{speaker}' is none of {_listed(SPEAKERS)}.")
        message = {"role": SPEAKERS[speaker], "content": message.pop("value", None), **message}
    if not isinstance(message.get("role"), str):
        written = next((key for key in ("role", "from") if key in given), None)
        if written is not None:
            value = given[written]
            told = "is null" if value is None else f"must be a string, got {type(value).__name__}"
            raise BadRow(
                "a message without a role", f"{where}.{written} {told}.", "Write who speaks: user, assistant, ..."
            )
        raise BadRow("a message without a role", f"{where} needs 'role' and 'content'; it has {_listed(given)}.")
    content = message.get("content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        message["content"] = content = _joined_parts(content, where)
    if content is None and not message.get("tool_calls"):
        raise BadRow("a message without content", f"{where} ({message['role']}) has no 'content'.")
    if content is not None and not isinstance(content, str):
        raise BadRow(
            "a content that is no string",
            f"{where}.content must be a string or text parts, got {type(content).__name__}.",
        )
    return message


def _joined_parts(parts: Sequence[Any], where: str) -> str:
    texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    kept = [text for text in texts if isinstance(text, str)]
    if len(kept) < len(texts):
        raise BadRow(
            "content that is not text", f"{where}.content has parts that are not text; task: chat takes text only."
        )
    return "".join(kept)


def _alpaca_question(values: Mapping[str, Any]) -> dict[str, Any]:
    instruction, extra = values["instruction"], values.get("input")
    for column, text in (("instruction", instruction), ("input", extra)):
        if text is not None and not isinstance(text, str):
            raise BadRow("a column of the wrong type", f"'{column}' must be a string, got {type(text).__name__}.")
    content = f"{instruction}\n\n{extra}" if extra and extra.strip() else instruction
    return {"role": "user", "content": content}


def _with_system(
    messages: list[dict[str, Any]], first_answer: int, system: str | None, row_system: Any
) -> tuple[list[dict[str, Any]], int, bool]:
    first = system
    keeps_own = messages[0]["role"] == "system"
    if not keeps_own and row_system is not None and str(row_system).strip():
        first, keeps_own = str(row_system), True
    elif keeps_own:
        first = None
    if first is not None:
        messages, first_answer = [{"role": "system", "content": first}, *messages], first_answer + 1
    return messages, first_answer, keeps_own and system is not None


def _check_answers(messages: list[dict[str, Any]], first_answer: int) -> None:
    answers = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if not any(index >= first_answer for index in answers):
        roles = list(dict.fromkeys(message["role"] for message in messages))
        raise BadRow("no assistant turn", f"no assistant turn to learn from; the roles are {_listed(roles)}.")
    for index in answers:
        if not str(messages[index].get("content", "")).strip() and not messages[index].get("tool_calls"):
            raise BadRow(
                "an empty assistant turn",
                f"message {index + 1} (assistant) is empty: there is nothing to learn.",
                f"Write the answer, or remove the row{_SKIP}",
            )
    if all(message["role"] == "system" for message in messages[: answers[0]]):
        raise BadRow(
            "an assistant turn without a question",
            "the conversation starts with an assistant turn, so there is no prompt that it answers.",
        )


def _tools(given: Any) -> list[dict[str, Any]] | None:
    if isinstance(given, str):
        given = _from_json(given, "tools") if given.strip() else None
    if not given:
        return None
    if not isinstance(given, Sequence) or not all(isinstance(tool, Mapping) for tool in given):
        raise BadRow("tools of the wrong type", f"'tools' must be a list of objects, got {type(given).__name__}.")
    return [dict(tool) for tool in given]


def _from_json(text: str, column: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadRow(
            "a column that is no JSON", f"'{column}' is a string, and not the JSON text of a list ({error})."
        ) from None


def _listed(names: Any) -> str:
    return ", ".join(f"'{name}'" for name in names) or "no columns"


def _listed_shapes() -> str:
    return "; ".join(", ".join(needs) for needs, _ in SHAPES.values())
