"""An adapter as a folder in PEFT's format, both ways: `write_adapter` and `read_adapter`.

The folder holds adapter_config.json (`peft_config`), adapter_model.safetensors with the keys
`base_model.model.MODULE.lora_A.weight` (r x in) and `.lora_B.weight` (out x r), and onebase.json (`record`). It is
written whole or not at all; the same adapter gives the same bytes, without a time; only the name of the base may be a
path. Weights are stored as they are, in their own dtype. Whether an adapter fits a model is the bank's question.

`.bin` adapters are pickles, which can run code when read: they are refused with the line that converts them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.adapters.matching import for_path
from onebase.config.methods import Lora
from onebase.errors import FileFormatError, list_problems
from onebase.files.atomic import new_folder, read_steadily, recover, write_synced
from onebase.files.json_file import to_json
from onebase.files.peft_config import CONFIG_NAME, config_for, read_config, settings_of
from onebase.files.record import RECORD_NAME, AdapterRecord, read_record
from onebase.files.target_names import TargetNames
from onebase.files.tensor_file import read_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

TENSORS_NAME = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_BIN_NAME = "adapter_model.bin"
_KEY = re.compile(r"(?P<module>.+)\.lora_(?P<letter>[AB])(?:\.(?P<adapter>[^.]+))?\.weight")
_TODO = "Save the adapter again with the tool that made it, or get an undamaged copy."
_SHOWN = 10
_OTHER_KEYS = {
    "lora_embedding_": "LoRA on an embedding, which this onebase does not read",
    "lora_magnitude_vector": "DoRA's magnitudes, which this onebase does not read",
    "lora_B.bias": "a bias in lora_B, which this onebase does not read",
    "modules_to_save": "a whole trained module, which this onebase does not read",
    "embed_tokens": "a whole embedding (resized or trained), which this onebase does not read",
}


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it was read: its `tensors` by the names that the bank uses (MODULE.lora_A.weight), sorted.

    `config` is adapter_config.json as it stands, `record` is onebase.json (None for an adapter of PEFT's), `notes` are
    sentences worth showing to the user.
    """

    folder: Path
    settings: Lora
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    record: AdapterRecord | None
    notes: list[str] = field(default_factory=list)

    @property
    def module_paths(self) -> list[str]:
        """The modules the adapter is on, sorted."""
        return sorted({name.rsplit(".", 2)[0] for name in self.tensors})


def write_adapter(
    folder: Path,
    settings: Lora,
    tensors: Mapping[str, Tensor],
    *,
    targets: TargetNames,
    base_path: str,
    record: AdapterRecord,
    fill: Callable[[Path], None] | None = None,
) -> None:
    """Write an adapter's folder in place of the one that may be there.

    `tensors` have the bank's names (MODULE.lora_A.weight); `targets` are resolved (`target_names.name_targets`);
    `base_path` is what peft opens as the base; `fill` adds files (tokenizer, model card) before the folder appears.

    Raises:
        FileFormatError: the tensors are no adapter with these settings (a rank that differs, half a pair, a NaN).
        CapacityError, ConfigError: the disk is full, the place cannot be written to.
    """
    problems = _tensor_problems(tensors, settings.r, settings.rank_pattern)
    if problems:
        raise FileFormatError(list_problems(f"the adapter for {folder}, nothing was written", problems, shown=_SHOWN))
    modules = sorted({name.rsplit(".", 2)[0] for name in tensors})
    config = config_for(
        settings, targets, modules, base_path=base_path, revision=record.base_revision, task=record.task
    )
    with new_folder(folder, writing="the adapter") as new:
        write_tensors(new / TENSORS_NAME, {_PREFIX + name: tensor for name, tensor in tensors.items()})
        write_synced(new / CONFIG_NAME, to_json(config))
        write_synced(new / RECORD_NAME, record.to_text())
        if fill is not None:
            fill(new)


def read_adapter(path: Path) -> StoredAdapter:
    """Return the adapter in a folder, or in the run folder given, with everything checked.

    Raises:
        FileFormatError: a file is missing, damaged or unsafe, or the adapter is not one that onebase computes.
    """
    folder = find_adapter(path)
    return read_steadily(folder, lambda: _read(folder))


def find_adapter(path: Path) -> Path:
    """Return the folder of the adapter at `path`, which may be the folder itself or a run folder.

    Raises:
        FileFormatError: there is none; the message says what is there.
    """
    recover(path)
    recover(path / "adapter")
    for folder in (path, path / "adapter"):
        if (folder / CONFIG_NAME).is_file():
            return folder
    if not path.exists():
        raise FileFormatError(f"{path}: there is no such folder. Give an adapter's folder or a run's folder.")
    if not path.is_dir():
        raise FileFormatError(f"{path}: is a file. Give the folder that holds {CONFIG_NAME}, or a run's folder.")
    if (path / "config.yaml").exists():
        raise FileFormatError(
            f"{path}: the run has no adapter yet. Finish it: onebase train {path / 'config.yaml'} --out {path} --resume"
        )
    raise FileFormatError(f"{path}: {CONFIG_NAME} is missing. Give an adapter's folder or a run's folder.")


def _read(folder: Path) -> StoredAdapter:
    config, notes = read_config(folder)
    tensors = _bank_names(folder / TENSORS_NAME, _stored_tensors(folder))
    problems = _tensor_problems(tensors, config["r"], config.get("rank_pattern") or {})
    if problems:
        told = [f"{problem} {_TODO}" for problem in problems]
        raise FileFormatError(list_problems(str(folder / TENSORS_NAME), told, shown=_SHOWN))
    modules = sorted({name.rsplit(".", 2)[0] for name in tensors})
    record = read_record(folder)
    if record is None:
        notes.append(f"{folder}: no {RECORD_NAME}, so nobody can tell whether the base is the one it was trained on.")
    settings = settings_of(folder / CONFIG_NAME, config, modules)
    return StoredAdapter(folder, settings, tensors, config, record, notes)


def _stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors under the names in the file, which must be a safetensors file."""
    path = folder / TENSORS_NAME
    if path.is_file():
        return read_tensors(path, todo=_TODO)
    if (folder / _BIN_NAME).is_file():
        old = folder / _BIN_NAME
        convert = (
            'python -c "import torch, safetensors.torch as s; '
            f"t = torch.load('{old}', map_location='cpu', weights_only=True); "
            f"s.save_file({{k: v.contiguous().clone() for k, v in t.items()}}, '{path}', metadata={{'format': 'pt'}})\""
        )
        raise FileFormatError(f"{old}: a pickle, which can run code when read, is not read. Convert it:\n  {convert}")
    raise FileFormatError(f"{path}: the file is missing. {_TODO}")


def _bank_names(path: Path, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors as MODULE.lora_A.weight, without PEFT's prefix and an adapter's name in the key, sorted.

    Raises:
        FileFormatError: keys that are no low-rank pairs, or of two adapters.
    """
    named: dict[str, Tensor] = {}
    problems: list[str] = []
    adapters: set[str] = set()
    for key, tensor in stored.items():
        found = _KEY.fullmatch(key.removeprefix(_PREFIX))
        if found is None:
            what = next((words for part, words in _OTHER_KEYS.items() if part in key), "neither lora_A nor lora_B")
            problems.append(f"{key}: {what}.")
            continue
        adapters.add(found["adapter"] or "")
        name = f"{found['module']}.lora_{found['letter']}.weight"
        if name in named:
            problems.append(f"{key}: a second tensor for {name}.")
        named[name] = tensor
    if len(adapters) > 1:
        problems.append(f"the keys name more than one adapter: {sorted(adapters)}.")
    if problems:
        raise FileFormatError(list_problems(str(path), problems, shown=_SHOWN))
    return {name: named[name] for name in sorted(named)}


def _tensor_problems(tensors: Mapping[str, Tensor], r: int, rank_pattern: Mapping[str, int]) -> list[str]:
    """Return what keeps tensors from being low-rank pairs of the given ranks with finite weights."""
    if not tensors:
        return ["there is no tensor: the adapter would change nothing."]
    problems: list[str] = []
    pairs: dict[str, dict[str, Tensor]] = {}
    for name, tensor in sorted(tensors.items()):
        found = _KEY.fullmatch(name)
        assert found is not None and found["adapter"] is None, f"{name} is not one of the bank's names"
        pairs.setdefault(found["module"], {})[found["letter"]] = tensor
        problems += _weight_problems(name, tensor)
    for module, pair in pairs.items():
        missing = [f"lora_{letter}" for letter in "AB" if letter not in pair]
        if missing:
            problems.append(f"{module}: {missing[0]} is missing beside lora_{'A' if missing[0] == 'lora_B' else 'B'}.")
            continue
        rank = for_path(rank_pattern, module, r)
        shapes = tuple(pair["A"].shape), tuple(pair["B"].shape)
        if shapes[0][:1] != (rank,) or shapes[1][1:] != (rank,):
            rule = f"lora_A must be ({rank}, in) and lora_B (out, {rank})"
            problems.append(f"{module}: {rule}, got {shapes[0]} and {shapes[1]}.")
    return problems


def _weight_problems(name: str, tensor: Tensor) -> list[str]:
    """Return what is wrong with one tensor by itself: its dimensions, its dtype, a value that is not finite."""
    import torch

    if tensor.dim() != 2:
        return [f"{name}: must have 2 dimensions (a linear layer), got {tuple(tensor.shape)}."]
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        return [f"{name}: must be float32, bfloat16, float16 or float64, got {tensor.dtype}."]
    bad = int((~torch.isfinite(tensor)).sum())
    return [f"{name}: {bad} of {tensor.numel()} values are NaN or infinite."] if bad else []
