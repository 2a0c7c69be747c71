"""PEFT's functions beside its classes: a model with its first adapter, and an adapter's tensors out and in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.modules.module import _IncompatibleKeys

from onebase.errors import ConfigError
from onebase.peft import folder
from onebase.peft.config import PeftConfig
from onebase.peft.model import PeftModel


def get_peft_model(
    model: Any, peft_config: PeftConfig, adapter_name: str = "default", mixed: bool = False,
    autocast_adapter_dtype: bool = True, revision: str | None = None, low_cpu_mem_usage: bool = False,
) -> PeftModel:  # fmt: skip
    """Return the model, changed in place, with a new adapter on it.

    Raises:
        ConfigError: a value that onebase does not take, or the model has adapters already.
        TargetError: the configuration names no module of the model.
    """
    if mixed:
        raise ConfigError("mixed: adapters of several methods on one model are not in this onebase. Use peft for them.")
    peft_config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    peft_config.revision = revision or peft_config.revision
    return PeftModel(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


def get_peft_model_state_dict(
    model: PeftModel, state_dict: Mapping[str, Tensor] | None = None, adapter_name: str = "default"
) -> dict[str, Tensor]:
    """Return an adapter's tensors under the keys of its file.

    Args:
        state_dict: the whole model's, gathered elsewhere; None: as it is.

    Raises:
        FileFormatError: `state_dict` does not hold the adapter.
    """
    adapter = model.adapter(adapter_name)
    return folder.file_tensors(adapter) if state_dict is None else folder.tensors_among(model, adapter, state_dict)


def set_peft_model_state_dict(
    model: PeftModel, peft_model_state_dict: Mapping[str, Tensor], adapter_name: str = "default"
) -> Any:
    """Copy tensors with the keys of a file into an adapter.

    Raises:
        FileFormatError: they are not those of this adapter; nothing is copied then.
    """
    folder.load_(model.adapter(adapter_name), peft_model_state_dict)
    return _IncompatibleKeys([], [])
