"""PEFT's own names over the bank: code written for PEFT runs with the import line changed.

    from onebase.peft import LoraConfig, get_peft_model  # was: from peft import ...

A front door beside `cli` and `api`. What runs and what differs: docs/peft.md. Here is no arithmetic: configurations become
settings, a bank goes on the user's own model, and its route gives every row to the active adapter.
"""

from typing import Any

from onebase.errors import OnebaseError as PeftError
from onebase.errors import TargetError as NoMatchingPeftModuleError
from onebase.peft.absent import ABSENT
from onebase.peft.auto import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
from onebase.peft.config import CONFIGS as PEFT_TYPE_TO_CONFIG_MAPPING
from onebase.peft.config import (
    IA3Config,
    LNTuningConfig,
    LoraConfig,
    PeftConfig,
    PeftType,
    PrefixTuningConfig,
    PromptLearningConfig,
    PromptTuningConfig,
    PromptTuningInit,
    TaskType,
)
from onebase.peft.functions import (
    cast_mixed_precision_params,
    get_peft_config,
    get_peft_model,
    get_peft_model_state_dict,
    load_peft_weights,
    prepare_model_for_kbit_training,
    set_peft_model_state_dict,
)
from onebase.peft.model import PeftModel
from onebase.peft.task_models import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

PeftWarning = UserWarning
"""What is warned about here; PEFT's is one too."""

__all__ = [
    "MODEL_TYPE_TO_PEFT_MODEL_MAPPING", "PEFT_TYPE_TO_CONFIG_MAPPING", "AutoPeftModel", "AutoPeftModelForCausalLM",
    "AutoPeftModelForFeatureExtraction", "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification", "AutoPeftModelForTokenClassification", "IA3Config", "LNTuningConfig",
    "LoraConfig", "NoMatchingPeftModuleError", "PeftConfig", "PeftError", "PeftModel", "PeftModelForCausalLM",
    "PeftModelForFeatureExtraction", "PeftModelForQuestionAnswering", "PeftModelForSeq2SeqLM",
    "PeftModelForSequenceClassification", "PeftModelForTokenClassification", "PeftType", "PeftWarning",
    "PrefixTuningConfig", "PromptLearningConfig", "PromptTuningConfig", "PromptTuningInit", "TaskType",
    "cast_mixed_precision_params", "get_peft_config", "get_peft_model", "get_peft_model_state_dict",
    "load_peft_weights", "prepare_model_for_kbit_training", "set_peft_model_state_dict",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Say why a name of PEFT's is not here.

    Raises:
        ImportError: it is one. Python would show nothing of an AttributeError's words where a name is imported.
    """
    if name in ABSENT:
        raise ImportError(f"onebase.peft: {name} {ABSENT[name]}", name=__name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
