"""Chat: from a conversation to rendered text with the characters of the assistant turns marked.

The model's own chat template writes the text; which of its characters an assistant turn is, is found by rendering turn
by turn: the conversation before the turn with the generation prompt, which is what the model will be asked to continue,
and the conversation through the turn. Both must be prefixes of the whole rendering; the turn is what lies between. No
markers in the template are needed, and nothing is searched for in the text.

Where the template writes earlier turns differently once the conversation goes on (Qwen3 removes the thinking, some
templates move the tools to the last question), they are no prefixes of the whole. Then the row becomes one example for
each assistant turn: the conversation up to that turn, with this turn alone marked.

A template may close every rendering with the end-of-text token (Phi-3); a turn in the middle then ends without it.
Cost: one rendering, and two more for each assistant turn but the last one, which needs one more; about 40 us each.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from onebase.data.rows import BadRow
from onebase.data.shapes import Conversation
from onebase.data.tokens import Span, Tokenizer, special_texts
from onebase.errors import DataError

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True, slots=True)
class Rendering:
    """A conversation as text, and the stretches of it that are learned, with their end tokens and what follows them."""

    text: str
    spans: tuple[Span, ...]


@dataclass
class Renderer:
    """Renders conversations with one chat template (`template`, or the tokenizer's own).

    `notes` holds what was seen that is no fault of a single row, with the number of rows that it touches.

    Raises: DataError if there is no template, or it is no valid jinja.
    """

    tokenizer: Tokenizer
    template: str | None = None
    notes: dict[str, int] = field(default_factory=dict)
    _fits: bool = False
    _special_texts: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self._special_texts = special_texts(self.tokenizer)
        if self.template is None and not self.tokenizer.chat_template:
            raise DataError(
                "the model has no chat template, which task: chat needs. Name a jinja file in data.template, "
                "or use task: text."
            )
        if self.template is not None:
            _check_template(self.template)

    def render(self, messages: Messages, tools: Sequence[Any] | None, *, asking: bool) -> str:
        """Return the template's text; `asking` adds the generation prompt.

        Raises: BadRow with the template's own words if it refuses the messages.
        """
        try:
            text = self.tokenizer.apply_chat_template(
                [dict(message) for message in messages],
                tools=list(tools) if tools else None,
                chat_template=self.template,
                add_generation_prompt=asking,
                tokenize=False,
            )
        except Exception as error:  # a template can raise whatever jinja and Python can
            raise BadRow(
                f"the chat template refuses: {error}",
                f"the chat template refuses the row: {error} ({type(error).__name__}; the roles are "
                f"{', '.join(str(message['role']) for message in messages)}).",
                "Change the row, or the template in data.template.",
            ) from error
        return str(text)

    def renderings(self, conversation: Conversation, labels: str) -> list[Rendering]:
        """Return the conversation as one rendering, or as one for each learned turn if the template rewrites turns.

        `labels` is "all" or "last": which assistant turns are learned, from `first_answer` on.

        Raises: BadRow if a turn cannot be told from its prompt.
        """
        messages, tools = conversation.messages, conversation.tools
        turns = [
            index
            for index, message in enumerate(messages)
            if message["role"] == "assistant" and index >= conversation.first_answer
        ]
        turns = turns[-1:] if labels == "last" else turns
        whole = self.render(messages, tools, asking=False)
        if tools and whole == self.render(messages, None, asking=False):
            self._note("the chat template ignores the row's tools")
        if not self._fits:
            self._check_template_fits(messages, tools, turns[0], self.render(messages[: turns[0]], tools, asking=True))
        prompts = [self.render(messages[:turn], tools, asking=True) for turn in turns]
        throughs = [self._through(messages, tools, turn, whole) for turn in turns]
        for turn, prompt, through in zip(turns, prompts, throughs, strict=True):
            self._check_turn(messages, tools, turn, prompt, through)
        if all(whole.startswith(text) for text in throughs) and all(whole.startswith(text) for text in prompts):
            spans = ((len(prompt), len(through)) for prompt, through in zip(prompts, throughs, strict=True))
            return [Rendering(whole, tuple(spans))]
        return [
            Rendering(through, ((len(prompt), len(through)),))
            for prompt, through in zip(prompts, throughs, strict=True)
        ]

    def _through(self, messages: Messages, tools: Sequence[Any] | None, turn: int, whole: str) -> str:
        """Return the rendering through a turn, without a closing end-of-text token that the whole does not have."""
        if turn + 1 == len(messages):
            return whole
        text = self.render(messages[: turn + 1], tools, asking=False)
        closing = self.tokenizer.eos_token
        if closing and not whole.startswith(text) and text.rstrip().endswith(closing):
            shorter = text.rstrip().removesuffix(closing)
            if whole.startswith(shorter) and shorter.rstrip().endswith(self._special_texts):
                return shorter  # the turn's own end token is still there
        return text

    def _check_turn(
        self, messages: Messages, tools: Sequence[Any] | None, turn: int, prompt: str, through: str
    ) -> None:
        """Raise a BadRow unless the turn's text is what follows its prompt, and is there at all."""
        if not through.startswith(prompt):
            kept = _common_length(prompt, through)
            raise BadRow(
                "the generation prompt is no prefix of the turn",
                f"message {turn + 1} (assistant): the chat template ends the prompt with {prompt[kept:][-80:]!r}, but "
                f"writes {through[kept:][:80]!r} there when the turn is given, so the model would learn to continue a "
                "text that it is never asked to continue.",
                "Name a template without this difference in data.template.",
            )
        if not through[len(prompt) :].strip():
            raise BadRow(
                "the chat template writes nothing for the turn",
                f"message {turn + 1} (assistant): the chat template writes nothing for this turn.",
            )
        if messages[turn].get("tool_calls"):
            bare = {key: value for key, value in messages[turn].items() if key != "tool_calls"}
            if self.render([*messages[:turn], {"content": "", **bare}], tools, asking=False).startswith(through):
                raise BadRow(
                    "the chat template ignores tool_calls",
                    f"message {turn + 1} (assistant): the chat template ignores 'tool_calls'.",
                    "Name one that writes them in data.template.",
                )

    def _check_template_fits(self, messages: Messages, tools: Sequence[Any] | None, turn: int, prompt: str) -> None:
        """Raise a DataError if no answer can be learned with the template; a fact about it, so looked at once.

        Two different answers must look different (templates for images leave out content that is a string). What both
        renderings share after the prompt is the template's opening: it may be blank ("[/INST] "), but an opening of
        words belongs into a generation prompt.
        """
        one, two = (
            self.render([*messages[:turn], {"role": "assistant", "content": text}], tools, asking=False)
            for text in ("A", "B")
        )
        if one == two:
            raise DataError(
                "the chat template leaves out what the assistant says: answers 'A' and 'B' give the same text. It may "
                "expect content as a list of parts. Name a template for text in data.template."
            )
        opening = one[len(prompt) : _common_length(one, two)]
        if opening.strip() and prompt == self.render(messages[:turn], tools, asking=False):
            raise DataError(
                f"the chat template opens an assistant turn with {opening!r}, but has no generation prompt: "
                "add_generation_prompt changes nothing, so the model would never be asked that way. Name a template "
                "in data.template that ends with {% if add_generation_prompt %}...{% endif %}."
            )
        self._fits = True

    def _note(self, note: str) -> None:
        self.notes[note] = self.notes.get(note, 0) + 1


def _common_length(one: str, two: str) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))


def _check_template(template: str) -> None:
    import jinja2

    if "{{" not in template and "{%" not in template:
        raise DataError(f"data.template: {template[:60]!r} is no chat template: it has no {{{{ }}}} and no {{% %}}.")
    # The tag that transformers adds is unknown to plain jinja.
    plain = re.sub(
        r"\{%([-+]?)\s*(end)?generation\b", lambda tag: f"{{%{tag[1]} {'endif' if tag[2] else 'if true'}", template
    )
    try:
        jinja2.Environment(extensions=["jinja2.ext.loopcontrols"]).parse(plain)
    except jinja2.TemplateSyntaxError as error:
        raise DataError(f"data.template: line {error.lineno}: not valid jinja: {error.message}.") from None
