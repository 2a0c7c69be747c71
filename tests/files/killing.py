"""Run an action in a child process that dies, as by kill -9, before one of its operations on the file system."""

import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

_KILLED = 137
_OPERATIONS = {"open", "os.mkdir", "os.remove", "os.rename", "os.rmdir"}


def killed_everywhere(root: Path, prepare: Callable[[], None], action: Callable[[], object]) -> Iterator[int]:
    """Yield after the action died before its 1st, 2nd, ... operation under `root`, each time prepared afresh.

    It ends when the action outlives its child, and fails if the action raises.
    """
    number = 0
    while True:
        number += 1
        prepare()
        if not _dies(root, action, number):
            assert number > 3, "the action does too little to be killed in between"
            return
        yield number


def _dies(root: Path, action: Callable[[], object], number: int) -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # fork beside threads: the child only writes files
        child = os.fork()
    if child == 0:
        status = 1
        try:
            _die_before(root, number)
            action()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    code = os.waitstatus_to_exitcode(status)
    assert code in (0, _KILLED), f"the action failed in its child: {code}"
    return code == _KILLED


def _die_before(root: Path, number: int) -> None:
    """Count the operations of this process that change something under `root`, and die before one of them."""
    seen = 0

    def count() -> None:
        nonlocal seen
        seen += 1
        if seen == number:
            os._exit(_KILLED)

    def on_event(event: str, arguments: tuple[object, ...]) -> None:
        if event in _OPERATIONS and (event != "open" or str(arguments[0]).startswith(str(root))):
            count()

    sync = os.fsync

    def counted_sync(handle: int) -> None:
        count()
        sync(handle)

    os.fsync = counted_sync  # type: ignore[assignment]
    sys.addaudithook(on_event)
