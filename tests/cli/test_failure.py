"""Laws of failing: a user's mistake is one message without a traceback; our own says that it is ours."""

import errno
import signal

import pytest
import typer
from typer.testing import CliRunner

from onebase import errors
from onebase.cli import failure
from onebase.train.stop import Stopped
from tests.cli.world import invoke, process

OURS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.OnebaseError)]


def _run(error, *options):
    """Return what a verb that raises `error` prints."""
    app = typer.Typer()

    @app.callback()
    def options_of_all(debug: bool = False) -> None:
        failure.show_tracebacks(debug)

    def verb() -> None:
        raise error

    app.command("verb")(failure.reported(verb))
    return CliRunner().invoke(app, [*options, "verb"])


@pytest.mark.parametrize("kind", OURS, ids=lambda kind: kind.__name__)
def test_an_error_of_ours_is_its_name_and_message_and_its_exit_code(kind):
    message = "run.yaml: [adapter.r] must be at least 1, got 0.\n  second line"
    result = _run(kind(message))
    assert result.exit_code == kind.exit_code
    assert result.stderr == f"{kind.__name__}: {message}\n"
    assert result.stdout == ""


@pytest.mark.parametrize("kind", [errors.ConfigError, ZeroDivisionError, KeyboardInterrupt])
def test_debug_shows_the_traceback_besides(kind):
    result = _run(kind("what went wrong"), "--debug")
    assert "Traceback (most recent call last)" in result.stderr
    assert "raise error" in result.stderr
    assert result.exit_code == _run(kind("what went wrong")).exit_code


def test_an_error_that_nobody_expected_is_called_a_bug_in_one_line():
    result = _run(ZeroDivisionError("division by zero\nmore"))
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1
    assert "ZeroDivisionError: division by zero" in result.stderr
    assert "bug" in result.stderr and "--debug" in result.stderr


TOO_LONG = "x" * 300


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "run.yaml", "--out", TOO_LONG],
        ["train", "run.yaml", "--out", TOO_LONG, "--resume"],
        ["train", "run.yaml", "--out", "out", "--set", f"model={TOO_LONG}"],
        ["eval", TOO_LONG, "--data", "rows.jsonl"],
        ["chat", TOO_LONG],
        ["predict", TOO_LONG, "--data", "rows.jsonl"],
        ["targets", TOO_LONG],
        ["runs", TOO_LONG],
    ],
    ids=lambda arguments: " ".join(arguments).replace(TOO_LONG, "LONG"),
)
def test_a_path_that_no_file_system_holds_is_wrong_use(tmp_path, monkeypatch, arguments):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("model: smollm2-135m-instruct\ndata: {train: rows.jsonl}\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert "ConfigError: " in result.stderr and "File name too long" in result.stderr


def test_the_system_refusing_something_is_no_bug():
    result = _run(PermissionError(errno.EACCES, "Permission denied", "/x"))
    assert result.exit_code == 1
    assert "/x" in result.stderr and "is a bug" not in result.stderr


def test_memory_that_ran_out_is_told_as_such():
    result = _run(MemoryError("Unable to allocate 9 GiB"))
    assert result.exit_code == 1
    assert result.stderr.startswith("CapacityError: memory ran out (Unable to allocate 9 GiB)")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_training_that_was_stopped_exits_as_the_signal_says(number):
    result = _run(Stopped("stopped after step 3", number))
    assert result.exit_code == 128 + number
    assert result.stderr == "stopped after step 3\n"


def test_ctrl_c_exits_with_130():
    assert _run(KeyboardInterrupt()).exit_code == 130


@pytest.mark.parametrize("where", ["before", "after", "environment"])
def test_debug_may_stand_anywhere(tmp_path, where):
    words = ["train", "no.yaml", "--out", "x"]
    words = {"before": ["--debug", *words], "after": [*words, "--debug"], "environment": words}[where]
    env = {failure.DEBUG_VARIABLE: "1"} if where == "environment" else {}
    running = process(tmp_path, *words, env=env)
    _, err = running.communicate(timeout=240)
    assert running.returncode == 2
    assert "Traceback" in err and err.rstrip().splitlines()[-1].startswith("ConfigError: no.yaml")


def test_without_debug_there_is_no_traceback(tmp_path):
    result = invoke("train", tmp_path / "no.yaml", "--out", tmp_path / "x")
    assert result.exit_code == 2
    assert result.stderr.startswith("ConfigError: ")
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "x").exists()
