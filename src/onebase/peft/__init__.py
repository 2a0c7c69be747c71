"""PEFT's own names over the bank: code written for PEFT runs with the import line changed.

    from onebase.peft import LoraConfig, get_peft_model  # was: from peft import ...

A front door beside `cli` and `api`. What runs and what differs: docs/peft.md. Here is no arithmetic: configurations become
settings, a bank goes on the user's own model, and its route gives every row to the active adapter.
"""

from onebase.peft.auto import (
    AutoPeftModelForCausalLM,
    AutoPeftModelForFeatureExtraction,
    AutoPeftModelForQuestionAnswering,
    AutoPeftModelForSeq2SeqLM,
    AutoPeftModelForSequenceClassification,
    AutoPeftModelForTokenClassification,
)
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
from onebase.peft.functions import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from onebase.peft.model import PeftModel

__all__ = [
    "AutoPeftModelForCausalLM", "AutoPeftModelForFeatureExtraction",
    "AutoPeftModelForQuestionAnswering", "AutoPeftModelForSeq2SeqLM",
    "AutoPeftModelForSequenceClassification", "AutoPeftModelForTokenClassification",
    "IA3Config", "LNTuningConfig", "LoraConfig", "PeftConfig", "PeftModel", "PeftType",
    "PrefixTuningConfig", "PromptLearningConfig", "PromptTuningConfig", "PromptTuningInit", "TaskType", "get_peft_model",
    "get_peft_model_state_dict", "set_peft_model_state_dict",
]  # fmt: skip
