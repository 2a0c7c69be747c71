"""An adapter with the base that its configuration names, opened together."""

from __future__ import annotations

from pathlib import Path

from onebase.base import pretrained
from onebase.base.device import resolve_device, resolve_dtype
from onebase.errors import ModelError
from onebase.peft.config import PeftConfig
from onebase.peft.model import PeftModel


class AutoPeftModelForCausalLM:
    """Opens a causal language model's adapter on its base."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, adapter_name: str = "default", is_trainable: bool = False,
        *, dtype: str = "auto", device: str = "auto",
    ) -> PeftModel:  # fmt: skip
        """Return the adapter in a folder on the base that it names.

        Raises:
            FileFormatError: the folder holds no adapter, or a damaged one.
            ModelError: it names no base, or one that cannot be opened.
        """
        name = PeftConfig.from_pretrained(pretrained_model_name_or_path).base_model_name_or_path
        if not name:
            raise ModelError(
                f"{pretrained_model_name_or_path}: adapter_config.json names no base_model_name_or_path. Open the model "
                "yourself, and PeftModel.from_pretrained(model, ...)."
            )
        chosen = resolve_device(device)
        model, _, _ = pretrained.open_pretrained(
            pretrained.locate(name), dtype=resolve_dtype(dtype, chosen), device=chosen
        )
        return PeftModel.from_pretrained(model, pretrained_model_name_or_path, adapter_name, is_trainable)
