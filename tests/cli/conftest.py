"""A trained run, made once; and a folder to start new ones in."""

import shutil
from pathlib import Path

import pytest

from tests.cli.world import chats, invoke, model_in, settings_in, write_rows


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """A folder with model, rows, settings and the finished run `run`; not to be changed."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ONEBASE_HOME", str(folder / "home"))
        model_in(folder / "model")
        write_rows(folder / "train.jsonl", chats(24))
        write_rows(folder / "valid.jsonl", chats(6, start=24))
        config = settings_in(folder, train="steps: 8, batch_size: 4, eval_every: 4, learning_rate: 0.01")
        assert invoke("train", config, "--out", folder / "run").exit_code == 0
    return folder


@pytest.fixture
def world(trained, tmp_path, monkeypatch) -> Path:
    """A copy of model, rows and settings, as the working directory."""
    shutil.copytree(trained / "model", tmp_path / "model")
    for name in ("train.jsonl", "valid.jsonl"):
        shutil.copy(trained / name, tmp_path / name)
    settings_in(tmp_path)
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(autouse=True)
def own_home(tmp_path, monkeypatch) -> None:
    """Keep the fingerprints of tiny models out of the user's cache."""
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "home"))
