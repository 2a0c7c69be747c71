"""A PeftModel for each task, by which scripts ask with `isinstance` what they have. Nothing more is in them."""

from onebase.peft.config import TaskType
from onebase.peft.model import PeftModel


class PeftModelForSequenceClassification(PeftModel):
    """A classifier with adapters; its head is trained and saved with each."""

    task = TaskType.SEQ_CLS


class PeftModelForSeq2SeqLM(PeftModel):
    """An encoder-decoder with adapters."""

    task = TaskType.SEQ_2_SEQ_LM


class PeftModelForCausalLM(PeftModel):
    """A causal language model with adapters."""

    task = TaskType.CAUSAL_LM


class PeftModelForTokenClassification(PeftModel):
    """A classifier of tokens with adapters; its head is trained and saved with each."""

    task = TaskType.TOKEN_CLS


class PeftModelForQuestionAnswering(PeftModel):
    """A model that extracts answers, with adapters; its head is trained and saved with each."""

    task = TaskType.QUESTION_ANS


class PeftModelForFeatureExtraction(PeftModel):
    """A model without a head, with adapters."""

    task = TaskType.FEATURE_EXTRACTION


MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {
    TaskType.SEQ_CLS: PeftModelForSequenceClassification,
    TaskType.SEQ_2_SEQ_LM: PeftModelForSeq2SeqLM,
    TaskType.CAUSAL_LM: PeftModelForCausalLM,
    TaskType.TOKEN_CLS: PeftModelForTokenClassification,
    TaskType.QUESTION_ANS: PeftModelForQuestionAnswering,
    TaskType.FEATURE_EXTRACTION: PeftModelForFeatureExtraction,
}
PeftModel.of_task.update(MODEL_TYPE_TO_PEFT_MODEL_MAPPING)
