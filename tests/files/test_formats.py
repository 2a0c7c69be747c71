"""Laws of every format: what is malformed is told, what is new is kept and named, what was written is read."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from onebase.config.methods import METHODS, BitFit, Bottleneck, Full, Ia3, LnTuning, Lora, PrefixTuning, PromptTuning
from onebase.errors import FileFormatError
from onebase.files.method_format import Placement
from onebase.files.peft_config import FORMAT_OF, FORMATS
from onebase.files.peft_format import read_adapter, write_adapter
from onebase.files.target_names import TargetNames
from tests.files.samples import record, same

PATHS = ("h.0.q", "h.1.q")
SAMPLES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "LORA": (Lora(r=2, target_modules=list(PATHS)), ("lora_A.weight", "lora_B.weight")),
    "IA3": (Ia3(target_modules=list(PATHS), feedforward_modules=["h.1.q"]), ("ia3_l",)),
    "LN_TUNING": (LnTuning(target_modules=list(PATHS)), ("ln_tuning_layers.weight", "ln_tuning_layers.bias")),
    "PROMPT_TUNING": (PromptTuning(num_virtual_tokens=2, prompt_tuning_init="RANDOM"), ()),
    "PREFIX_TUNING": (PrefixTuning(num_virtual_tokens=2), ()),
    "ONEBASE_BITFIT": (BitFit(target_modules=list(PATHS)), ("bias",)),
    "ONEBASE_BOTTLENECK": (
        Bottleneck(target_modules=list(PATHS), placement="houlsby"),
        ("adapter_down.weight", "adapter_up.bias"),
    ),
    "ONEBASE_FULL": (Full(target_modules=list(PATHS)), ("weight", "bias")),
}


def written(folder: Path, kind: str) -> Path:
    """Write a small adapter of a format."""
    settings, endings = SAMPLES[kind]
    tensors = {f"{path}.{ending}": torch.full((2, 2), 0.5) for path in PATHS for ending in endings}
    placement = Placement(TargetNames(PATHS), PATHS, feedforward_modules=("h.1.q",))
    if not endings:
        tensors, placement = {"prompt_embeddings": torch.ones(2, 4)}, Placement()
    write_adapter(folder, settings, tensors, placement=placement, base_path="tiny", record=record())
    return folder


def edit(folder: Path, **changes: Any) -> None:
    """Change fields of adapter_config.json; ... takes one out."""
    path = folder / "adapter_config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({name: value for name, value in content.items() if value is not ...}))


def test_every_method_has_a_format() -> None:
    assert set(FORMAT_OF) == set(METHODS.values()) and set(SAMPLES) == set(FORMATS)


@pytest.mark.parametrize("kind", FORMATS)
def test_what_is_written_is_read_as_the_same_settings(tmp_path: Path, kind: str) -> None:
    stored = read_adapter(written(tmp_path / "a", kind))
    assert stored.settings == SAMPLES[kind][0].model_copy(update={})
    assert same(stored.tensors, _plain(load_file(tmp_path / "a" / "adapter_model.safetensors")))
    assert not stored.notes


def _plain(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name.removeprefix("base_model.model."): tensor for name, tensor in tensors.items()}


@pytest.mark.parametrize("kind", FORMATS)
def test_a_field_of_a_newer_version_is_kept_and_named_if_it_holds_something(tmp_path: Path, kind: str) -> None:
    edit(written(tmp_path / "a", kind), of_tomorrow={"x": 1}, quiet=None, off=False)
    stored = read_adapter(tmp_path / "a")
    assert [note for note in stored.notes if "of_tomorrow is not known to onebase" in note] == stored.notes
    assert stored.config["of_tomorrow"] == {"x": 1}


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, form in FORMATS.items() for name in form.rules])
def test_a_field_of_the_wrong_kind_is_told_with_the_rule_and_the_value(tmp_path: Path, kind: str, name: str) -> None:
    edit(written(tmp_path / "a", kind), **{name: {"(": [1.5]}})
    with pytest.raises(FileFormatError, match=rf"  {name}: must be .*, got {{'\(': \[1\.5\]}}\. Save"):
        read_adapter(tmp_path / "a")


def test_feed_forward_modules_that_are_no_regular_expression_are_told(tmp_path: Path) -> None:
    edit(written(tmp_path / "a", "IA3"), feedforward_modules="(")
    with pytest.raises(FileFormatError, match=r"feedforward_modules: must be a list of names or a regular expression"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, form in FORMATS.items() for name in sorted(form.needed)]
)
def test_a_field_that_is_needed_and_missing_is_told(tmp_path: Path, kind: str, name: str) -> None:
    edit(written(tmp_path / "a", kind), **{name: ...})
    with pytest.raises(FileFormatError, match=rf"  {name}: is missing; it must be"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != "ONEBASE_FULL"])
@pytest.mark.parametrize("key", ["h.0.q.of_tomorrow", "h.0.q.hada_w1_a", "x"])
def test_a_tensor_that_is_none_of_the_methods_is_refused_by_name(tmp_path: Path, kind: str, key: str) -> None:
    path = written(tmp_path / "a", kind) / "adapter_model.safetensors"
    save_file(load_file(path) | {f"base_model.model.{key}": torch.ones(2, 2)}, path)
    with pytest.raises(FileFormatError, match=rf"{key}: no tensor of .* as {kind} has them"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_numbers_that_are_not_finite_are_neither_read_nor_written(tmp_path: Path, kind: str, value: float) -> None:
    path = written(tmp_path / "a", kind) / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = value
    save_file(tensors, path)
    with pytest.raises(FileFormatError, match=r"1 of \d+ values are NaN or infinite"):
        read_adapter(tmp_path / "a")
    settings, _ = SAMPLES[kind]
    with pytest.raises(FileFormatError, match="nothing was written"):
        write_adapter(tmp_path / "b", settings, _plain(tensors), placement=Placement(), base_path="t", record=record())


@pytest.mark.parametrize(("shape", "count"), [((3, 4), 2), ((2,), 2)])
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "PREFIX_TUNING"])
def test_virtual_tokens_are_as_many_as_the_config_says(tmp_path: Path, kind: str, shape: Any, count: int) -> None:
    path = written(tmp_path / "a", kind) / "adapter_model.safetensors"
    save_file({"prompt_embeddings": torch.ones(shape)}, path)
    with pytest.raises(FileFormatError, match=rf"prompt_embeddings: must be \({count}, width\)"):
        read_adapter(tmp_path / "a")


@pytest.mark.parametrize("changes", [{"num_transformer_submodules": 2}])
def test_virtual_tokens_that_are_not_computed_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    edit(written(tmp_path / "a", "PROMPT_TUNING"), **changes)
    with pytest.raises(FileFormatError, match=f"  {next(iter(changes))}: .*not read"):
        read_adapter(tmp_path / "a")


THEIRS = {
    "IA3": peft.IA3Config(target_modules=["q"], feedforward_modules=["q"]),
    "LN_TUNING": peft.LNTuningConfig(target_modules=["q"]),
    "PROMPT_TUNING": peft.PromptTuningConfig(num_virtual_tokens=2),
    "PREFIX_TUNING": peft.PrefixTuningConfig(num_virtual_tokens=2),
}


@pytest.mark.parametrize("kind", THEIRS)
def test_every_field_that_peft_writes_is_handled_by_name(tmp_path: Path, kind: str) -> None:
    THEIRS[kind].save_pretrained(tmp_path)
    names = json.loads((tmp_path / "adapter_config.json").read_text())
    for name in names.keys() - FORMATS[kind].rules.keys() - {"peft_type"}:
        edit(written(tmp_path / "b", kind), **{name: "something"})
        assert not read_adapter(tmp_path / "b").notes, name
