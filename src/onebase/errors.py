"""What can go wrong in onebase, as one tree of errors.

    OnebaseError
    |-- ConfigError        (ValueError)    a setting or an argument is wrong
    |-- DataError          (ValueError)    a row or a data file is wrong
    |-- TargetError        (LookupError)   a pattern names no module that an adapter can go on
    |-- FileFormatError    (ValueError)    a file of ours or of PEFT cannot be read as what it claims to be
    |-- ModelError         (LookupError)   a model cannot be found or opened
    |-- MissingExtraError  (ImportError)   an optional part is not installed
    |-- ResumeError                        a run cannot go on from where it stopped
    |-- CapacityError                      memory or disk does not suffice
    |-- VerificationError                  what was made does not do what it was made from
    `-- TrainingError      (RuntimeError)  the training itself failed: NaN, a parameter without a gradient

The second base lets callers that know only Python's own errors catch ours. Every error carries a finished
message: where, what rule, what was found, what to do. `onebase` prints `NAME: MESSAGE` on standard error,
without a traceback, and leaves with `exit_code`: 2 for wrong use or wrong input, 1 for the rest.

Errors that hold several problems are written by `list_problems`, so that they all look alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar


class OnebaseError(Exception):
    """An error with a message that its reader can act on."""

    exit_code: ClassVar[int] = 1


@dataclass(frozen=True)
class Problem:
    """One wrong setting: its place (keys and list positions from the outside in) and the rest of the message."""

    path: tuple[str | int, ...]
    text: str
    unknown: bool = False
    """The key itself is unknown, so that a reader who sees more of the settings may know a better answer."""

    line: int | None = None
    """The line in the settings file, from 1."""

    @property
    def place(self) -> str:
        """The path as users write it: data.train[1].weight."""
        written = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in self.path)
        return written.removeprefix(".")

    def __str__(self) -> str:
        return f"{self.place}: {self.text}" if self.path else self.text


class ConfigError(OnebaseError, ValueError):
    """A setting, a command's argument or a function's argument is wrong; `problems` are set by settings alone."""

    exit_code = 2

    def __init__(self, message: str, problems: Sequence[Problem] = ()) -> None:
        super().__init__(message)
        self.problems = tuple(problems)


class DataError(OnebaseError, ValueError):
    """A data file, or a row in it, cannot be used."""

    exit_code = 2


class TargetError(OnebaseError, LookupError):
    """A pattern matches no module, or one that no adapter can go on."""

    exit_code = 2


class FileFormatError(OnebaseError, ValueError):
    """A file is damaged, unsafe to read, or not in the format its place promises."""

    exit_code = 2


class ModelError(OnebaseError, LookupError):
    """A model cannot be found or opened."""

    exit_code = 2


class MissingExtraError(OnebaseError, ImportError):
    """An optional package is not installed; the message says what to type."""

    exit_code = 2


class ResumeError(OnebaseError):
    """A run cannot be resumed: its settings, data or base are not those it started with."""

    exit_code = 2


class CapacityError(OnebaseError):
    """Memory or disk does not suffice; the message says what would fit."""


class VerificationError(OnebaseError):
    """What was made (a merged model) does not do what it was made from; the message says where they differ.

    `found` is the difference, relative, and `bound` what rounding explains.
    """

    def __init__(self, message: str, *, found: float = float("inf"), bound: float = 0.0) -> None:
        super().__init__(message)
        self.found, self.bound = found, bound


class TrainingError(OnebaseError, RuntimeError):
    """Training failed for a reason that is not wrong input: a NaN, a tensor that never moves."""


def list_problems(where: str, problems: Sequence[str], *, shown: int | None = None) -> str:
    """Return "2 problems in WHERE" and below it one indented line for each problem.

    `shown` is the largest number of problems written out; the others are only counted.
    """
    assert problems, "an error needs at least one problem"
    written = problems if shown is None else problems[:shown]
    lines = [f"{len(problems)} problem{'s' if len(problems) > 1 else ''} in {where}"]
    lines += ["  " + problem.replace("\n", "\n  ") for problem in written]
    if len(written) < len(problems):
        lines.append(f"  ... and {len(problems) - len(written)} more")
    return "\n".join(lines)
