"""PEFT's functions beside its classes: a model with its first adapter, an adapter's tensors out and in, dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import _IncompatibleKeys

from onebase.config.paths import checked_path
from onebase.errors import ConfigError
from onebase.files.peft_format import find_adapter, stored_tensors
from onebase.peft import folder
from onebase.peft.config import CONFIGS, PeftConfig
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
    for said, value, kind in (("model", model, nn.Module), ("peft_config", peft_config, PeftConfig)):
        if not isinstance(value, kind):
            raise ConfigError(f"get_peft_model: {said} must be a {kind.__name__}, got {type(value).__name__}.")
    peft_config.base_model_name_or_path = getattr(model, "name_or_path", None) or None
    peft_config.revision = revision or peft_config.revision
    front = PeftModel.of_task.get(peft_config.task_type or "", PeftModel)
    return front(model, peft_config, adapter_name, autocast_adapter_dtype, low_cpu_mem_usage)


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


def get_peft_config(config_dict: Mapping[str, Any]) -> PeftConfig:
    """Return the configuration of the method that `peft_type` names, with the other entries as its fields.

    Raises:
        ConfigError: there is no such method here, or an entry means nothing.
    """
    kind = CONFIGS.get(config_dict.get("peft_type", ""))
    if kind is None:
        raise ConfigError(
            f"get_peft_config: peft_type must be one of {', '.join(CONFIGS)}, got {config_dict.get('peft_type')!r}. Use "
            "peft for the others."
        )
    return kind(**config_dict)


def load_peft_weights(model_id: str | Path, device: str | None = None, *, subfolder: str | None = None) -> Any:
    """Return the tensors in an adapter's folder under the keys of its file; on the CPU unless `device` names another.

    Raises:
        FileFormatError: there is no adapter, or a damaged one.
    """
    found = stored_tensors(find_adapter(checked_path(model_id) / (subfolder or "")))
    return {name: tensor.to(device or "cpu") for name, tensor in found.items()}


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Cast what is not trained to a dtype and what is trained to fp32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(torch.float32 if parameter.requires_grad else dtype)


def prepare_model_for_kbit_training(
    model: Any, use_gradient_checkpointing: bool = True, gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:  # fmt: skip
    """Return a model that is not quantised, frozen and in fp32: what PEFT makes of such a one too.

    Args:
        use_gradient_checkpointing: and its kwargs: mean quantised models alone, as in PEFT.
        auto_clear_cache: empty the GPU's cache.

    Raises:
        ConfigError: the model is quantised.
    """
    if getattr(model, "quantization_method", None) or getattr(model, "is_quantized", False):
        raise ConfigError(
            f"prepare_model_for_kbit_training: a quantised {type(model).__name__} is not taken by onebase.peft. Open it "
            "without quantization_config (dtype=torch.bfloat16 takes half the memory), or use peft for it."
        )
    for parameter in model.parameters():
        half = parameter.dtype in (torch.float16, torch.bfloat16)
        parameter.requires_grad_(False).data = parameter.data.float() if half else parameter.data
    if auto_clear_cache and torch.cuda.is_available():
        torch.cuda.empty_cache()
    return model
