"""Laws of `onebase chat`: the model's own answers, token by token, to a conversation that is remembered or forgotten."""

import os
import subprocess

import pytest

from onebase.measure.generate import generate
from tests.cli.world import Terminal, invoke, model_in, process


@pytest.fixture(scope="module")
def opened(trained):
    from onebase.cli.opening import open_adapter_or_model

    return open_adapter_or_model(str(trained / "run"))


def _answer(opened, adapter, *texts):
    """Return the greedy answer to a conversation, user first, turn by turn."""
    asking = opened.asking()
    messages = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(texts)]
    (ids,) = generate(opened.bank, adapter, [asking.of_messages(messages)], max_new_tokens=8)
    return asking.tokenizer.decode(ids, skip_special_tokens=True)


def _chat(trained, *lines, options=()):
    result = invoke("chat", trained / "run", "--max-new-tokens", 8, *options, stdin="".join(f"{x}\n" for x in lines))
    assert result.exit_code == 0, result.stderr
    return result


def test_lines_of_a_pipe_are_answered_and_only_answers_are_printed(trained, opened):
    first = _answer(opened, opened.adapter, "What is a dog?")
    second = _answer(opened, opened.adapter, "What is a dog?", first, "And a cat?")
    result = _chat(trained, "What is a dog?", "", "And a cat?")
    assert result.stdout == f"{first}\n{second}\n"
    assert result.stderr == ""


def test_a_conversation_can_be_forgotten(trained, opened):
    first, second = (_answer(opened, opened.adapter, text) for text in ("What is a dog?", "And a cat?"))
    assert _chat(trained, "What is a dog?", "/reset", "And a cat?").stdout == f"{first}\n{second}\n"


def test_the_adapter_can_be_switched_off_and_on(trained, opened):
    question = "Define the noun dog."
    own, base = _answer(opened, opened.adapter, question), _answer(opened, None, question)
    assert own != base
    result = _chat(trained, question, "/reset", "/base", question, "/reset", "/base", question)
    assert result.stdout == f"{own}\n{base}\n{own}\n"
    assert "the base answers" in result.stderr and "the adapter answers" in result.stderr


def test_nothing_after_quit_is_answered(trained):
    assert _chat(trained, "/quit", "What is a dog?").stdout == ""


def test_an_unknown_command_is_no_question(trained):
    result = _chat(trained, "/nonsense", "/help")
    assert result.stdout == ""
    assert "/nonsense is no command" in result.stderr and result.stderr.count("/reset") == 2


def test_a_model_can_be_talked_to_without_an_adapter(trained, opened):
    result = invoke("chat", trained / "model", "--max-new-tokens", 8, stdin="What is a dog?\n/base\n")
    assert result.stdout == _answer(opened, None, "What is a dog?") + "\n"
    assert "there is no adapter" in result.stderr


def test_a_question_that_is_too_long_does_not_end_the_conversation(trained, opened):
    words = ["chat", trained / "run", "--max-new-tokens", 8]
    result = invoke(*words, stdin="\n" + "dog " * 300 + "\nWhat is a dog?\n")
    assert result.exit_code == 2
    assert "at most 256" in result.stderr and "line 2: 1 question without an answer" in result.stderr
    assert result.stdout == _answer(opened, opened.adapter, "What is a dog?") + "\n"


def test_bytes_that_are_not_utf8_are_named_by_their_line_after_the_answers_before_it(trained, opened):
    result = invoke("chat", trained / "run", "--max-new-tokens", 8, stdin=b"What is a dog?\r\ncaf\xe9\n")
    assert result.exit_code == 2
    assert "standard input, line 2: must be UTF-8, got the byte 0xe9 at place 4" in result.stderr
    assert result.stdout == _answer(opened, opened.adapter, "What is a dog?") + "\n"


def test_letters_of_any_alphabet_are_read_as_utf8_in_any_locale(trained, opened):
    child = process(trained, "chat", "run", "--max-new-tokens", 8, stdin=subprocess.PIPE, env={"LC_ALL": "POSIX"})
    said, told = child.communicate("caf\u00e9\n", timeout=240)
    assert child.returncode == 0, told
    assert said.rstrip("\n") == _answer(opened, opened.adapter, "caf\u00e9").rstrip("\n")


def test_a_closed_standard_input_is_the_end_of_the_questions(trained):
    child = process(trained, "chat", "run", preexec_fn=lambda: os.close(0))
    said, told = child.communicate(timeout=240)
    assert (child.returncode, said, told) == (0, "", "")


@pytest.mark.slow
def test_ctrl_c_stops_an_answer_and_twice_leaves(tmp_path):
    model_in(tmp_path / "model", max_position_embeddings=100_000)
    terminal = Terminal(tmp_path, "chat", "./model", "--max-new-tokens", "90000")
    terminal.wait_for("> ")
    terminal.type("What is a dog?\n")
    terminal.wait_for("What is a dog?\r\n")  # the terminal's own echo; the answer of a random model goes on and on
    terminal.wait_for_more(20)
    terminal.type("\x03")
    terminal.wait_for("(stopped)")
    terminal.wait_for("> ")
    terminal.type("/reset\n")
    terminal.wait_for("(forgotten)")
    terminal.wait_for("> ")
    terminal.press_ctrl_c()
    terminal.wait_for("Ctrl-C again")
    terminal.wait_for("> ")
    terminal.press_ctrl_c()
    assert terminal.process.wait(timeout=30) == 130


@pytest.mark.slow
def test_the_end_of_the_input_leaves(trained):
    terminal = Terminal(trained, "chat", "run")
    terminal.wait_for("> ")
    terminal.type("\x04")
    assert terminal.process.wait(timeout=30) == 0
