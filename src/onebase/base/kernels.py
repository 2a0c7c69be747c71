"""Compiling the C sources of ops/ for the processor at hand: once a machine, two seconds, kept in the cache folder.

They are files of loops without headers of torch or Python, so any C compiler of this system does and no version of torch is bound.
It runs on torch's own OpenMP threads: the library names no runtime of its own, and its calls are bound to the one that
torch has loaded. Where that does not work (no compiler, another system) everything computes as torch does, and why
is said.
"""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

from onebase.base.cache import build_once, home
from onebase.errors import CapacityError, ModelError
from onebase.ops import native

_SOURCES = {
    "kernels.c": "-ffp-contract=off",
    "low_rank.c": "-ffp-contract=fast",
    "attention.c": "-ffp-contract=off",
}  # why: in their first lines
_NAME, _HASH = "kernels.so", "kernels.sha256"
_COMPILE = (
    "-std=c11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-fPIC",
)  # fmt: skip
_LONGEST_SECONDS = 60


@cache
def use_kernels() -> str:
    """Let this process compute with the compiled kernels, and return why it cannot; "" where it does."""
    try:
        named = shlex.split(os.environ.get("CC", "")) or ["gcc" if shutil.which("gcc") else "cc"]
    except ValueError as error:
        return f"CC is {os.environ['CC']!r}, which is no command ({error})"
    program = shutil.which(named[0])
    if sys.platform != "linux":
        return f"the compiled kernels are made on Linux alone, this is {sys.platform}"
    if program is None:
        return f"there is no C compiler {named[0]} (install gcc, or name another one in CC)"
    compiler = [program, *named[1:]]
    try:
        folder = _folder(compiler)
        if not _use(_built(compiler, folder)):  # damaged, in a way that its seal does not show
            shutil.rmtree(folder)
            if not _use(_built(compiler, folder)):
                return f"what {program} makes of the kernels cannot be loaded here"
    except (CapacityError, ModelError) as error:  # of the cache folder
        return str(error)
    except subprocess.TimeoutExpired:
        return f"{program} did not end within {_LONGEST_SECONDS} s"
    except subprocess.CalledProcessError as error:
        lines = [line.strip() for line in str(error.stderr).splitlines() if line.strip()] or [str(error)]
        return f"{program} failed: {next((line for line in lines if 'error' in line), lines[0])}"
    except OSError as error:
        return str(error)
    return ""


def _use(folder: Path) -> bool:
    """Let this process compute with a folder's library, if it is the one that was made there and loads."""
    library = folder / _NAME
    if hashlib.sha256(library.read_bytes()).hexdigest() != (folder / _HASH).read_text(encoding="utf-8"):
        return False
    try:
        native.use(library)
    except (OSError, AttributeError):  # no library, or one without these functions
        return False
    return True


def _built(compiler: list[str], folder: Path) -> Path:
    return build_once(folder, partial(_build, compiler))


def _build(compiler: list[str], folder: Path) -> None:
    objects, library = [folder / f"{name}.o" for name in _SOURCES], folder / _NAME
    for (name, rounding), made in zip(_SOURCES.items(), objects, strict=True):
        _run([*compiler, *_COMPILE, rounding, "-c", str(_path(name)), "-o", str(made)])
    _run([*compiler, "-shared", *map(str, objects), "-o", str(library)])
    for made in objects:
        made.unlink()
    (folder / _HASH).write_text(hashlib.sha256(library.read_bytes()).hexdigest(), encoding="utf-8")


def _path(name: str) -> Path:
    return Path(native.__file__).with_name(name)


def _run(words: list[str]) -> str:
    done = subprocess.run(
        words, check=True, capture_output=True, encoding="utf-8", errors="replace", timeout=_LONGEST_SECONDS,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.stdout


def _folder(compiler: list[str]) -> Path:
    """Return where the library for these sources, compiler and processor lies: a cache may be shared by machines."""
    said = _run([*compiler, "--version"])
    sources = [
        part for name, rounding in _SOURCES.items() for part in (_path(name).read_text(encoding="utf-8"), rounding)
    ]
    parts = [*sources, *_COMPILE, *compiler, said, platform.machine(), _processor()]
    return home() / "kernels" / hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Return what the first processor of this machine says of itself: its model and its instructions."""
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0].splitlines()
    return "\n".join(
        line for line in lines if line.split(":")[0].strip() in {"model name", "flags", "Features", "CPU part"}
    )
