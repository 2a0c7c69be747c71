"""The task_type of a file, both ways: which of PEFT's classes opens it, and the heads that those train unasked."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers

from onebase.adapters.bank import Bank
from onebase.base.model import Base
from onebase.config.methods import Lora
from onebase.files.peft_format import read_adapter
from onebase.train import saving
from tests import tiny
from tests.laws.test_peft_both_ways import CLOSE, trained

ALL = tiny.ARCHITECTURES | tiny.ENCODERS | tiny.NATIVE
QUERIES = r".*(q_proj|\.query|\.q|q_lin)"
WITH_HEADS: dict[str, tuple[str, str, str]] = {
    "BertForSequenceClassification": ("bert", "SEQ_CLS", "classifier"),
    "RobertaForSequenceClassification": ("roberta", "SEQ_CLS", "classifier"),
    "DistilBertForSequenceClassification": ("distilbert", "SEQ_CLS", "classifier"),
    "LlamaForSequenceClassification": ("llama", "SEQ_CLS", "score"),
    "BertForTokenClassification": ("bert", "TOKEN_CLS", "classifier"),
    "BertForQuestionAnswering": ("bert", "QUESTION_ANS", "qa_outputs"),
}


def headed(name: str) -> Any:
    """Return a tiny random model of transformers' class of this name, its head away from zero."""
    _, config_class, sizes = (tiny.ARCHITECTURES | tiny.ENCODERS)[WITH_HEADS[name][0]]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**{"pad_token_id": 0, **sizes})
        model = getattr(transformers, name)(config)
        for parameter in model.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


@pytest.mark.parametrize("kind", ["lora", "ia3", "ln-tuning"])
@pytest.mark.parametrize("name", WITH_HEADS)
def test_a_head_that_peft_trains_unasked_is_read_and_written_as_its_own(
    name: str, kind: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    _, task, head = WITH_HEADS[name]
    theirs = {
        "lora": peft.LoraConfig(task_type=task, r=2, target_modules=QUERIES),
        "ia3": peft.IA3Config(task_type=task, target_modules=QUERIES, feedforward_modules=[]),
        "ln-tuning": peft.LNTuningConfig(task_type=task, target_modules=".*(norm|LayerNorm)"),
    }[kind]
    ids = torch.arange(3, 24).view(3, 7)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    wrapped = trained(headed(name), theirs)
    wrapped.save_pretrained(tmp_path / "theirs")
    with torch.no_grad():
        expected = wrapped(**inputs)[0]

    bank = Bank(Base(headed(name)))
    stored = read_adapter(tmp_path / "theirs")
    adapter = bank.add("one", stored.settings, tensors=stored.tensors)
    assert any(part.path.endswith(head) for part in adapter.parts) and len(stored.notes) == 1  # no onebase.json
    with torch.no_grad(), bank.base.native(bank.sole_route("one")) as model:
        torch.testing.assert_close(model(**inputs)[0], expected, **CLOSE)

    saving.write(tmp_path / "ours", bank.base, adapter, task="chat")
    assert json.loads((tmp_path / "ours" / "adapter_config.json").read_text())["task_type"] == task
    recwarn.clear()
    again = peft.PeftModel.from_pretrained(headed(name), tmp_path / "ours").eval()
    assert type(again) is type(wrapped)
    assert not [str(one.message) for one in recwarn if "adapter keys" in str(one.message)]
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs)[0], expected, **CLOSE)


TASKS: dict[str, tuple[str, dict[str, Any], str | None]] = {
    "causal": ("LlamaForCausalLM", {}, "CAUSAL_LM"),
    "sequence to sequence": ("T5ForConditionalGeneration", {}, "SEQ_2_SEQ_LM"),
    "two stacks, no head": ("T5Model", {}, None),
    "encoder": ("BertModel", {}, "FEATURE_EXTRACTION"),
    "images": ("ViTForImageClassification", {}, None),
    "classifier, its head not trained": ("BertForSequenceClassification", {}, None),
    "classifier": ("BertForSequenceClassification", {"modules_to_save": ["classifier"]}, "SEQ_CLS"),
}


@pytest.mark.parametrize("case", TASKS)
def test_peft_opens_an_adapter_as_the_class_of_the_models_task(
    case: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    name, more, task = TASKS[case]
    own = next(n for n, (_, c, _) in ALL.items() if c.removesuffix("Config") == re.split("For|Model", name)[0])
    _, config_class, sizes = ALL[own]
    config = getattr(transformers, config_class)(**{"pad_token_id": 0, **sizes})
    bank = Bank(Base(getattr(transformers, name)(config)))
    saving.write(tmp_path / "a", bank.base, bank.add("one", Lora(r=2, target_modules=QUERIES, **more)), task="chat")
    recwarn.clear()
    wrapped = peft.PeftModel.from_pretrained(getattr(transformers, name)(config), tmp_path / "a")
    assert wrapped.peft_config["default"].task_type == task
    assert type(wrapped) is (peft.PeftModel if task is None else peft.MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task])
    assert not [str(one.message) for one in recwarn if "adapter keys" in str(one.message)]
