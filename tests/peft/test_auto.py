"""An adapter and the base that it names, opened together: by the class for its task, with peft's files and by peft."""

import json
from typing import Any

import peft
import pytest
import torch
import transformers

import onebase.peft as ours
from onebase.errors import ConfigError, ModelError
from tests import tiny
from tests.peft.pairs import CLOSE, fill_, ids_of, model_of, quietly

TASKS: dict[str, Any] = {
    "CausalLM": ("CAUSAL_LM", "LlamaForCausalLM", "llama", {}),
    "SequenceClassification": ("SEQ_CLS", "BertForSequenceClassification", "bert", {"num_labels": 3}),
    "TokenClassification": ("TOKEN_CLS", "BertForTokenClassification", "bert", {"num_labels": 3}),
    "QuestionAnswering": ("QUESTION_ANS", "BertForQuestionAnswering", "bert", {}),
    "FeatureExtraction": ("FEATURE_EXTRACTION", "BertModel", "bert", {}),
    "Seq2SeqLM": ("SEQ_2_SEQ_LM", "T5ForConditionalGeneration", "t5", {}),
}


def stored(lib: Any, kind: str, folder: Any) -> Any:
    """Write a base and a library's adapter on it, and return the adapted model."""
    task, class_name, name, changes = TASKS[kind]
    config = model_of(name, **changes).config if "num_labels" in changes else tiny.model_of(name).config
    torch.manual_seed(1)
    base = getattr(transformers, class_name)(config).eval()
    base.save_pretrained(folder / "base")
    opened = type(base).from_pretrained(folder / "base")
    model = quietly(lambda: lib.get_peft_model(opened, lib.LoraConfig(task_type=task, r=2)))
    fill_(model)
    quietly(lambda: model.save_pretrained(folder / "adapter"))
    return model.eval()


def numbers(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": ids_of(seed=1)} if model.config.is_encoder_decoder else {}
    out = model(input_ids=ids_of(), **more)
    return next(out[key] for key in ("logits", "start_logits", "last_hidden_state") if key in out)


@pytest.mark.parametrize("kind", TASKS)
@pytest.mark.parametrize("writer", [peft, ours], ids=["peft", "ours"])
def test_each_opens_what_the_other_wrote_by_the_class_for_its_task(kind, writer, tmp_path) -> None:
    expected = numbers(stored(writer, kind, tmp_path))
    for lib in (peft, ours):
        opened = quietly(lambda lib=lib: getattr(lib, f"AutoPeftModelFor{kind}").from_pretrained(tmp_path / "adapter"))
        torch.testing.assert_close(numbers(opened), expected, **CLOSE)
        assert not opened.training


def test_a_classifier_on_a_plain_base_is_opened_with_the_head_that_the_adapter_holds(tmp_path) -> None:
    expected = numbers(stored(ours, "SequenceClassification", tmp_path))
    full = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    full.bert.save_pretrained(tmp_path / "base")
    for lib in (peft, ours):
        kind = lib.AutoPeftModelForSequenceClassification
        opened = quietly(lambda kind=kind: kind.from_pretrained(tmp_path / "adapter", num_labels=3))
        torch.testing.assert_close(numbers(opened), expected, **CLOSE)
    (tmp_path / "base" / "config.json").write_text(
        json.dumps(full.bert.config.to_dict() | {"architectures": ["BertModel"]})
    )
    with pytest.raises(ModelError, match=r"is a BertModel, which .* does not open: give num_labels"):
        kind.from_pretrained(tmp_path / "adapter")


def test_the_class_for_another_task_is_refused_as_in_peft(tmp_path) -> None:
    stored(ours, "SequenceClassification", tmp_path)
    with pytest.raises(ValueError, match="Expected target PEFT class"):
        peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="task_type is SEQ_CLS, and AutoPeftModelForCausalLM opens CAUSAL_LM"):
        ours.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_type": "TOKEN_CLS"}))
    with pytest.raises(ConfigError, match="num_labels: AutoPeftModelForTokenClassification opens the head"):
        ours.AutoPeftModelForTokenClassification.from_pretrained(tmp_path / "adapter", num_labels=3)


def test_an_adapter_without_a_task_is_opened_by_the_class_without_one(tmp_path) -> None:
    expected = numbers(stored(ours, "CausalLM", tmp_path))
    for lib in (peft, ours):
        with pytest.raises(ValueError, match="AutoPeftModelForCausalLM"):
            lib.AutoPeftModel.from_pretrained(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    content = json.loads(path.read_text()) | {"task_type": None}
    kinds = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers.models.llama.modeling_llama"}
    path.write_text(json.dumps(content | {"auto_mapping": kinds}))
    for lib in (peft, ours):
        opened = quietly(lambda lib=lib: lib.AutoPeftModel.from_pretrained(tmp_path / "adapter"))
        torch.testing.assert_close(numbers(opened), expected, **CLOSE)
    path.write_text(json.dumps(content | {"auto_mapping": kinds | {"base_model_class": "LlamaModel"}}))
    with pytest.raises(ModelError, match="is a LlamaForCausalLM, which is not the LlamaModel that the adapter is for"):
        ours.AutoPeftModel.from_pretrained(tmp_path / "adapter")


def test_dtypes_and_devices_mean_what_they_mean_in_transformers(tmp_path) -> None:
    stored(ours, "CausalLM", tmp_path)
    config = tmp_path / "base" / "config.json"
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").bfloat16()
    base.save_pretrained(tmp_path / "base")
    assert json.loads(config.read_text())["dtype"] == "bfloat16"
    for given in (
        {}, {"dtype": "auto"}, {"torch_dtype": "auto"}, {"dtype": torch.float32}, {"torch_dtype": torch.float32},
        {"dtype": "float32"}, {"device_map": "cpu", "low_cpu_mem_usage": True}, {"device_map": {"": "cpu"}},
    ):  # fmt: skip
        found = [
            quietly(lambda lib=lib, g=given: lib.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", **g))
            for lib in (peft, ours)
        ]
        states = [{name: (p.dtype, p.device) for name, p in model.named_parameters()} for model in found]
        assert states[0] == states[1], given
    kind = ours.AutoPeftModelForCausalLM
    with pytest.raises(ConfigError, match=r"load_in_4bit: is not taken here, got True. Open the model yourself"):
        kind.from_pretrained(tmp_path / "adapter", load_in_4bit=True, token=None)
    with pytest.raises(ConfigError, match="torch_dtype: is dtype's old name"):
        kind.from_pretrained(tmp_path / "adapter", dtype="auto", torch_dtype=torch.float16)
    with pytest.raises(ConfigError, match="device_map: must be one device for the whole model"):
        kind.from_pretrained(tmp_path / "adapter", device_map={"model.embed_tokens": 0, "lm_head": "cpu"})
