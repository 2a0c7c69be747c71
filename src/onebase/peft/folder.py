"""Adapters of a bank as PEFT's two files, both ways, with every field of the configuration as it stands there.

Unlike `onebase train`, which writes a folder of its own, this writes into one that may hold more, as PEFT does:
transformers' Trainer saves its own files beside an adapter. Each file appears whole or not at all.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.adapters import start
from onebase.adapters.bank import Adapter, Bank
from onebase.adapters.lora import settings_in_file
from onebase.adapters.matching import lies_in
from onebase.adapters.merging import plain_state
from onebase.base.fingerprint import fingerprint
from onebase.config.methods import Lora
from onebase.errors import ConfigError, FileFormatError, ModelError
from onebase.files.atomic import write_file
from onebase.files.peft_config import FORMAT_OF
from onebase.files.peft_format import TENSORS_NAME, StoredAdapter, read_adapter
from onebase.files.target_names import TargetNames
from onebase.files.tensor_file import tensor_bytes
from onebase.peft.config import HEADS, PeftConfig
from onebase.peft.targets import saved_modules
from onebase.train.opening import fitted
from onebase.train.saving import module_paths

if TYPE_CHECKING:
    from torch import Tensor, nn

_EMBEDDINGS = ("embed_tokens", "lm_head")
PEFT_PREFIX = "base_model.model."


def file_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """Return an adapter's tensors under the keys of PEFT's file."""
    form = FORMAT_OF[type(adapter.settings)]
    return {
        name if name == form.single else form.prefix + name: tensor for name, tensor in adapter.file_tensors.items()
    }


def tensors_among(front: nn.Module, adapter: Adapter, given: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return an adapter's tensors, under the keys of PEFT's file, out of a state dict of the whole model.

    Raises:
        FileFormatError: it holds not all of them, or the file holds other tensors than the model.
    """
    trained = dict(adapter.parameters())
    at = {name: parameter.data_ptr() for name, parameter in trained.items()}
    if {name: tensor.data_ptr() for name, tensor in adapter.file_tensors.items()} != at:
        raise FileFormatError(
            f"state_dict: the file of adapter {adapter.name!r} ({adapter.settings.method}) holds what its tensors make, not "
            "the tensors. Leave state_dict out."
        )
    names = {id(parameter): name for name, parameter in front.named_parameters()}
    missing = [names[id(p)] for p in trained.values() if names[id(p)] not in given]
    if missing:
        raise FileFormatError(f"state_dict: {missing[0]} is missing. Give the whole model's, or leave it out.")
    found = {name: given[names[id(parameter)]] for name, parameter in trained.items()}
    form = FORMAT_OF[type(adapter.settings)]
    return {name if name == form.single else form.prefix + name: tensor for name, tensor in found.items()}


def load_(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors, under the keys of PEFT's file or the bank's names, into an adapter.

    Raises:
        FileFormatError: they are not its own, or its file holds other tensors than it trains; nothing is copied then.
    """
    if adapter.file_tensors.keys() != adapter.state.keys():
        raise FileFormatError(
            f"adapter {adapter.name!r}: its file holds what its tensors make, not the tensors ({adapter.settings.method}"
            "), so that training cannot go on from it. Load it under another name."
        )
    prefix = FORMAT_OF[type(adapter.settings)].prefix
    adapter.load_state_({key.removeprefix(prefix): tensor for key, tensor in tensors.items()})


def embedding_copies(model: Any, config: PeftConfig, wanted: bool | str) -> dict[str, Tensor]:
    """Return the base's own embeddings as PEFT's file has them beside an adapter.

    Args:
        wanted: "auto": where the adapter is on one of them, and these alone.
    """
    names: Any = getattr(config, "target_modules", None) or ()
    rule = TargetNames(names if isinstance(names, str) else tuple(names))
    paths = module_paths([name for name, _ in model.named_modules()])
    targeted = any(path.rpartition(".")[2] in _EMBEDDINGS and rule.matches(path) for path in paths)
    if getattr(config, "trainable_token_indices", None) is None and wanted == "auto":
        wanted = targeted
    found: dict[str, Tensor] = {}
    for layer in [model.get_input_embeddings(), model.get_output_embeddings()] if wanted is True else []:
        inner = getattr(layer, "base_layer", None)
        own = inner if targeted else layer
        path = next((name for name, module in model.named_modules() if module is own), None)
        if own is not None and path is not None:
            found |= {f"{PEFT_PREFIX}{path}.{key}": tensor for key, tensor in own.state_dict().items()}
    return found


def save(
    front: Any, names: Sequence[str], place: Path, embeddings: bool | str, state_dict: Mapping[str, Tensor] | None
) -> None:
    """Write adapters of a PeftModel: "default" into the folder `place`, others into folders of their names in it.

    Args:
        embeddings: as `wanted` of `embedding_copies`.
        state_dict: the whole model's, gathered elsewhere; None: as it is.

    Raises:
        ConfigError: `place` is a file.
        FileFormatError: `state_dict` does not hold an adapter.
    """
    if place.is_file():
        raise ConfigError(f"{place}: is a file. Name a folder.")
    for name in names:
        adapter, config, model = front.adapter(name), front.peft_config[name], front.get_base_model()
        own = file_tensors(adapter) if state_dict is None else tensors_among(front, adapter, state_dict)
        beside = embedding_copies(model, config, embeddings)
        write(place if name == "default" else place / name, adapter, config, model, {**own, **beside})


def write(
    folder: Path, adapter: Adapter, config: PeftConfig, model: Any, tensors: Mapping[str, Tensor],
) -> None:  # fmt: skip
    """Write an adapter's tensors and its configuration into a folder.

    The configuration's base_model_name_or_path is set from the model where it is None, as PEFT does.
    """
    write_file(folder / TENSORS_NAME, tensor_bytes(tensors), writing="the adapter")
    name = getattr(model, "name_or_path", None) or None
    config.base_model_name_or_path = config.base_model_name_or_path or name
    stored: Any = replace(config, inference_mode=True)
    settings = adapter.settings
    if isinstance(settings, Lora) and start.takes_from_base(settings.init_lora_weights):
        plain = settings_in_file(settings)
        changed = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "init_lora_weights")
        stored = replace(stored, **{field: getattr(plain, field) for field in changed})
    mapping = None
    if config.task_type is None:
        mapping = {"base_model_class": type(model).__name__, "parent_library": type(model).__module__}
    stored.save_pretrained(folder, auto_mapping_dict=mapping)


def with_head(stored: StoredAdapter, bank: Bank, config: PeftConfig, task: str | None) -> StoredAdapter:
    """Return a stored adapter that is to be trained with the base's own head for its task beside it, if it holds none.

    The configuration is completed, as for a new adapter.
    """
    heads = HEADS.get(task or "", ())
    paths = [path for path in saved_modules(bank.places, heads) if not any(lies_in(n, path) for n in stored.tensors)]
    if not paths:
        return stored
    warnings.warn(
        f"{stored.folder}: holds no {', '.join(paths)}; the model's own is trained and saved with the adapter",
        stacklevel=4,
    )
    config_: Any = config
    config_.modules_to_save = [*(config_.modules_to_save or ()), *heads]
    settings: Any = stored.settings
    settings = settings.model_copy(update={"modules_to_save": [*(settings.modules_to_save or ()), *paths]})
    own = {f"{path}.{name}": tensor for path in paths for name, tensor in plain_state(bank.places.module(path)).items()}
    return replace(stored, settings=settings, tensors={**stored.tensors, **own})


def read(folder: Path, bank: Bank) -> StoredAdapter:
    """Return the adapter in a folder as it fits the bank's base.

    Its base is checked where both sides say which weights they are: a record of ours, and a model from a folder.

    Raises:
        FileFormatError: it is damaged, or another base's.
    """
    stored = read_adapter(folder)
    for note in stored.notes:
        if stored.record is not None:
            warnings.warn(note, stacklevel=4)
    base = bank.base
    known = False
    if stored.record is not None and base.folder is not None:
        try:
            base.fingerprint = fingerprint(base.folder)
            known = True
        except ModelError:
            known = False
    if stored.record is not None and not known:
        warnings.warn(
            f"{folder}: the model in memory does not say which weights it has, so nobody can tell whether the adapter was "
            f"trained on them ({stored.record.base})",
            stacklevel=4,
        )
    return fitted(bank, stored, allow_base_mismatch=not known)
