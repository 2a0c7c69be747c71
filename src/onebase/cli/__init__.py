"""The command line: talks to people, and does no work of its own.

Imported first of all by the command, whose other imports take a moment: until `main` runs, Ctrl-C leaves at once and
without a traceback. A program that only imports this package keeps its own handling of Ctrl-C.
"""

import os
import signal
import sys
from types import FrameType


def _is_the_command() -> bool:
    """Return whether this process is `onebase` or `python -m onebase`."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    name = os.path.basename(sys.argv[0]) if sys.argv else ""  # noqa: PTH119 (pathlib would be one more import)
    return name in ("onebase", "onebase.exe") or getattr(spec, "name", None) == "onebase.__main__"


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)  # nothing was opened yet, and an import may swallow an exception


def raise_on_sigint() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again, which the verbs report."""
    if signal.getsignal(signal.SIGINT) is _leave:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if _is_the_command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _leave)
