"""`onebase chat`: a conversation in the terminal, with an adapter that can be switched off and on."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from onebase.cli import options, terminal
from onebase.cli.opening import BaseOptions, Opened, open_adapter_or_model
from onebase.cli.scores import TOKEN_TASKS
from onebase.cli.token_text import TokenText
from onebase.errors import ConfigError, DataError

if TYPE_CHECKING:
    from onebase.measure.prompts import Asking

DEFAULT_MODEL = "smollm2-135m-instruct"
_SHOWN = 10
_HELP = """/quit    leave (also Ctrl-D)
/reset   forget the conversation
/base    switch the adapter off, and on again
/help    this list
Ctrl-C stops an answer."""


def chat(  # noqa: PLR0913 (a verb's options are its parameters)
    target: Annotated[
        str, typer.Argument(metavar="[ADAPTER|MODEL]", help="An adapter's folder, a run's, or a model.")
    ] = DEFAULT_MODEL,
    system: Annotated[str | None, typer.Option(help="The system message. Default: the run's.")] = None,
    max_new_tokens: options.MaxNewTokens = 512,
    temperature: options.Temperature = 0.0,
    seed: options.Seed = 0,
    model: options.Model = None,
    dtype: options.Dtype = None,
    device: options.Device = None,
    trust_remote_code: options.TrustRemoteCode = False,
    allow_base_mismatch: options.AllowBaseMismatch = False,
) -> None:
    """Talk to an adapter or a model in the terminal.

    /reset forgets the conversation, /base switches the adapter off and on, /quit leaves; Ctrl-C stops an answer.

    With standard input from a pipe, each line is a question and only the answers are printed; the exit code is 2 if a
    question got none.
    """
    opened = open_adapter_or_model(target, BaseOptions(model, dtype, device, trust_remote_code, allow_base_mismatch))
    if opened.task not in TOKEN_TASKS:
        raise ConfigError(
            f"{target} answers with labels (task {opened.task}), so it cannot chat. Use it: onebase predict {target} --data FILE"
        )
    talk = Talk(opened, opened.asking(system), max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    if _at_terminal():
        terminal.say(f"{_who(opened)}. /help lists the commands.")
    unanswered: list[int] = []
    for number, line in enumerate(_lines(), start=1):
        if line.startswith("/"):
            if not _command(talk, line):
                break
        elif line.strip() and not talk.ask(line):
            unanswered.append(number)
    if unanswered and not _at_terminal():
        raise DataError(_without_answer(unanswered))


def _at_terminal() -> bool:
    """Return whether somebody types the questions; standard input is None where it was closed."""
    return sys.stdin is not None and sys.stdin.isatty()


def _without_answer(numbers: Sequence[int]) -> str:
    """Return which questions of a pipe got no answer."""
    shown = ", ".join(map(str, numbers[:_SHOWN])) + (" ..." if len(numbers) > _SHOWN else "")
    lines = "line" if len(numbers) == 1 else "lines"
    return (
        f"standard input, {lines} {shown}: {terminal.counted(len(numbers), 'question')} without an answer, see above."
    )


def _who(opened: Opened) -> str:
    base = opened.bank.base
    return f"{opened.label} on {base.name}" if opened.adapter else base.name


class Talk:
    """One conversation: what was said, who answers, and how."""

    def __init__(self, opened: Opened, asking: "Asking", *, max_new_tokens: int, temperature: float, seed: int) -> None:
        self.opened, self.asking = opened, asking
        self.adapter = opened.adapter
        self._settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self._seed = seed
        self.messages: list[dict[str, str]] = []

    def ask(self, question: str) -> bool:
        """Print the answer to a question as it comes, return whether there is one; what Ctrl-C cut off is one too."""
        from onebase.data.rows import BadRow
        from onebase.measure.generate import generate

        asked = [*self.messages, {"role": "user", "content": question}]
        try:
            chatting = self.asking.task == "chat"
            prompt = self.asking.of_messages(asked) if chatting else self.asking.of_text(question)
        except BadRow as bad:
            terminal.warn(bad.fault.told)
            return False
        answer = _Answer(TokenText(self.asking.tokenizer, skip_special=True))
        try:
            generate(
                self.opened.bank,
                self.adapter,
                [prompt],
                **self._settings,
                seed=self._seed + len(self.messages),
                on_token=answer.take,
            )
        except KeyboardInterrupt:
            answer.end()
            terminal.say("(stopped)")
        except DataError as error:
            terminal.warn(f"{error} /reset forgets the conversation.")
            return False
        else:
            answer.end()
        self.messages = [*asked, {"role": "assistant", "content": answer.text}]
        return True

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = []

    def switch(self) -> str:
        """Take the adapter off, or put it back; return who answers now."""
        if self.opened.adapter is None:
            return "there is no adapter: the base answers anyway."
        self.adapter = None if self.adapter else self.opened.adapter
        return "the adapter answers." if self.adapter else "the base answers, without the adapter."


class _Answer:
    """An answer on its way to standard output."""

    def __init__(self, pieces: TokenText) -> None:
        self._pieces, self.text = pieces, ""

    def take(self, number: int, token: int) -> None:
        """Print what a token adds."""
        self._print(self._pieces.push(token))

    def end(self) -> None:
        """Print what was held back, and the end of the line."""
        self._print(self._pieces.rest())
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _print(self, text: str) -> None:
        self.text += text
        sys.stdout.write(text)
        sys.stdout.flush()


def _command(talk: Talk, line: str) -> bool:
    """Do what a line with a slash says; return False to leave."""
    word = line.split(maxsplit=1)[0]
    if word in ("/quit", "/exit", "/q"):
        return False
    if word == "/reset":
        talk.reset()
        terminal.say("(forgotten)")
    elif word == "/base":
        terminal.say(f"({talk.switch()})")
    else:
        terminal.say(_HELP if word == "/help" else f"{word} is no command.\n{_HELP}")
    return True


def _lines() -> Iterator[str]:
    """Yield the lines that are typed or piped in; two Ctrl-C in a row leave."""
    if not _at_terminal():
        yield from _piped_lines()
        return
    with contextlib.suppress(ImportError):  # Windows has none
        import readline  # noqa: F401 (importing it gives input() its line editing and history)

    interrupted = False
    while True:
        try:
            line = input("> ")
            line.encode()  # fails where the terminal sent other bytes
        except EOFError:
            terminal.say("")
            return
        except UnicodeError:
            terminal.warn("the line is not UTF-8 text. Type it again.")
            continue
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            terminal.stderr().print(Text("\n(Ctrl-C again, Ctrl-D or /quit leaves)", style="dim"))
            continue
        interrupted = False
        yield line


def _piped_lines() -> Iterator[str]:
    """Yield the lines of standard input, which are UTF-8 whatever the locale says; none where it is closed."""
    for number, line in enumerate(() if sys.stdin is None else sys.stdin.buffer, start=1):
        try:
            yield line.decode().rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise DataError(
                f"standard input, line {number}: must be UTF-8, got the byte 0x{line[error.start]:02x} at place "
                f"{error.start + 1} of the line. Convert it, for example with: iconv -f LATIN1 -t UTF-8"
            ) from None
