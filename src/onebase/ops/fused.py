"""Elementwise functions of tensors that run as one pass over memory, compiled once a process.

A function marked `fused` is plain torch and its own reference. After `compile_fused(True)` the same function runs as
torch's compiler writes it: without temporaries, for any number of rows. That is a setting of the process, as the number
of threads is; compiled code may round its last bit elsewhere, so a run keeps what it began with. Compiling takes
seconds, and less when torch finds its own cache on disk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")


class _Process:
    """Whether fused functions run compiled in this process."""

    compiled = False


def compile_fused(enabled: bool) -> None:
    """Let fused functions run compiled, or as they are written, from now on."""
    _Process.compiled = enabled


def fused_are_compiled() -> bool:
    """Return whether fused functions run compiled."""
    return _Process.compiled


def fused(function: Callable[P, R]) -> Callable[P, R]:
    """Return the function as it runs: as written, or compiled for any number of rows.

    Raises (when called): torch's error where a graph cannot be compiled as one, or is compiled again too often.
    """
    compiled: Callable[P, R] = torch.compile(function, dynamic=True, fullgraph=True)

    @wraps(function)
    def run(*args: P.args, **named: P.kwargs) -> R:
        return (compiled if _Process.compiled else function)(*args, **named)

    return run
