"""A fingerprint is a function of the stored weights alone, and remembering it never changes it."""

import json
import os
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from onebase.base import cache
from onebase.base.fingerprint import fingerprint, fingerprint_of_state
from onebase.errors import ModelError


@pytest.fixture(autouse=True)
def own_home(monkeypatch, tmp_path):
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "home"))


def sharded(folder, names):
    folder.mkdir()
    for number, name in enumerate(sorted(names)):
        save_file({f"w{number}": torch.full((3,), float(number))}, folder / name)
    order = {f"w{sorted(names).index(name)}": name for name in names}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": order}))
    return folder


def test_the_order_in_which_shards_are_listed_does_not_matter(tmp_path):
    one = sharded(tmp_path / "one", ["a.safetensors", "b.safetensors"])
    two = sharded(tmp_path / "two", ["b.safetensors", "a.safetensors"])
    assert fingerprint(one) == fingerprint(two)


def test_what_is_not_a_weight_does_not_matter(tmp_path):
    one = sharded(tmp_path / "one", ["a.safetensors"])
    before = fingerprint(one)
    (one / "config.json").write_text("{}")
    save_file({"other": torch.ones(1)}, one / "other.safetensors")
    assert fingerprint(one) == before


@given(at=st.integers(0, 10**6), flip=st.integers(1, 255))
def test_any_changed_byte_of_any_shard_changes_it(tmp_path_factory, at, flip):
    folder = sharded(tmp_path_factory.mktemp("x") / "m", ["a.safetensors", "b.safetensors"])
    before = fingerprint(folder)
    path = folder / ("a.safetensors" if at % 2 else "b.safetensors")
    content = bytearray(path.read_bytes())
    content[at % len(content)] ^= flip
    path.write_bytes(content)
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # clocks are coarse; writing sets a later time
    assert fingerprint(folder) != before


def test_it_is_hashed_once_and_again_after_a_change(tmp_path, monkeypatch):
    folder = sharded(tmp_path / "m", ["a.safetensors"])
    before = fingerprint(folder)
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("hashed again"))
    assert fingerprint(folder) == before
    os.utime(folder / "a.safetensors", ns=(1, 1))
    with pytest.raises(pytest.fail.Exception):
        fingerprint(folder)


def test_a_copy_has_the_same_one(tmp_path):
    folder = sharded(tmp_path / "m", ["a.safetensors"])
    assert fingerprint(shutil.copytree(folder, tmp_path / "copy")) == fingerprint(folder)


@pytest.mark.parametrize("content", ["", "[1]", "{", '{"/x": 3}'])
def test_a_broken_memory_is_made_anew(tmp_path, content):
    folder = sharded(tmp_path / "m", ["a.safetensors"])
    before = fingerprint(folder)
    memory = cache.home() / "fingerprints.json"
    memory.write_text(content)
    assert fingerprint(folder) == before
    assert str((folder / "a.safetensors").resolve()) in json.loads(memory.read_text())


def test_a_memory_that_cannot_be_written_costs_time_only(tmp_path, monkeypatch):
    folder = sharded(tmp_path / "m", ["a.safetensors"])
    before = fingerprint(folder)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "file"))
    assert fingerprint(folder) == before


def test_files_that_are_gone_leave_the_memory(tmp_path):
    one, two = sharded(tmp_path / "one", ["a.safetensors"]), sharded(tmp_path / "two", ["a.safetensors"])
    fingerprint(one)
    shutil.rmtree(one)
    fingerprint(two)
    assert list(json.loads((cache.home() / "fingerprints.json").read_text())) == [
        str((two / "a.safetensors").resolve())
    ]


def test_a_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        fingerprint(tmp_path)


def test_a_model_in_memory_has_one_that_follows_every_tensor():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3)).to(torch.bfloat16)
    seen = {fingerprint_of_state(model)}
    assert fingerprint_of_state(model) in seen
    for tensor in model.state_dict().values():
        tensor += 1
        seen.add(fingerprint_of_state(model))
    assert len(seen) == len(model.state_dict()) + 1
    assert fingerprint_of_state(model.float()) not in seen
