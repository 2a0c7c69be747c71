"""What stands in a folder is checked before it is loaded, and what it is instead is said."""

import json
import shutil
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.base import place
from onebase.errors import FileFormatError, ModelError
from tests.base import tiny


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return tiny.llama_folder(tmp_path_factory.mktemp("whole") / "m", tokenizer=False)


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "m")


def test_a_whole_folder_passes(folder):
    place.check_model_folder(folder, "m")
    assert [path.name for path in place.weight_files(folder)] == ["model.safetensors"]


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_weights_that_are_cut_off_are_an_error_that_names_the_file(folder, kept):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(FileFormatError, match=r"model\.safetensors: damaged or cut off"):
        place.check_model_folder(folder, "m")


def test_weights_with_a_damaged_header_are_an_error_that_names_the_file(folder):
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[:8] = struct.pack("<Q", 7)
    path.write_bytes(content)
    with pytest.raises(FileFormatError, match=r"model\.safetensors"):
        place.check_model_folder(folder, "m")


def test_a_git_lfs_pointer_says_what_to_type(folder):
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n")
    with pytest.raises(FileFormatError, match="git lfs pull"):
        place.check_model_folder(folder, "m")


def test_a_shard_that_is_not_there_is_named(folder):
    (folder / "model.safetensors").rename(folder / "model-1.safetensors")
    weight_map = {"a": "model-1.safetensors", "b": "model-2.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(FileFormatError, match=r"1 of them are not there: model-2\.safetensors"):
        place.check_model_folder(folder, "m")


@pytest.mark.parametrize("content", ["", "{", "[]", "\x00"])
def test_a_configuration_that_is_no_json_object_is_an_error_that_names_it(folder, content):
    (folder / "config.json").write_text(content)
    with pytest.raises(FileFormatError, match=r"config\.json"):
        place.check_model_folder(folder, "m")


def test_pickled_weights_are_refused_with_the_line_that_converts_them(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match="pickle") as caught:
        place.check_model_folder(folder, "org/m")
    assert "python -c" in str(caught.value)
    assert "save_pretrained('m-safetensors')" in str(caught.value)


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"adapter_config.json": '{"base_model_name_or_path": "the-base"}'}, "an adapter, not a model.*the-base"),
        ({"adapter/adapter_config.json": "{}"}, "a run folder"),
        ({"x.gguf": ""}, "name one of them: .*x.gguf"),
        ({"notes.txt": ""}, "holds no config.json .it holds: notes.txt"),
        ({"config.json": "{}"}, "no model.safetensors"),
    ],
)
def test_a_folder_that_is_something_else_is_called_what_it_is(tmp_path, files, said):
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    with pytest.raises(ModelError, match=said):
        place.check_model_folder(tmp_path, "m")


@pytest.mark.parametrize("name", ["gpt2", "HuggingFaceTB/SmolLM2-135M", "smollm2-135m-instruct", "a.b/c-d_e"])
def test_a_hub_id_does_not_look_like_a_path(name):
    assert not place.looks_like_path(name)


@settings(max_examples=50)
@given(st.sampled_from(["smollm2-135m-instruct", "minilm-l6-v2"]), st.data())
def test_a_packaged_name_with_one_letter_gone_is_still_the_closest(name, data):
    at = data.draw(st.integers(0, len(name) - 1))
    assert place.closest(name[:at] + name[at + 1 :], ["minilm-l6-v2", "smollm2-135m-instruct"])[0] == name
