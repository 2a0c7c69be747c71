"""The cache folder, and how a folder in it is built: once, by one process at a time, whole or not at all.

A model's folder is built beside its final place under a temporary name, synced, sealed with a list of its files and
their sizes, and renamed. So a folder under its final name is whole, or was damaged later, which the seal shows. A
build that is killed leaves a `.NAME.PID.partial` folder, which the next build removes.

Called by packages.py and pretrained.py (building) and fingerprint.py (where). Imports no torch.
"""

import errno
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from onebase.errors import CapacityError, ModelError

Say = Callable[[str], None]

SEAL_NAME = "onebase-seal.json"
SEAL_FORMAT = 1
"""Raised when conversion itself changes, so that folders built the old way are built again."""


def say_on_stderr(text: str) -> None:
    """Write one line on standard error: how a long wait explains itself where nobody else does it."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def home() -> Path:
    """Return the cache folder: `ONEBASE_HOME`, or `onebase` in the user's cache folder (`XDG_CACHE_HOME`, ~/.cache)."""
    if named := os.environ.get("ONEBASE_HOME"):
        return Path(named).expanduser().absolute()
    user_cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(user_cache) if user_cache else Path.home() / ".cache") / "onebase"


def is_whole(folder: Path) -> bool:
    """Return whether the folder was sealed, and holds every file of its seal at the size it had then."""
    try:
        seal = json.loads((folder / SEAL_NAME).read_text(encoding="utf-8"))
        if seal["format"] != SEAL_FORMAT:
            return False
        return all((folder / name).stat().st_size == size for name, size in seal["size_bytes"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def build_once(folder: Path, build: Callable[[Path], None], *, say: Say = say_on_stderr) -> Path:
    """Return `folder`, after `build` has filled it if it is not there whole.

    `build` gets an empty folder under a temporary name. When it raises, nothing is left.

    Raises:
        CapacityError: the disk is full.
        ModelError: the cache folder cannot be written.
    """
    if is_whole(folder):
        return folder
    with explained_write_errors(folder.parent), locked(folder, say=say):
        if is_whole(folder):  # another process built it while this one waited
            return folder
        if folder.exists():
            say(f"{folder} is not whole, or from an older version: building it again")
        for left_over in folder.parent.glob(f".{folder.name}.*.partial"):
            shutil.rmtree(left_over, ignore_errors=True)
        partial = folder.parent / f".{folder.name}.{os.getpid()}.partial"
        partial.mkdir()
        try:
            build(partial)
            _seal(partial)
            if folder.exists():
                shutil.rmtree(folder)
            partial.replace(folder)
            _sync(folder.parent)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return folder


@contextmanager
def locked(path: Path, *, say: Say = say_on_stderr) -> Iterator[None]:
    """Hold the lock that belongs to `path`; the system frees it when its holder dies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.parent / f".{path.name}.lock")
    try:
        lock.acquire(timeout=1)
    except Timeout:
        say(f"waiting for another process that prepares {path.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextmanager
def explained_write_errors(folder: Path, variable: str = "ONEBASE_HOME") -> Iterator[None]:
    """Turn what the system says about a full disk, or a folder it may not write, into errors of ours.

    `variable` is the environment variable that moves the folder.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in {errno.ENOSPC, errno.EDQUOT}:
            raise CapacityError(
                f"{folder}: the disk is full ({reason}). Free some space, or set {variable} to a folder on another disk."
            ) from error
        if error.errno in {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST}:
            raise ModelError(
                f"{folder}: the cache folder cannot be written ({reason}). "
                f"Set {variable} to a folder that can, or change its permissions."
            ) from error
        raise


def write_atomically(path: Path, text: str) -> None:
    """Write `text` under a temporary name beside `path`, then rename: a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        _sync(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _seal(folder: Path) -> None:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    for path in files:
        _sync(path)
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    seal = folder / SEAL_NAME
    seal.write_text(json.dumps({"format": SEAL_FORMAT, "size_bytes": sizes}, indent=1) + "\n", encoding="utf-8")
    _sync(seal)
    _sync(folder)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
