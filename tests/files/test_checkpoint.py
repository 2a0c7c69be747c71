import json

import pytest
import torch

from onebase.errors import CapacityError, FileFormatError
from onebase.files.atomic import clean
from onebase.files.checkpoint import list_checkpoints, load_checkpoint, prune_checkpoints, save_checkpoint
from tests.files.killing import killed_everywhere
from tests.files.samples import pairs, same

STATE = {"step": 7, "loss": 0.1 + 0.2, "tiny": 5e-324, "big": 2**80, "words": ["a", None, True]}


def save(folder, step, seed=0, **more):
    return save_checkpoint(folder, step, pairs(seed=seed), {**STATE, "step": step}, **more)


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    tensors = {**pairs(), "mask": torch.tensor([1, 2], dtype=torch.uint8), "step": torch.tensor(3, dtype=torch.int64)}
    path = save_checkpoint(tmp_path, 7, tensors, STATE, best=pairs(seed=1))
    loaded = load_checkpoint(path)
    assert same(loaded.tensors, tensors)
    assert loaded.best is not None and same(loaded.best, pairs(seed=1))
    assert (loaded.step, loaded.state) == (7, STATE)
    assert load_checkpoint(save(tmp_path, 8)).best is None


def test_the_same_state_gives_the_same_bytes(tmp_path):
    for folder in ("a", "b"):
        save(tmp_path / folder, 7, best=pairs(seed=1))
    left, right = ({p.name: p.read_bytes() for p in (tmp_path / f / "step-00000007").iterdir()} for f in "ab")
    assert left == right
    assert set(left) == {"tensors.safetensors", "best.safetensors", "state.json", "manifest.json"}


def test_the_list_is_in_the_order_of_steps_and_knows_checkpoints_alone(tmp_path):
    for step in (20, 3, 123_456_789, 100):
        save(tmp_path, step)
    (tmp_path / "step-1").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "step-00000099").touch()
    names = [path.name for path in list_checkpoints(tmp_path)]
    assert names == ["step-00000003", "step-00000020", "step-00000100", "step-123456789"]
    assert list_checkpoints(tmp_path / "none") == []


@pytest.mark.parametrize("keep", [1, 2, 5])
def test_pruning_keeps_the_newest(tmp_path, keep):
    for step in (1, 2, 3):
        save(tmp_path, step)
    prune_checkpoints(tmp_path, keep)
    assert [load_checkpoint(path).step for path in list_checkpoints(tmp_path)] == [1, 2, 3][-keep:]


def test_some_checkpoint_can_be_loaded_wherever_saving_and_pruning_are_killed(tmp_path):
    def prepare():
        clean(tmp_path)
        for path in list_checkpoints(tmp_path):
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        save(tmp_path, 1, seed=1)

    def save_and_prune():
        save(tmp_path, 2, seed=2)
        prune_checkpoints(tmp_path, 1)

    newest = set()
    for _ in killed_everywhere(tmp_path, prepare, save_and_prune):
        clean(tmp_path)
        found = list_checkpoints(tmp_path)
        assert sorted(tmp_path.iterdir()) == found
        for path in found:
            loaded = load_checkpoint(path)
            assert same(loaded.tensors, pairs(seed=loaded.step))
        newest.add(loaded.step)
    assert newest == {1, 2}


@pytest.mark.parametrize("name", ["tensors.safetensors", "best.safetensors", "state.json"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_named_with_the_way_on_from_the_one_before(tmp_path, name, how):
    save(tmp_path, 5)
    path = save(tmp_path, 10, best=pairs(seed=1))
    file = path / name
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    if how == "gone":
        file.unlink()
    else:
        file.write_bytes(data if how == "flipped" else data[:-1])
    with pytest.raises(FileFormatError) as error:
        load_checkpoint(path)
    assert str(error.value).startswith(f"{file}: ")
    assert f"To go on from step 5 delete the folder {path} and resume again." in str(error.value)
    assert load_checkpoint(tmp_path / "step-00000005").step == 5


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"schema_version": 1, "step": 10, "files": {}}'])
def test_a_damaged_manifest_is_named_with_the_way_on(tmp_path, content):
    path = save(tmp_path, 10)
    (path / "manifest.json").write_bytes(content)
    with pytest.raises(FileFormatError, match=r"manifest\.json") as error:
        load_checkpoint(path)
    assert f"To go on from the start delete the folder {path}" in str(error.value)


def test_a_checkpoint_of_a_newer_onebase_is_refused(tmp_path):
    path = save(tmp_path, 10) / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "schema_version": 2}))
    with pytest.raises(FileFormatError, match="written by a newer onebase"):
        load_checkpoint(path.parent)


def test_a_renamed_checkpoint_is_refused(tmp_path):
    save(tmp_path, 10).rename(tmp_path / "step-00000011")
    with pytest.raises(FileFormatError, match="the manifest is that of step 10"):
        load_checkpoint(tmp_path / "step-00000011")


def test_a_full_disk_leaves_the_older_checkpoint_and_names_it(tmp_path, monkeypatch):
    save(tmp_path, 5)

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(CapacityError) as error:
        save(tmp_path, 10)
    assert f"The run can go on from {tmp_path / 'step-00000005'}" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
