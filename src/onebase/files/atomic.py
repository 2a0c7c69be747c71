"""Files and folders that are written whole or not at all.

A crash at any moment, kill -9 and a power cut included, leaves the old content or the new one, complete. New content
goes to a hidden name beside its target, `.NAME.onebase-PID.new`, is synced to the disk with its folder, and is renamed.
A file replaces a file in one rename. A folder cannot: the old one moves to `.NAME.onebase-PID.old`, the new one takes
its place, the old one is deleted; `recover` puts it back when a crash fell in between. `recover` and `clean` also
delete what crashed writes left behind. Whatever a process that still runs is writing is left alone.

Errors of the file system become errors that name the path, what was being written, what is still there and what to do.
Everything in this room writes through here. No torch.
"""

import contextlib
import errno
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from onebase.errors import CapacityError, ConfigError, OnebaseError

Content = TypeVar("Content")
_LEFTOVER = re.compile(r"\.(?P<name>.+)\.onebase-(?P<pid>\d+)\.(?P<kind>new|old|gone)")
_FULL = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too large",
}
_REFUSED = {
    errno.EROFS: "the file system is read-only",
    errno.EACCES: "permission denied",
    errno.EPERM: "the operation is not permitted",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "the path is a folder, not a file",
    errno.EEXIST: "a file of that name is in the way",
    errno.ENAMETOOLONG: "the name is too long",
    errno.ELOOP: "the path has too many symbolic links",
}
_ATTEMPTS = 10
_SWAP_SECONDS = 1.0  # far longer than the two renames of a folder's replacement

_in_progress: set[str] = set()  # the hidden names that this process is writing now


@contextlib.contextmanager
def reporting(path: Path, writing: str, kept: str = "") -> Iterator[None]:
    """Turn the file system's errors while `writing` (a noun) at `path` into onebase's; `kept` says what is still there.

    Raises:
        CapacityError: the disk, the quota or the largest file size is used up.
        ConfigError: the place cannot be written to.
        OnebaseError: anything else that the file system reports.
    """
    try:
        yield
    except OSError as error:
        where = f"{path}: cannot write {writing}"
        kept = f" {kept}" if kept else ""
        number = error.errno or 0
        if number in _FULL:
            todo = "Free some space, or choose a folder on another disk, and run the command again."
            raise CapacityError(f"{where}: {_FULL[number]}.{kept} {todo}") from error
        if number in _REFUSED:
            todo = "Choose a folder that you may write to."
            raise ConfigError(f"{where}: {_REFUSED[number]} ({error.filename or path}).{kept} {todo}") from error
        todo = "Check the disk and the path, and run the command again."
        raise OnebaseError(f"{where}: {error.strerror or error}.{kept} {todo}") from error


def write_file(path: Path, data: bytes | str, *, writing: str, kept: str = "") -> None:
    """Put `data` (text as UTF-8) at `path`, in place of the file that may be there, in one rename."""
    path = Path(os.path.realpath(path))
    hidden = _hidden(path, "new")
    with reporting(path, writing, kept or _still_there(path)), _working_on(hidden):
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_wrong_kind(path, folder=False)
        write_synced(hidden, data)
        hidden.replace(path)
        sync_folder(path.parent)


@contextlib.contextmanager
def new_file(path: Path, *, writing: str) -> Iterator[Path]:
    """Yield a hidden name for a library to write a file to; when the block ends well it becomes `path`, in one rename."""
    path = Path(os.path.realpath(path))
    hidden = _hidden(path, "new")
    with reporting(path, writing, _still_there(path)), _working_on(hidden):
        path.parent.mkdir(parents=True, exist_ok=True)
        _refuse_wrong_kind(path, folder=False)
        yield hidden
        with hidden.open("rb") as file:
            os.fsync(file.fileno())
        hidden.replace(path)
        sync_folder(path.parent)


@contextlib.contextmanager
def new_folder(target: Path, *, writing: str, kept: str = "") -> Iterator[Path]:
    """Yield an empty folder to fill; when the block ends well it becomes `target`, in place of the one there."""
    target = Path(os.path.realpath(target))
    hidden = _hidden(target, "new")
    with reporting(target, writing, kept or _still_there(target)), _working_on(hidden):
        target.parent.mkdir(parents=True, exist_ok=True)
        _refuse_wrong_kind(target, folder=True)
        recover(target)
        _discard(hidden)
        hidden.mkdir()
        yield hidden
        _sync_tree(hidden)
        _put_in_place(hidden, target)


@contextlib.contextmanager
def scratch_folder(kind: str) -> Iterator[Path]:
    """Yield an empty folder among the system's temporary ones, deleted afterwards; what dead processes left goes first.

    `kind` is a word that the names of its like begin with. Those of other users are left alone.
    """
    place = Path(os.path.realpath(tempfile.gettempdir()))
    for path in place.glob(f".{kind}-*"):
        found = _LEFTOVER.fullmatch(path.name)
        with contextlib.suppress(FileNotFoundError):
            if found is not None and path.lstat().st_uid == os.getuid():
                recover(place / found["name"])
    with reporting(place, "temporary files"):
        folder = Path(tempfile.mkdtemp(prefix=f".{kind}-", suffix=f".onebase-{os.getpid()}.new", dir=place))
    with _working_on(folder):
        yield folder
        _discard(folder)


def remove_folder(target: Path) -> None:
    """Delete a folder so that no crash leaves a part of it under its name."""
    with reporting(target, "a shorter list of folders"):
        _remove(Path(os.path.realpath(target)))


def recover(target: Path) -> None:
    """Put `target` back if a crash interrupted its replacement, and delete what crashed writes left beside it."""
    target = Path(os.path.realpath(target))
    _clean(target.parent, only=target.name)


def clean(parent: Path) -> None:
    """Do what `recover` does for every name in a folder."""
    _clean(Path(os.path.realpath(parent)), only=None)


def is_leftover(path: Path) -> bool:
    """Return whether a name is one that a write has while it is under way, or left behind."""
    return _LEFTOVER.fullmatch(path.name) is not None


def read_steadily(folder: Path, read: Callable[[], Content]) -> Content:
    """Return read(), repeated if another process replaced the folder meanwhile: never a mixture of two versions."""
    for _ in range(_ATTEMPTS - 1):
        recover(folder)
        before = _identity(folder)
        if before is None:
            continue
        try:
            content = read()
        except (OnebaseError, OSError):
            if _identity(folder) == before:
                raise
        else:
            if _identity(folder) == before:
                return content
    return read()


def ensure_writable(path: Path, needed_bytes: int, *, writing: str) -> None:
    """Check before the work that `path` (which need not exist yet) can be written to and has `needed_bytes` free.

    A quota is not seen here, only the free space of the disk.

    Raises:
        ConfigError: `path`, or the first folder above it that exists, is no folder or cannot be written to.
        CapacityError: the disk has too little free space.
    """
    place = Path(os.path.realpath(path))
    while not place.exists() and place != place.parent:
        place = place.parent
    probe = place / f".probe.onebase-{os.getpid()}.new"
    with reporting(path, writing):
        if not place.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(place))
        with _working_on(probe):
            write_synced(probe, b"x")
            probe.unlink()
        free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise CapacityError(
            f"{path}: {writing} needs about {_megabytes(needed_bytes)}, the disk has {_megabytes(free)} free. "
            "Free some space, or choose a folder on another disk."
        )


def write_synced(path: Path, data: bytes | str) -> None:
    """Write `data` (text as UTF-8) to `path` and wait until the disk has it. No rename: for files in a new folder."""
    with path.open("wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names in a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # some network file systems cannot sync a folder
            raise
    finally:
        os.close(handle)


def _hidden(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.onebase-{os.getpid()}.{kind}")


@contextlib.contextmanager
def _working_on(hidden: Path) -> Iterator[None]:
    """Keep `clean` away from a hidden name while it is written, and leave nothing of it if the write fails."""
    _in_progress.add(str(hidden))
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            _discard(hidden)
        raise
    finally:
        _in_progress.discard(str(hidden))


def _refuse_wrong_kind(path: Path, *, folder: bool) -> None:
    """Refuse to put a folder where a file is, and a file where a folder or a device is."""
    if path.exists() and path.is_dir() != folder:
        number = errno.EEXIST if folder else errno.EISDIR
        raise OSError(number, os.strerror(number), str(path))
    if path.exists() and not folder and not path.is_file():
        raise OSError(errno.EINVAL, "is a device or a pipe, no file that can be replaced", str(path))


def _put_in_place(hidden: Path, target: Path) -> None:
    """Rename a complete folder to its target; an old one there is moved away first and deleted last."""
    if not target.exists():
        hidden.rename(target)
        sync_folder(target.parent)
        return
    old = _hidden(target, "old")
    _in_progress.add(str(old))
    try:
        target.rename(old)
        try:
            hidden.rename(target)
        except OSError:
            old.rename(target)
            raise
        sync_folder(target.parent)
        _remove(old)
    finally:
        _in_progress.discard(str(old))


def _remove(path: Path) -> None:
    """Delete a folder, under a name that `recover` will never take for a complete one."""
    found = _LEFTOVER.fullmatch(path.name)
    gone = _hidden(path.with_name(found["name"]) if found else path, "gone")
    with _working_on(gone):
        _discard(gone)
        path.rename(gone)
        _discard(gone)


def _discard(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync_tree(folder: Path) -> None:
    """Wait until the disk has every file of a folder, also those that other libraries wrote there."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            handle = os.open(Path(root) / name, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        sync_folder(Path(root))


def _clean(parent: Path, only: str | None) -> None:
    """Put interrupted replacements in `parent` back and delete leftovers; of one name, if `only` gives it."""
    try:
        inside = sorted(parent.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return
    for path in inside:
        found = _LEFTOVER.fullmatch(path.name)
        if found is None or (only is not None and found["name"] != only):
            continue
        with reporting(parent, "a clean folder after a crash"), contextlib.suppress(FileNotFoundError):
            pid = int(found["pid"])
            running = str(path) in _in_progress if pid == os.getpid() else _is_running(pid)
            _settle(path, parent / found["name"], found["kind"], running=running)


def _settle(leftover: Path, target: Path, kind: str, *, running: bool) -> None:
    """Decide one leftover: an old folder whose successor never came goes back, the rest is deleted."""
    if kind != "old":
        if not running:
            _discard(leftover)
        return
    deadline = time.monotonic() + (_SWAP_SECONDS if running else 0)
    while not target.exists() and leftover.exists():
        if time.monotonic() >= deadline:
            leftover.rename(target)
            sync_folder(target.parent)
            return
        time.sleep(0.01)
    if not running and leftover.exists():
        _remove(leftover)


def _identity(folder: Path) -> tuple[int, int, int] | None:
    """Return what tells a folder from its successor; the number alone may be given out again."""
    try:
        found = folder.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_ctime_ns


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _still_there(path: Path) -> str:
    return "What was there before is still complete." if path.exists() else "Nothing half-written is left."


def _megabytes(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:,.1f} MB"
