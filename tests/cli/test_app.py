"""Laws of the command line as a whole: help at once and with examples, exit codes, usage errors."""

import re
import resource
import subprocess
import sys
from typing import Any

import pytest
import typer

import onebase
from onebase.cli.app import app
from tests.cli.world import invoke


def _commands():
    """Return the words of every verb, those inside others too."""
    found = []

    def walk(command, words):
        inner = getattr(command, "commands", {})
        for name, verb in inner.items():
            found.append([*words, name])
            walk(verb, [*words, name])

    walk(typer.main.get_command(app), [])
    return found


COMMANDS = _commands()


def test_the_verbs_are_those_that_are_promised():
    assert [" ".join(words) for words in COMMANDS] == [
        "train",
        "eval",
        "chat",
        "predict",
        "merge",
        "verify",
        "export",
        "lint",
        "preview",
        "targets",
        "runs",
        "schema",
        "models",
        "models fetch",
    ]


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_verb_has_a_help_with_an_example_of_itself(words):
    result = invoke(*words, "--help")
    assert result.exit_code == 0
    examples = re.findall(r"^ *onebase (.+?) *$", result.stdout.partition("Example")[2], re.M)
    assert examples
    assert all(example.split()[: len(words)] == words for example in examples)


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_in_80_columns_no_name_of_an_option_is_cut_and_no_paragraph_breaks_early(words, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    shown = invoke(*words, "--help").stdout
    command: Any = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]
    names = [name for option in command.params for name in option.opts if name.startswith("--")]
    assert names and all(re.search(rf"{name}(?![\w-])", shown) for name in names), shown
    assert "\u2026" not in shown
    for paragraph in (command.help or "").split("\n\n"):
        assert "\n" not in paragraph.strip()


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_option_is_explained(words):
    command = typer.main.get_command(app)
    for word in words:
        command = command.commands[word]  # type: ignore[attr-defined]
    silent = [p.name for p in command.params if not getattr(p, "help", None)]
    assert not silent


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"]], ids=" ".join)
def test_help_and_version_come_at_once_and_without_torch(words):
    code = f"""
import sys
sys.argv = ["onebase", *{words!r}]
from onebase.cli.app import main
try:
    main()
finally:
    heavy = {{"torch", "transformers", "datasets", "numpy"}} & set(sys.modules)
    assert not heavy, heavy
"""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=240)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    if words[0] in ("--help", "--version"):  # processor time: the machine has other work
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_the_version_is_printed():
    assert invoke("--version").stdout == f"onebase {onebase.__version__}\n"


@pytest.mark.parametrize(
    "words",
    [
        ["nonsense"],
        ["train"],
        ["train", "run.yaml"],
        ["schema", "--nonsense"],
        ["predict", "x", "--data", "y", "--temperature", "-1"],
    ],
    ids=" ".join,
)
def test_wrong_use_exits_with_2_and_says_what_is_wrong(words):
    result = invoke(*words)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error" in result.stderr


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "onebase", "--version"], capture_output=True, text=True, check=False, timeout=240
    )
    assert done.stdout == f"onebase {onebase.__version__}\n"


_INTERRUPTED_IMPORT = """
import os, signal, sys

class Interrupting:
    def find_spec(self, name, path=None, target=None):
        if name == "typer":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupting())
sys.argv[0] = {name!r}
from onebase.cli.app import main
"""


def test_ctrl_c_while_the_command_is_imported_leaves_without_a_word():
    words = [sys.executable, "-c", _INTERRUPTED_IMPORT.format(name="/somewhere/bin/onebase")]
    found = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert (found.returncode, found.stdout, found.stderr) == (130, "", "")


def test_a_program_that_imports_the_command_keeps_its_own_ctrl_c():
    words = [sys.executable, "-c", _INTERRUPTED_IMPORT.format(name="mine.py")]
    found = subprocess.run(words, capture_output=True, text=True, timeout=240)
    assert "KeyboardInterrupt" in found.stderr
