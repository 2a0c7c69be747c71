"""Compiling ops/kernels.c for the processor at hand: once a machine, half a second, kept in the cache folder.

It is a file of loops without headers of torch or Python, so any C compiler of this system does and no version of torch is bound.
It runs on torch's own OpenMP threads: the library names no runtime of its own, and its calls are bound to the one that
torch has loaded. Where that does not work (no compiler, another system) everything computes as torch does, and why
is said.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from onebase.base.cache import build_once, home
from onebase.errors import CapacityError, ModelError
from onebase.ops import native

_SOURCE = Path(native.__file__).with_name("kernels.c")
_NAME = "kernels.so"
_COMPILE = (
    "-std=c11", "-O3", "-march=native", "-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC",
)  # fmt: skip
_LONGEST_SECONDS = 120


@cache
def use_kernels() -> str:
    """Let this process compute with the compiled kernels, and return why it cannot; "" where it does."""
    compiler = shutil.which(os.environ.get("CC") or "gcc") or shutil.which("cc")
    if sys.platform != "linux":
        return f"the compiled kernels are made on Linux alone, this is {sys.platform}"
    if compiler is None:
        return "no C compiler was found (gcc, or the one that CC names)"
    try:
        native.use(build_once(_folder(compiler), lambda folder: _build(compiler, folder)) / _NAME)
    except (CapacityError, ModelError) as error:  # of the cache folder
        return str(error)
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        return f"{compiler} made no kernels that run here: {(said.strip() or repr(error)).splitlines()[0]}"
    return ""


def _build(compiler: str, folder: Path) -> None:
    objects = folder / "kernels.o"
    for command in (
        [*_COMPILE, "-c", str(_SOURCE), "-o", str(objects)],
        ["-shared", str(objects), "-o", str(folder / _NAME)],
    ):
        subprocess.run(
            [compiler, *command],
            check=True,
            capture_output=True,
            text=True,
            timeout=_LONGEST_SECONDS,
            stdin=subprocess.DEVNULL,
        )
    objects.unlink()


def _folder(compiler: str) -> Path:
    """Return where the library for this source, compiler and processor lies: a cache may be shared by machines."""
    version = subprocess.run(
        [compiler, "--version"], check=True, capture_output=True, text=True, timeout=_LONGEST_SECONDS
    )
    parts = [_SOURCE.read_text(encoding="utf-8"), " ".join(_COMPILE), version.stdout, platform.machine(), _processor()]
    return home() / "kernels" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Return what the first processor of this machine says of itself: its model and its instructions."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return "\n".join(
        line for line in lines if line.split(":")[0].strip() in {"model name", "flags", "Features", "CPU part"}
    )
