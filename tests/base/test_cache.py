"""A folder in the cache is whole or not there, whatever happens while it is built."""

import errno
import json
import subprocess
import sys
import textwrap
import threading

import pytest

from onebase.base import cache
from onebase.errors import CapacityError, ModelError
from tests.base import tiny


def fill(folder):
    (folder / "a.txt").write_text("a")
    (folder / "inner").mkdir()
    (folder / "inner" / "b.txt").write_text("bb")


def test_a_folder_is_built_once(tmp_path):
    calls = []

    def counted(folder):
        calls.append(1)
        fill(folder)

    for _ in range(2):
        cache.build_once(tmp_path / "m", counted, say=tiny.hush)
    assert len(calls) == 1
    assert (tmp_path / "m" / "inner" / "b.txt").read_text() == "bb"


def test_a_build_that_raises_leaves_nothing_and_the_next_one_succeeds(tmp_path):
    def half(folder):
        fill(folder)
        raise RuntimeError("killed here")

    with pytest.raises(RuntimeError, match="killed here"):
        cache.build_once(tmp_path / "m", half, say=tiny.hush)
    assert not [path for path in tmp_path.iterdir() if path.is_dir()]
    assert cache.is_whole(cache.build_once(tmp_path / "m", fill, say=tiny.hush))


def test_a_process_killed_in_the_middle_leaves_nothing_that_looks_whole(tmp_path):
    script = f"""
        import os, pathlib
        from onebase.base import cache
        def half(folder):
            (folder / "a.txt").write_text("half")
            os._exit(9)
        cache.build_once(pathlib.Path({str(tmp_path)!r}) / "m", half)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], check=False)
    assert done.returncode == 9
    assert not (tmp_path / "m").exists()
    cache.build_once(tmp_path / "m", fill, say=tiny.hush)
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["m"]  # what was left over is gone


@pytest.mark.parametrize("damage", ["gone", "short", "unsealed", "older"])
def test_a_damaged_folder_is_built_again_and_that_is_said(tmp_path, damage):
    folder = cache.build_once(tmp_path / "m", fill, say=tiny.hush)
    if damage == "gone":
        (folder / "a.txt").unlink()
    elif damage == "short":
        (folder / "inner" / "b.txt").write_text("b")
    elif damage == "unsealed":
        (folder / cache.SEAL_NAME).write_text("{")
    else:
        seal = json.loads((folder / cache.SEAL_NAME).read_text())
        (folder / cache.SEAL_NAME).write_text(json.dumps({**seal, "format": 0}))
    said: list[str] = []
    cache.build_once(folder, fill, say=said.append)
    assert cache.is_whole(folder)
    assert (folder / "inner" / "b.txt").read_text() == "bb"
    assert "building it again" in said[0]


def test_two_builders_at_once_build_once_and_the_waiting_one_says_so(tmp_path):
    started, go_on = threading.Event(), threading.Event()
    calls: list[int] = []
    said: list[str] = []

    def slow(folder):
        calls.append(1)
        started.set()
        go_on.wait(20)
        fill(folder)

    first = threading.Thread(target=cache.build_once, args=(tmp_path / "m", slow), kwargs={"say": tiny.hush})
    first.start()
    started.wait(20)

    def heard(text):
        said.append(text)
        go_on.set()

    second = threading.Thread(target=cache.build_once, args=(tmp_path / "m", slow), kwargs={"say": heard})
    second.start()
    first.join(20)
    second.join(20)
    assert calls == [1]
    assert "waiting for another process" in said[0]


@pytest.mark.parametrize(
    ("number", "kind"), [(errno.ENOSPC, CapacityError), (errno.EROFS, ModelError), (errno.EACCES, ModelError)]
)
def test_a_full_disk_or_a_closed_folder_says_what_to_do(tmp_path, number, kind):
    def build(folder):
        raise OSError(number, "no")

    with pytest.raises(kind, match="ONEBASE_HOME"):
        cache.build_once(tmp_path / "m", build, say=tiny.hush)
    assert not (tmp_path / "m").exists()


def test_a_cache_folder_that_is_a_file_is_an_error_that_names_it(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ModelError, match="file"):
        cache.build_once(tmp_path / "file" / "m", fill, say=tiny.hush)


def test_home_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "here"))
    assert cache.home() == tmp_path / "here"
    monkeypatch.delenv("ONEBASE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.home() == tmp_path / "onebase"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache.home() == tmp_path / ".cache" / "onebase"


def test_an_atomic_write_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "x.json"
    cache.write_atomically(path, "old")
    with pytest.raises(UnicodeEncodeError):
        cache.write_atomically(path, "\ud800")
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["x.json"]
