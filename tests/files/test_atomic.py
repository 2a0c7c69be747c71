import errno
import os
import resource
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

from onebase.errors import CapacityError, ConfigError, OnebaseError
from onebase.files import atomic
from onebase.files.atomic import clean, ensure_writable, new_folder, read_steadily, recover, remove_folder, write_file
from tests.files.killing import killed_everywhere


def fill(folder: Path, text: str) -> None:
    with new_folder(folder, writing="the test's folder") as new:
        (new / "a.txt").write_text(text)
        (new / "inner").mkdir()
        (new / "inner" / "b.txt").write_text(text)


def content(folder: Path) -> str:
    first, second = (folder / "a.txt").read_text(), (folder / "inner" / "b.txt").read_text()
    assert first == second
    return first


def test_a_file_written_over_another_has_the_new_content_and_leaves_nothing_beside_it(tmp_path):
    for text in ("old", "new \N{GREEK SMALL LETTER ALPHA}"):
        write_file(tmp_path / "deep" / "f.txt", text, writing="the test")
    assert (tmp_path / "deep" / "f.txt").read_text(encoding="utf-8") == text
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["f.txt"]


def test_a_file_is_old_or_new_wherever_its_writer_is_killed(tmp_path):
    path = tmp_path / "f.txt"
    states = set()
    for _ in killed_everywhere(
        tmp_path, lambda: path.write_text("old") and None, lambda: write_file(path, "new", writing="the test")
    ):
        clean(tmp_path)
        states.add(path.read_text())
        assert list(tmp_path.iterdir()) == [path]
    assert states == {"old", "new"}


def test_a_folder_is_old_or_new_wherever_its_writer_is_killed(tmp_path):
    folder = tmp_path / "adapter"
    states = set()
    for _ in killed_everywhere(tmp_path, lambda: fill(folder, "old"), lambda: fill(folder, "new")):
        recover(folder)
        states.add(content(folder))
        assert list(tmp_path.iterdir()) == [folder]
    assert states == {"old", "new"}


def test_a_first_folder_is_whole_or_absent_wherever_its_writer_is_killed(tmp_path):
    folder = tmp_path / "adapter"
    states = set()
    for _ in killed_everywhere(
        tmp_path, lambda: remove_folder(folder) if folder.exists() else None, lambda: fill(folder, "new")
    ):
        clean(tmp_path)
        states.add(folder.exists() and content(folder))
        assert list(tmp_path.iterdir()) == [folder] * folder.exists()
    assert states == {False, "new"}


def test_a_deleted_folder_is_whole_or_absent_wherever_its_deleter_is_killed(tmp_path):
    folder = tmp_path / "step"
    for _ in killed_everywhere(
        tmp_path, lambda: None if folder.exists() else fill(folder, "old"), lambda: remove_folder(folder)
    ):
        clean(tmp_path)
        assert not folder.exists() or content(folder) == "old"
        assert list(tmp_path.iterdir()) == [folder] * folder.exists()


def test_a_folder_deleted_by_hand_after_a_crash_never_comes_back_as_a_part(tmp_path):
    folder = tmp_path / "adapter"
    for _ in killed_everywhere(tmp_path, lambda: fill(folder, "old"), lambda: fill(folder, "new")):
        shutil.rmtree(folder, ignore_errors=True)
        recover(folder)
        assert not folder.exists() or content(folder) == "old"


def test_everything_in_a_folder_is_on_the_disk_before_the_folder_has_its_name(tmp_path, monkeypatch):
    synced: list[int] = []
    sync = os.fsync

    def noting_sync(handle: int) -> None:
        synced.append(os.fstat(handle).st_ino)
        sync(handle)

    monkeypatch.setattr(os, "fsync", noting_sync)
    fill(tmp_path / "adapter", "new")
    inside = [tmp_path / "adapter", *(tmp_path / "adapter").rglob("*")]
    last = max(synced.index(path.stat().st_ino) for path in inside)
    assert tmp_path.stat().st_ino in synced[last + 1 :]


def test_an_error_while_filling_leaves_the_old_folder_and_no_trace(tmp_path):
    fill(tmp_path / "adapter", "old")
    with (
        pytest.raises(ZeroDivisionError),
        new_folder(tmp_path / "adapter", writing="the test") as new,
    ):
        (new / "a.txt").write_text(str(1 // 0))
    assert content(tmp_path / "adapter") == "old"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(("number", "words"), [(errno.ENOSPC, "disk is full"), (errno.EDQUOT, "quota is used up")])
def test_a_full_disk_is_a_capacity_error_that_says_what_is_safe(tmp_path, monkeypatch, number, words):
    fill(tmp_path / "adapter", "old")

    def full(handle: int) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(CapacityError) as error:
            fill(tmp_path / "adapter", "new")
        with pytest.raises(CapacityError):
            write_file(tmp_path / "f.txt", "new", writing="the test")
    for part in (str(tmp_path / "adapter"), words, "the test's folder", "still complete", "Free some space"):
        assert part in str(error.value)
    assert content(tmp_path / "adapter") == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_write_that_the_system_cuts_short_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(CapacityError, match="too large"):
            write_file(path, b"x" * 100_000, writing="the test")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_place_that_cannot_be_written_to_is_a_config_error(tmp_path, monkeypatch, number):
    def refuse(self: Path, *_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match="Choose a folder that you may write to") as error:
        fill(tmp_path / "adapter", "new")
    assert str(tmp_path / "adapter") in str(error.value)


def test_a_failing_disk_is_an_error_of_ours_that_is_nobodys_wrong_use(tmp_path, monkeypatch):
    def fail(handle: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OnebaseError, match="Input/output error") as error:
        write_file(tmp_path / "f.txt", "new", writing="the test")
    assert error.value.exit_code == 1


def test_a_file_in_the_way_of_a_folder_stays(tmp_path):
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(ConfigError, match="in the way"):
        fill(tmp_path / "adapter", "new")
    with pytest.raises(ConfigError, match="in the way"):
        fill(tmp_path / "adapter" / "inner", "new")
    with pytest.raises(ConfigError, match="a folder, not a file"):
        write_file(tmp_path, "new", writing="the test")
    assert (tmp_path / "adapter").read_text() == "mine"


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    fill(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    fill(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert content(tmp_path / "real") == "new"


def test_what_a_running_process_writes_is_left_alone(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        theirs = tmp_path / f".adapter.onebase-{other.pid}.new"
        theirs.mkdir()
        clean(tmp_path)
        assert theirs.exists()
        other.communicate(b"\n")
    clean(tmp_path)
    assert not theirs.exists()


def test_temporary_folders_go_with_the_next_one_wherever_their_maker_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    (tmp_path / ".verify-notes").mkdir()

    def work() -> None:
        with atomic.scratch_folder("verify") as place:
            (place / "model").mkdir()
            (place / "model" / "weights").write_bytes(b"x" * 99)

    left = 0
    for _ in killed_everywhere(tmp_path, lambda: None, work):
        left += len(list(tmp_path.iterdir())) > 1
        with atomic.scratch_folder("verify") as one, atomic.scratch_folder("verify") as other:
            assert set(tmp_path.iterdir()) == {one, other, tmp_path / ".verify-notes"}
        assert list(tmp_path.iterdir()) == [tmp_path / ".verify-notes"]
    assert left > 2


def test_temporary_folders_of_processes_that_run_and_of_other_users_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    running = tmp_path / f".verify-a.onebase-{os.getppid()}.new"
    running.mkdir()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    theirs = tmp_path / f".verify-b.onebase-{dead.pid}.new"
    theirs.mkdir()
    monkeypatch.setattr(os, "getuid", lambda: theirs.stat().st_uid + 1)
    with atomic.scratch_folder("verify"):
        assert running.is_dir() and theirs.is_dir()
    monkeypatch.undo()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with atomic.scratch_folder("verify"):
        assert running.is_dir() and not theirs.exists()


def test_files_that_only_look_like_leftovers_stay(tmp_path):
    names = [".adapter.onebase-x.new", "adapter.onebase-1.new", ".adapter.new", ".adapter.onebase-1.newer"]
    for name in names:
        (tmp_path / name).touch()
    clean(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names)


def test_a_reader_sees_one_version_while_a_writer_replaces_the_folder(tmp_path):
    folder = tmp_path / "adapter"
    fill(folder, "0")
    done = threading.Event()

    def replace_often() -> None:
        try:
            for number in range(1, 60):
                fill(folder, str(number))
        finally:
            done.set()

    writer = threading.Thread(target=replace_often)
    writer.start()
    seen = []
    while not done.is_set():
        first, second = read_steadily(folder, lambda: [path.read_text() for path in sorted(folder.rglob("*.txt"))])
        assert first == second
        seen.append(int(first))
    writer.join()
    assert seen == sorted(seen)
    assert content(folder) == "59"


def test_the_check_before_the_work_finds_too_little_space_and_makes_nothing(tmp_path):
    ensure_writable(tmp_path / "new" / "run", 1000, writing="the run")
    with pytest.raises(CapacityError, match=r"the run needs about 1,000,000,000,000\.0 MB, the disk has"):
        ensure_writable(tmp_path / "new" / "run", 10**18, writing="the run")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that even root cannot write to")
def test_the_check_before_the_work_finds_a_place_that_cannot_be_written_to():
    with pytest.raises(OnebaseError, match="/proc/onebase: cannot write the run"):
        ensure_writable(Path("/proc/onebase"), 1, writing="the run")


def test_the_check_before_the_work_finds_a_file_where_a_folder_must_be(tmp_path):
    (tmp_path / "f").touch()
    with pytest.raises(ConfigError, match="a file, not a folder"):
        ensure_writable(tmp_path / "f" / "run", 1, writing="the run")


def test_every_known_error_of_a_write_has_its_words(tmp_path):
    for number in {**atomic._FULL, **atomic._REFUSED}:
        with pytest.raises(OnebaseError, match="cannot write the test"), atomic.reporting(tmp_path, "the test", ""):
            raise OSError(number, os.strerror(number))


def test_a_pipe_or_a_device_is_never_replaced_by_a_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OnebaseError, match="is a device or a pipe"):
        atomic.write_file(tmp_path / "pipe", "text", writing="the test")
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
