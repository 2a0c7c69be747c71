"""An adapter as a folder in PEFT's format, both ways: `write_adapter` and `read_adapter`.

The folder holds adapter_config.json (`peft_config`), adapter_model.safetensors with the bank's names behind
"base_model.model." (MODULE.lora_A.weight, MODULE.ia3_l, ...; virtual tokens have the one name prompt_embeddings alone),
and onebase.json (`record`). It is written whole or not at all; the same adapter gives the same bytes, without a time;
only the name of the base may be a path. Weights are stored as they are, in their own dtype. Whether an adapter fits a
model is the bank's question.

`.bin` adapters are pickles, which can run code when read: they are refused with the line that converts them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.config.methods import AdapterSettings, Lora
from onebase.errors import ConfigError, FileFormatError, list_problems
from onebase.files.atomic import new_folder, read_steadily, recover, write_synced
from onebase.files.json_file import to_json
from onebase.files.method_format import Placement
from onebase.files.model_card import CARD_NAME
from onebase.files.peft_config import CONFIG_NAME, FORMAT_OF, beside_targets, config_for, read_config, settings_of
from onebase.files.record import RECORD_NAME, AdapterRecord, read_record
from onebase.files.tensor_file import read_tensors, write_tensors
from onebase.files.tensor_names import name_tensors, tensor_problems

if TYPE_CHECKING:
    from torch import Tensor

TENSORS_NAME = "adapter_model.safetensors"
_BIN_NAME = "adapter_model.bin"
_ADAPTERS = {
    CONFIG_NAME, TENSORS_NAME, _BIN_NAME, RECORD_NAME, CARD_NAME, "chat_template.jinja", "tokenizer.json",
    "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt",
    "merges.txt", "spiece.model", "sentencepiece.bpe.model",
}  # fmt: skip
"""What an adapter's folder may hold and a new one need not: older versions of its tokenizer wrote other files."""
_TODO = "Save the adapter again with the tool that made it, or get an undamaged copy."
_SHOWN = 10


@dataclass(frozen=True)
class StoredAdapter:
    """An adapter as it was read: its `tensors` by the names that the bank uses (MODULE.lora_A.weight), sorted.

    `config` is adapter_config.json as it stands, `record` is onebase.json (None for an adapter of PEFT's), `notes` are
    sentences worth showing to the user. `module_paths` are the modules the tensors lie on, sorted. `base_copies` are
    weights of the base that PEFT put beside the adapter, by their names in the model: they must be those of the base.
    """

    folder: Path
    settings: AdapterSettings
    tensors: dict[str, Tensor]
    config: dict[str, Any]
    record: AdapterRecord | None
    notes: list[str] = field(default_factory=list)
    module_paths: tuple[str, ...] = ()
    base_copies: dict[str, Tensor] = field(default_factory=dict)


def write_adapter(
    folder: Path,
    settings: AdapterSettings,
    tensors: Mapping[str, Tensor],
    *,
    placement: Placement,
    base_path: str,
    record: AdapterRecord,
    fill: Callable[[Path], None] | None = None,
) -> None:
    """Write an adapter's folder in place of the one that may be there, which is refused if it holds anything else.

    Notes, a trainer's state or a file nobody here knows are never removed, and never taken along into a folder that
    says it was written whole: the caller chooses another folder or moves them away. Nothing is touched till then.

    `tensors` have the bank's names (MODULE.lora_A.weight); `placement` names their modules (`target_names`);
    `base_path` is what peft opens as the base; `fill` adds files (tokenizer, model card) before the folder appears.

    Raises:
        FileFormatError: the tensors are no adapter with these settings (a rank that differs, half a pair, a NaN).
        CapacityError, ConfigError: the disk is full, the place cannot be written to, or holds what is no adapter's.
    """
    other = _beside(folder)
    form = FORMAT_OF[type(settings)]
    config = config_for(settings, placement, base_path=base_path, revision=record.base_revision)
    problems = tensor_problems(form, config, tensors)
    if problems:
        raise FileFormatError(list_problems(f"the adapter for {folder}, nothing was written", problems, shown=_SHOWN))
    keys = {name if name == form.single else form.prefix + name: tensor for name, tensor in tensors.items()}
    with new_folder(folder, writing="the adapter") as new:
        write_tensors(new / TENSORS_NAME, keys)
        write_synced(new / CONFIG_NAME, to_json(config))
        write_synced(new / RECORD_NAME, record.to_text())
        if fill is not None:
            fill(new)
        _check_nothing_lost(folder, [name for name in other if not (new / name).is_file()])


def _beside(folder: Path) -> list[str]:
    """Return what a folder holds beside the files that every adapter's may hold; a new one is to take its place.

    Raises:
        ConfigError: it holds no adapter, a model or a folder, it is the one we are in, or the path is none.
    """
    try:
        there = Path(os.path.realpath(folder))
        names = sorted(path.name for path in there.iterdir()) if there.is_dir() else []
        large = [name for name in names if CONFIG_NAME not in names or _is_model(name) or (there / name).is_dir()]
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: no folder for an adapter: {error}. Choose another one.") from error
    if Path.cwd().is_relative_to(there):
        raise ConfigError(
            f"{there}: is the folder you are in, or one around it, and an adapter is saved as a folder of its own. "
            "Name a new folder."
        )
    _check_nothing_lost(there, large)
    return [name for name in names if name not in _ADAPTERS]


def _check_nothing_lost(there: Path, other: list[str]) -> None:
    """Raise if saving would remove something."""
    if other:
        more = f" and {len(other) - 3} more" if len(other) > 3 else ""
        raise ConfigError(
            f"{there}: holds what is no adapter's ({', '.join(other[:3])}{more}), and saving would remove it. Name a new "
            "folder, or move those files away."
        )


def _is_model(name: str) -> bool:
    """Return whether a file holds a model's own weights, or says where they are."""
    return name.startswith(("model", "pytorch_model")) and name.endswith((".safetensors", ".bin", ".index.json"))


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
    config, form, notes = read_config(folder)
    named = name_tensors(form, config, stored_tensors(folder))
    problems = named.problems or tensor_problems(form, config, named.content.tensors)
    if form.settings is Lora and not problems:
        pairs = (name.partition(".lora_A.") for name in named.content.tensors)
        problems = [*filter(None, [beside_targets(config, [path for path, found, _ in pairs if found])])]
    if problems:
        told = [f"{problem} {_TODO}" for problem in problems]
        raise FileFormatError(list_problems(str(folder / TENSORS_NAME), told, shown=_SHOWN))
    record = read_record(folder)
    if record is None:
        notes.append(f"{folder}: no {RECORD_NAME}, so nobody can tell whether the base is the one it was trained on.")
    content = named.content
    settings = settings_of(folder / CONFIG_NAME, form, config, content)
    tensors = dict(content.tensors)
    return StoredAdapter(folder, settings, tensors, config, record, notes, content.paths, named.base_copies)


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors under the names in the file, which must be a safetensors file.

    Raises:
        FileFormatError: it is none, is damaged or missing.
    """
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
