"""Adapters with the bases that their configurations name, opened together: a class for each task."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from onebase.base import pretrained
from onebase.base.device import resolve_device, resolve_dtype
from onebase.config.labels import Labels
from onebase.errors import ConfigError, ModelError
from onebase.peft.config import PeftConfig, TaskType
from onebase.peft.model import PeftModel


class AutoPeftModelOfTask:
    """Opens an adapter of one task on its base."""

    task: ClassVar[TaskType]
    ends: ClassVar[tuple[str, ...]]
    """How the names of the classes end that a base of this task is opened as."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | Path, adapter_name: str = "default", is_trainable: bool = False,
        *, dtype: Any = "auto", device: str = "auto", num_labels: int | None = None,
    ) -> PeftModel:  # fmt: skip
        """Return the adapter in a folder on the base that it names.

        Args:
            dtype: as the setting of that name, or torch's own.
            num_labels: the outputs of a classifier's head, where the base has none of its own; the adapter holds it.

        Raises:
            ConfigError: the adapter is for another task.
            FileFormatError: the folder holds no adapter, or a damaged one.
            ModelError: it names no base, one that cannot be opened, or one that is for another task.
        """
        place = pretrained_model_name_or_path
        config = PeftConfig.from_pretrained(place)
        name = config.base_model_name_or_path
        if not name:
            raise ModelError(
                f"{place}: adapter_config.json names no base_model_name_or_path. Open the model yourself, and "
                "PeftModel.from_pretrained(model, ...)."
            )
        if config.task_type not in (None, cls.task):
            raise ConfigError(
                f"{place}: task_type is {config.task_type}, and {cls.__name__} opens {cls.task}. Use the class for its "
                "task, or PeftModel.from_pretrained(model, ...)."
            )
        if num_labels is not None and cls.task != TaskType.SEQ_CLS:
            raise ConfigError(
                f"num_labels: {cls.__name__} opens the head that the base has. Open the model yourself, and "
                "PeftModel.from_pretrained(model, ...)."
            )
        chosen = resolve_device(device)
        labels = None if num_labels is None else Labels(*_problem(num_labels))
        model, _, _ = pretrained.open_pretrained(
            pretrained.locate(name),
            dtype=resolve_dtype(str(dtype).removeprefix("torch."), chosen),
            device=chosen,
            labels=labels,
        )
        if not type(model).__name__.endswith(cls.ends):
            raise ModelError(
                f"{name} is a {type(model).__name__}, which {cls.__name__} does not open"
                + (": give num_labels." if cls.task == TaskType.SEQ_CLS else ".")
                + " Or open the model yourself, and PeftModel.from_pretrained(model, ...)."
            )
        return PeftModel.from_pretrained(model, place, adapter_name, is_trainable)


def _problem(num_labels: int) -> Any:
    names = tuple(f"LABEL_{number}" for number in range(num_labels))
    return ("regression", ()) if num_labels == 1 else ("single_label_classification", names)


class AutoPeftModelForCausalLM(AutoPeftModelOfTask):
    """Opens a causal language model's adapter on its base."""

    task, ends = TaskType.CAUSAL_LM, ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


class AutoPeftModelForSeq2SeqLM(AutoPeftModelOfTask):
    """Opens an encoder-decoder's adapter on its base."""

    task, ends = TaskType.SEQ_2_SEQ_LM, ("ForConditionalGeneration",)


class AutoPeftModelForSequenceClassification(AutoPeftModelOfTask):
    """Opens a classifier's adapter on its base; `num_labels` where the base is a plain language model."""

    task, ends = TaskType.SEQ_CLS, ("ForSequenceClassification",)


class AutoPeftModelForTokenClassification(AutoPeftModelOfTask):
    """Opens the adapter of a classifier of tokens on its base."""

    task, ends = TaskType.TOKEN_CLS, ("ForTokenClassification",)


class AutoPeftModelForQuestionAnswering(AutoPeftModelOfTask):
    """Opens an adapter for extracting answers on its base."""

    task, ends = TaskType.QUESTION_ANS, ("ForQuestionAnswering",)


class AutoPeftModelForFeatureExtraction(AutoPeftModelOfTask):
    """Opens the adapter of a model without a head on its base."""

    task, ends = TaskType.FEATURE_EXTRACTION, ("Model",)
