"""What code written for PEFT may get wrong, or ask for and not get, is said in one sentence with what to do."""

import re

import peft
import pytest
from peft.utils import constants

import onebase.peft as ours
from onebase.errors import ConfigError, FileFormatError, TargetError
from onebase.peft import defaults
from tests.peft.pairs import front_of, ids_of, model_of


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("LoraConfig", {"lora_rank": 4}, "lora_rank: no field of LoraConfig; closest is"),
        ("LoraConfig", {"zzz": 4}, "zzz: no field of LoraConfig; there are"),
        ("LoraConfig", {"use_qalora": True}, "use_qalora: QALoRA is not in this onebase, got True. Remove it, or use peft"),
        ("LoraConfig", {"loftq_config": {"loftq_bits": 4}}, "loftq_config: LoftQ's start"),
        ("LoraConfig", {"target_modules": 5}, "target_modules: must be a list of names or a regular expression, got 5"),
        ("LoraConfig", {"target_modules": "(["}, "target_modules: must be a list of names or a regular expression"),
        ("IA3Config", {"exclude_modules": [5]}, "exclude_modules: must be a list of names or a regular expression"),
        ("LoraConfig", {"r": 0}, "r: must be at least 1, got 0"),
        ("LoraConfig", {"init_lora_weights": "eva"}, "init_lora_weights"),
        ("LoraConfig", {"task_type": "CAUSAL"}, "task_type must be one of SEQ_CLS, .*got 'CAUSAL'"),
        ("LoraConfig", {"layers_pattern": "h"}, "layers_pattern needs layers_to_transform"),
        ("LoraConfig", {"target_modules": "all-linear", "layers_to_transform": [0]}, "layers_to_transform chooses among names"),
        ("IA3Config", {"target_modules": ["a"], "feedforward_modules": ["b"]}, "got b beside them"),
        ("PromptTuningConfig", {}, "num_virtual_tokens is not given"),
        ("PromptTuningConfig", {"num_virtual_tokens": 3, "prompt_tuning_init": "TEXT"}, "needs tokenizer_name_or_path and"),
        ("PromptTuningConfig", {"num_virtual_tokens": 3, "task_type": "QUESTION_ANS"}, "QUESTION_ANS is not in this onebase"),
        ("PrefixTuningConfig", {"num_virtual_tokens": 3, "init_weights": "one"}, "must be None or 'zero', got 'one'"),
    ],
)  # fmt: skip
def test_a_configuration_that_means_nothing_here_is_refused_when_it_is_made(kind, fields, words) -> None:
    with pytest.raises(ConfigError, match=words):
        getattr(ours, kind)(**fields)


def test_targets_that_match_nothing_are_refused_and_one_of_several_is_warned_about() -> None:
    model = model_of("llama")
    with pytest.raises(TargetError, match=r"target_modules 'nope' matches no module .* there are .*q_proj"):
        ours.get_peft_model(model, ours.LoraConfig(target_modules=["nope"]))
    with pytest.raises(TargetError, match="no default for model_type 'phi3'"):
        ours.get_peft_model(model_of("phi3"), ours.LoraConfig())
    with pytest.warns(UserWarning, match="'nope' matches no module"):
        ours.get_peft_model(model_of("llama"), ours.LoraConfig(target_modules=["q_proj", "nope"]))
    with pytest.warns(UserWarning, match="rank_pattern: 'k_proj' matches no target"):
        ours.get_peft_model(model_of("llama"), ours.LoraConfig(target_modules=["q_proj"], rank_pattern={"k_proj": 2}))
    with pytest.warns(UserWarning, match="modules_to_save: 'nope' matches no module"):
        ours.get_peft_model(model_of("llama"), ours.LoraConfig(target_modules=["q_proj"], modules_to_save=["nope"]))


def test_names_of_adapters_are_checked() -> None:
    front = front_of(ours, "llama", "LoraConfig")
    for call in (front.set_adapter, front.delete_adapter):
        with pytest.raises(ConfigError, match="no adapter 'b'; there is 'default'"):
            call("b")
    with pytest.raises(ConfigError, match="'default' already exists"):
        front.add_adapter("default", ours.LoraConfig())
    with pytest.raises(ConfigError, match="an adapter's name must begin with"):
        front.add_adapter("../b", ours.LoraConfig())
    for name in ("b.c", "__base__"):
        with pytest.raises(ConfigError, match="an adapter cannot be called"):
            front.add_adapter(name, ours.LoraConfig())
    with pytest.raises(ConfigError, match="IA3 adapter cannot stand beside LORA"):
        front.add_adapter("b", ours.IA3Config())
    with pytest.raises(ConfigError, match="no adapter 'b'"):
        front(input_ids=ids_of(1), adapter_names=["b"]) if front.eval() else None
    with pytest.raises(ConfigError, match="in training"):
        front.train()(input_ids=ids_of(1), adapter_names=["default"])
    assert [*front.peft_config] == ["default"]
    assert front(input_ids=ids_of()).logits.isfinite().all()


def test_a_model_has_one_front_at_a_time() -> None:
    front = front_of(ours, "llama", "LoraConfig")
    with pytest.raises(ConfigError, match="has adapters already"):
        ours.get_peft_model(front, ours.LoraConfig())
    with pytest.raises(ConfigError, match="several methods on one model"):
        ours.get_peft_model(model_of("llama"), ours.LoraConfig(), "default", True)
    with pytest.raises(ConfigError, match="already has a bank"):
        ours.get_peft_model(front.get_base_model(), ours.LoraConfig())


def test_what_is_no_model_or_no_configuration_is_refused() -> None:
    with pytest.raises(ConfigError, match="peft_config must be a PeftConfig, got NoneType"):
        ours.get_peft_model(model_of("llama"), None)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="model must be a Module, got str"):
        ours.get_peft_model("gpt2", ours.LoraConfig())


def test_folders_and_tensors_that_do_not_fit_are_refused(tmp_path) -> None:
    front = front_of(ours, "llama", "LoraConfig")
    with pytest.raises(FileFormatError, match="no such folder"):
        ours.PeftModel.from_pretrained(model_of("llama"), tmp_path / "none")
    front.save_pretrained(tmp_path / "a")
    with pytest.raises(FileFormatError, match=r"belongs to no target|is missing|must have shape"):
        ours.PeftModel.from_pretrained(model_of("llama", hidden_size=64, intermediate_size=96), tmp_path / "a")
    state = ours.get_peft_model_state_dict(front)
    with pytest.raises(FileFormatError, match="is missing"):
        ours.set_peft_model_state_dict(front, dict(list(state.items())[1:]))
    with pytest.raises(ConfigError, match="never as pickles"):
        front.save_pretrained(tmp_path / "b", safe_serialization=False)
    with pytest.raises(ConfigError, match="no adapter 'b'"):
        front.save_pretrained(tmp_path / "b", selected_adapters=["b"])
    assert not (tmp_path / "b").exists()


def test_prefix_tuning_and_gradient_checkpointing_do_not_go_together() -> None:
    front = front_of(ours, "llama", "PrefixTuningConfig", num_virtual_tokens=2, task_type="CAUSAL_LM")
    with pytest.raises(ConfigError, match="does not work with gradient checkpointing"):
        front.gradient_checkpointing_enable()
    with pytest.raises(ConfigError, match="cannot be merged"):
        front.merge_adapter()


def test_default_targets_are_peft_s() -> None:
    for ours_, theirs in (
        (defaults.LORA_TARGETS, constants.TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING),
        (defaults.IA3_TARGETS, constants.TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING),
        (defaults.IA3_FEEDFORWARD, constants.TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING),
        (defaults.LN_TARGETS, constants.TRANSFORMERS_MODELS_TO_LNTUNING_TARGET_MODULES_MAPPING),
    ):
        assert {k: v if isinstance(v, str) else list(v) for k, v in ours_.items()} == theirs


def test_fields_and_defaults_are_peft_s() -> None:
    from dataclasses import fields

    for kind in ("LoraConfig", "IA3Config", "LNTuningConfig", "PromptTuningConfig", "PrefixTuningConfig"):
        theirs, mine = getattr(peft, kind), getattr(ours, kind)
        given = {"num_virtual_tokens": 3} if "Tuning" in kind and kind != "LNTuningConfig" else {}
        assert [f.name for f in fields(theirs) if f.name != "runtime_config"] == [f.name for f in fields(mine)]
        expected = theirs(**given).to_dict()
        expected.pop("runtime_config", None)
        assert mine(**given).to_dict() == expected


def test_every_public_name_of_ours_is_one_of_peft_s() -> None:
    assert {name for name in ours.__all__ if not hasattr(peft, name)} == set()
    assert [*ours.TaskType] == [str(task.value) for task in peft.TaskType]
    assert {*ours.PeftType} <= {kind.value for kind in peft.PeftType}


def test_a_stored_field_that_nobody_knows_is_mentioned(tmp_path) -> None:
    ours.LoraConfig(target_modules=["q_proj"]).save_pretrained(tmp_path)
    text = (tmp_path / "adapter_config.json").read_text()
    (tmp_path / "adapter_config.json").write_text(re.sub(r'"r": 8', '"r": 8, "new_field": 3', text))
    with pytest.warns(UserWarning, match="new_field is not known"):
        config = ours.PeftConfig.from_pretrained(tmp_path)
    assert isinstance(config, ours.LoraConfig)
    assert config.r == 8
