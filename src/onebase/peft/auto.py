"""Adapters with the bases that their configurations name, opened together: a class for each task."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch

from onebase.base import pretrained
from onebase.base.device import resolve_device, resolve_dtype
from onebase.config.labels import Labels
from onebase.errors import ConfigError, ModelError, list_problems
from onebase.peft.config import PeftConfig, TaskType
from onebase.peft.model import PeftModel

_NO_EFFECT = ("low_cpu_mem_usage", "use_safetensors", "local_files_only", "ephemeral_gpu_offload", "import_allowlist")
"""What PEFT and transformers take, and what is so or means nothing here."""
_BY_HAND = "Open the model yourself, and PeftModel.from_pretrained(model, ...)."


class AutoPeftModel:
    """Opens an adapter without a task_type on the base that it names; each of the other classes one of its task."""

    task: ClassVar[TaskType | None] = None
    ends: ClassVar[tuple[str, ...]] = ()
    """How the names of the classes end that a base of this task is opened as."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, adapter_name: str = "default", is_trainable: bool = False,
        config: PeftConfig | None = None, *, dtype: Any = None, device_map: Any = None, num_labels: int | None = None,
        **others: Any,
    ) -> PeftModel:  # fmt: skip
        """Return the adapter in a folder on the base that it names.

        Args:
            dtype: torch's, or its name; "auto", which is what transformers does without one: as the base is stored.
            device_map: one device, or "auto": the GPU where there is one; None: the CPU.
            num_labels: the outputs of a classifier's head, where the base has none of its own; the adapter holds it.
            others: torch_dtype, which is dtype's old name, and trust_remote_code; what else from_pretrained takes in
                transformers is refused, unless it has no effect.

        Raises:
            ConfigError: the adapter is for another task, or an argument is not taken.
            FileFormatError: the folder holds no adapter, or a damaged one.
            ModelError: it names no base, one that cannot be opened, or one that is for another task.
        """
        place = pretrained_model_name_or_path
        dtype = _dtype(dtype, others.pop("torch_dtype", None))
        trusted = bool(others.pop("trust_remote_code", False))
        stored = PeftConfig.from_pretrained(place)
        cls._check(place, stored, num_labels, others)
        if not (name := stored.base_model_name_or_path):
            raise ModelError(f"{place}: adapter_config.json names no base_model_name_or_path. {_BY_HAND}")
        device = _device(device_map)
        model, _, _ = pretrained.open_pretrained(
            pretrained.locate(name),
            dtype=dtype,
            device=device,
            labels=None if num_labels is None else Labels(*_problem(num_labels)),
            trust_remote_code=trusted,
        )
        kind, ends = type(model).__name__, cls.ends or (str((stored.auto_mapping or {}).get("base_model_class")),)
        if not kind.endswith(ends) or (not cls.ends and kind not in ends):
            told = ": give num_labels. Or open" if cls.task == TaskType.SEQ_CLS else ". Open"
            what = f"{cls.__name__} does not open" if cls.ends else f"is not the {ends[0]} that the adapter is for"
            raise ModelError(f"{name} is a {kind}, which {what}{told}{_BY_HAND.removeprefix('Open')}")
        return PeftModel.from_pretrained(model, place, adapter_name, is_trainable, config)

    @classmethod
    def _check(cls, place: Any, config: PeftConfig, num_labels: int | None, others: Mapping[str, Any]) -> None:
        """Raise unless the adapter is for this class, and every argument means something."""
        task = config.task_type
        if cls.task is None and task is not None:
            right = next(kind.__name__ for kind in AutoPeftModel.__subclasses__() if kind.task == task)
            raise ConfigError(
                f"{place}: task_type is {task}, and AutoPeftModel opens adapters without one. Use {right}."
            )
        if task not in (None, cls.task):
            raise ConfigError(
                f"{place}: task_type is {task}, and {cls.__name__} opens {cls.task}. Use the class for its task, or "
                "PeftModel.from_pretrained(model, ...)."
            )
        problems = [
            f"{name}: is not taken here, got {value!r}. {_BY_HAND}"
            for name, value in others.items()
            if name not in _NO_EFFECT and value not in (None, False)
        ]
        if num_labels is not None and cls.task != TaskType.SEQ_CLS:
            problems.append(f"num_labels: {cls.__name__} opens the head that the base has. {_BY_HAND}")
        if problems:
            raise ConfigError(list_problems(cls.__name__, problems))


def _dtype(dtype: Any, torch_dtype: Any) -> Any:
    """Return torch's dtype, or None for that of the base's files."""
    if None not in (dtype, torch_dtype) and dtype != torch_dtype:
        raise ConfigError(f"torch_dtype: is dtype's old name, got {torch_dtype!r} beside dtype={dtype!r}. Remove it.")
    chosen = torch_dtype if dtype is None else dtype
    return None if chosen in (None, "auto") else resolve_dtype(str(chosen).removeprefix("torch."))


def _device(device_map: Any) -> str:
    """Return the one device that a whole model goes to."""
    if isinstance(device_map, Mapping) and [*device_map] == [""]:
        device_map = device_map[""]
    if isinstance(device_map, int):
        device_map = f"cuda:{device_map}"
    if isinstance(device_map, str | torch.device | None):
        return "cpu" if device_map is None else resolve_device(str(device_map))
    raise ConfigError(
        f"device_map: must be one device for the whole model, as 'auto' or {{'': 'cuda:0'}}, got {device_map!r}. {_BY_HAND}"
    )


def _problem(num_labels: int) -> Any:
    names = tuple(f"LABEL_{number}" for number in range(num_labels))
    return ("regression", ()) if num_labels == 1 else ("single_label_classification", names)


class AutoPeftModelForCausalLM(AutoPeftModel):
    """Opens a causal language model's adapter on its base."""

    task, ends = TaskType.CAUSAL_LM, ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


class AutoPeftModelForSeq2SeqLM(AutoPeftModel):
    """Opens an encoder-decoder's adapter on its base."""

    task, ends = TaskType.SEQ_2_SEQ_LM, ("ForConditionalGeneration",)


class AutoPeftModelForSequenceClassification(AutoPeftModel):
    """Opens a classifier's adapter on its base; `num_labels` where the base is a plain language model."""

    task, ends = TaskType.SEQ_CLS, ("ForSequenceClassification",)


class AutoPeftModelForTokenClassification(AutoPeftModel):
    """Opens the adapter of a classifier of tokens on its base."""

    task, ends = TaskType.TOKEN_CLS, ("ForTokenClassification",)


class AutoPeftModelForQuestionAnswering(AutoPeftModel):
    """Opens an adapter for extracting answers on its base."""

    task, ends = TaskType.QUESTION_ANS, ("ForQuestionAnswering",)


class AutoPeftModelForFeatureExtraction(AutoPeftModel):
    """Opens the adapter of a model without a head on its base."""

    task, ends = TaskType.FEATURE_EXTRACTION, ("Model",)
