"""How a verb fails: one line that says what to do, the exit code, and a traceback only where somebody asks for it.

0 is success; 1 a failure; 2 wrong use or wrong input; 130 after Ctrl-C, 143 after SIGTERM and 129
after a closed terminal.
"""

import errno
import functools
import os
import signal
import traceback
from collections.abc import Callable
from types import FrameType
from typing import ParamSpec

import typer
from rich.text import Text

from onebase.cli import terminal
from onebase.config.paths import no_path
from onebase.errors import OnebaseError

P = ParamSpec("P")

DEBUG_VARIABLE = "ONEBASE_DEBUG"
INTERRUPTED = 128 + signal.SIGINT
TERMINATED = 128 + signal.SIGTERM

_debug = False


def show_tracebacks(wanted: bool) -> None:
    """Choose whether errors of this command show their tracebacks."""
    global _debug  # noqa: PLW0603 (the one option that stands before every verb)
    _debug = wanted


def reported(verb: Callable[P, None]) -> Callable[P, None]:
    """Return a verb whose errors become a line on standard error and an exit code."""

    @functools.wraps(verb)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            verb(*args, **kwargs)
        except (typer.Exit, typer.Abort, typer.BadParameter, BrokenPipeError):
            raise
        except OnebaseError as error:
            stopped = error.exit_code > 128  # it was asked to stop, and did: no error to be named
            _explain(error, "" if stopped else type(error).__name__, str(error))
            raise typer.Exit(error.exit_code) from None
        except KeyboardInterrupt as error:
            _explain(error, "Interrupted", "")
            raise typer.Exit(INTERRUPTED) from None
        except Exception as error:  # noqa: BLE001 (whatever it is, the user gets a line and an exit code)
            name, message, exit_code = _unexpected(error)
            _explain(error, name, message)
            raise typer.Exit(exit_code) from None

    return run


def _unexpected(error: Exception) -> tuple[str, str, int]:
    """Return the name, the words and the exit code for an error that is none of ours."""
    lines = str(error).strip().splitlines() or ["no message"]
    name = type(error).__name__
    if isinstance(error, MemoryError) or name == "OutOfMemoryError" or "can't allocate memory" in lines[0]:
        return "CapacityError", f"memory ran out ({lines[0]}). Free some, or choose a smaller model or batch.", 1
    if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # whatever the verb did, the user named it
        refusal = no_path(str(error.filename), error)
        return type(refusal).__name__, str(refusal), refusal.exit_code
    if isinstance(error, OSError):
        return name, f"{error}. Check the path and the disk; --debug shows where it happened.", 1
    hint = f"run the command again with --debug (or {DEBUG_VARIABLE}=1) for the traceback to report."
    return name, f"{lines[0][:300]} -- this is a bug in onebase: {hint}", 1


def _explain(error: BaseException, name: str, message: str) -> None:
    if _debug:
        traceback.print_exception(error)
    said = Text.assemble((name, "bold red"), ": " if name and message else "", message)
    terminal.stderr().print(said, soft_wrap=True)


def leave_on_sigterm() -> None:
    """Let SIGTERM end the process with its exit code, and everything that was opened be closed on the way."""
    if hasattr(signal, "SIGTERM"):
        signal.signal(signal.SIGTERM, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    raise SystemExit(TERMINATED)


def debug_from_environment() -> bool:
    """Return whether ONEBASE_DEBUG asks for tracebacks."""
    return os.environ.get(DEBUG_VARIABLE, "").lower() not in {"", "0", "false", "no", "off"}
