"""Laws of a whole settings file's settings."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.config import DataPart, DataSettings, Lora, Settings, TrainSettings
from onebase.errors import ConfigError


def settings_of(**sections: Any) -> Settings:
    """Return settings from sections as plain values; `data` gets rows to learn from."""
    sections["data"] = {"train": "x"} | sections.get("data", {})
    return Settings(**({"model": "m"} | sections))


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"model": ""}, "model: must be text that is not empty, got ''."),
    (
        {"task": "seq2seq"},
        "task: must be 'chat', 'text', 'classify' or 'regress', got 'seq2seq'. 'seq2seq' is not available in this version.",
    ),
    ({"task": "chatt"}, "task: must be 'chat', 'text', 'classify' or 'regress', got 'chatt'. Closest is 'chat'."),
    ({"dtype": "bf16"}, "dtype: must be 'auto', 'float32' or 'bfloat16', got 'bf16'. Closest is 'bfloat16'."),
    ({"device": "gpu"}, "device: must be 'auto', 'cpu', 'cuda', 'cuda:1' or 'mps', got 'gpu'. Closest is 'cuda'."),
    ({"quantize": "4bit"}, "quantize: must be 'none', 'int8' or 'nf4', got '4bit'. Closest is 'nf4'."),
    ({"load_in_4bit": True}, "load_in_4bit: unknown setting; here it is 'quantize': write quantize: nf4."),
    ({"bnb_4bit_use_double_quant": True}, "bnb_4bit_use_double_quant: always so with quantize: nf4. Remove it."),
    ({"adapter": {"method": "qlora"}}, "got 'qlora'. Write method: lora, and outside of adapter quantize: nf4."),
    (
        {"sweep": {"grid": {}}},
        "sweep: not available in this version; run 'onebase train' once for each value, with --set.",
    ),
    ({"learning_rate": 1}, "learning_rate: unknown setting at this place; write it as train.learning_rate."),
    ({"lora_r": 8}, "lora_r: unknown setting; here it is 'adapter.r'."),
    ({"adapter": "lora"}, "adapter: must be a mapping, got 'lora'. Write, for example: adapter: {method: lora, r: 16}"),
    (
        {"adapter": {"method": "ia3", "r": 8}},
        "adapter.r: unknown setting of ia3; it belongs to lora. Remove it, or change the method.",
    ),
    (
        {"adapter": {"num_virtual_tokens": 8}},
        "adapter.num_virtual_tokens: unknown setting of lora; it belongs to prompt",
    ),
    (
        {"adapter": {"method": "ia3", "epochs": 1}},
        "adapter.epochs: unknown setting at this place; write it as train.epoc",
    ),
    ({"adapter": {"method": "ia3", "targets": 1}}, "adapter.targets: unknown setting; closest is 'target_modules'."),
    (
        {"adapter": {"method": "prefix-tuning", "num_virtual_tokens": 0}},
        "adapter.num_virtual_tokens: must be at least 1",
    ),
    (
        {"adapter": {"method": "prompt-tuning", "prompt_tuning_init": "TEXT"}},
        "adapter.prompt_tuning_init: TEXT needs 'prompt_tuning_init_text', which is not given. Add it.",
    ),
    (
        {"adapter": {"method": "PROMPT_TUNING"}},
        "'prefix-tuning' or 'full', got 'PROMPT_TUNING'. Write method: prompt-tuning.",
    ),
    ({"adapter": {"method": "dora"}}, "got 'dora'. Write method: lora with use_dora: true."),
    ({"adapter": {"method": "oft"}}, "got 'oft'. 'oft' is not available in this version."),
    ({"adapter": {"method": "botleneck"}}, "got 'botleneck'. Closest is 'bottleneck'."),
    ({"adapter": {"method": 3}}, "adapter.method: must be 'lora', 'ia3', 'bitfit', 'ln-tuning', 'bottleneck'"),
    (
        {"adapter": {"method": None, "r": 3}},
        "adapter.method: must be 'lora', 'ia3', 'bitfit', 'ln-tuning', 'bottleneck'",
    ),
    ({"train": {"threads": 1025}}, "train.threads: must be at most 1024, got 1025."),
    ({"train": {"threads": 10**30}}, "train.threads: must be at most 1024, got 1000"),
    ({"train": {"threads": 0}}, "train.threads: must be at least 1, got 0."),
    ({"eval": {"metrics": ["auc"]}}, "eval.metrics: not available in this version; evaluation gives all that the task"),
    ({"data": {"train": []}}, "data.train: must name at least one file, got []."),
    (
        {"data": {"train": 3}},
        "data.train: must be a path, hub:org/name:split, or a list of paths and {path, weight}, got 3.",
    ),
    ({"data": {"train": ["a", 3]}}, "data.train[1]: must be a mapping, got 3."),
    ({"data": {"train": ["a", {"weight": 3}]}}, "data.train[1].path: is missing."),
    ({"data": {"train": {"path": "a", "wieght": 3}}}, "data.train.wieght: unknown setting; closest is 'weight'."),
    ({"data": {"train": {"path": "a", "weight": 0}}}, "data.train.weight: must be above 0, got 0."),
    ({"data": {"train": "hub:org/name"}}, "data.train: must be written hub:org/name:split, got 'hub:org/name'."),
    ({"data": {"valid": 1}}, "data.valid: must be below 1, got 1."),
    ({"data": {"valid": 0}}, "data.valid: must be above 0, got 0."),
    (
        {"data": {"valid": [{"path": "a", "weight": 2}]}},
        "data.valid: takes no 'weight', every row is measured once; got one.",
    ),
    ({"data": {"max_length": 3}}, "data.max_length: must be at least 4, got 3."),
    ({"data": {"columns": {"prompt": 3}}}, "data.columns.prompt: must be text, got 3."),
    ({"data": {"labels": "first"}}, "data.labels: must be 'all' or 'last', got 'first'."),
    (
        {"task": "text", "data": {"system": "x"}},
        "data.system: is for chats, but task is 'text'. Remove it, or write task: chat",
    ),
    (
        {"train": {"steps": 5, "epochs": 2}},
        "train.steps: stands instead of 'epochs', but both are given (5 and 2). Remove one.",
    ),
    (
        {"train": {"warmup_steps": 0, "warmup_ratio": 0.1}},
        "train.warmup_steps: stands instead of 'warmup_ratio', but both are given (0 and 0.1). Remove one.",
    ),
    ({"train": {"steps": 5, "warmup_steps": 6}}, "train.warmup_steps: must be at most 'steps', 5, got 6."),
    ({"train": {"learning_rate": 0}}, "train.learning_rate: must be above 0, got 0."),
    ({"train": {"learning_rate": 1e30}}, "train.learning_rate: must be at most 1000, got 1e+30."),
    ({"train": {"learning_rate": "2e-4"}}, "train.learning_rate: must be a number, got '2e-4'. Remove the quotes."),
    ({"train": {"micro_batch_tokens": 0}}, "train.micro_batch_tokens: must be at least 1, got 0."),
    (
        {"train": {"micro_batch_tokens": "aut"}},
        "train.micro_batch_tokens: must be 'auto' or a whole number, got 'aut'. Closest",
    ),
    ({"train": {"lr_scheduler_type": "cosin"}}, "got 'cosin'. Closest is 'cosine'."),
    (
        {"train": {"lr_scheduler_type": "step"}},
        "train.lr_scheduler_type: 'step' needs 'lr_step_size', which is not given.",
    ),
    ({"train": {"lr_step_size": 5}}, "train.lr_step_size: needs lr_scheduler_type 'step', got 'cosine'."),
    ({"train": {"seed": -1}}, "train.seed: must be at least 0, got -1."),
    (
        {"train": {"eval_every": 5}},
        "train.eval_every: needs rows to evaluate on, but data.valid is not given; got 5. Add",
    ),
    (
        {"train": {"keep_best": True}},
        "train.keep_best: needs rows to evaluate on, but data.valid is not given; got true.",
    ),
    (
        {"data": {"valid": 0.1}, "train": {"early_stopping_patience": 2}},
        "train.early_stopping_patience: counts evaluations and needs 'eval_every'. Add it.",
    ),
]


@pytest.mark.parametrize(("sections", "said"), FAULTS)
def test_a_fault_names_its_place_the_rule_the_value_and_what_to_do(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        settings_of(**sections)
    first, fault = str(caught.value).split("\n")
    assert first == "1 problem in Settings"
    assert said in fault


@given(st.data())
def test_conflicts_are_reported_beside_faults_of_single_values(data: st.DataObject) -> None:
    (one, said), (other, also_said) = data.draw(
        st.lists(st.sampled_from([fault for fault in FAULTS if "task" not in fault[0]]), min_size=2, max_size=2)
        .filter(lambda faults: not faults[0][0].keys() & faults[1][0].keys())
    )  # fmt: skip
    if {"data", "train"} <= one.keys() | other.keys():
        return  # each changes what is wrong with the other
    with pytest.raises(ConfigError) as caught:
        settings_of(**one, **other)
    assert len(caught.value.problems) == 2
    assert said in str(caught.value) and also_said in str(caught.value)


@pytest.mark.parametrize("missing", ["model", "data"])
def test_what_is_required_is_asked_for_with_an_example(missing: str) -> None:
    values: dict[str, Any] = {"model": "m", "data": {"train": "x"}}
    del values[missing]
    with pytest.raises(ConfigError, match=rf"{missing}: is missing\. Write, for example: {missing}: \S+"):
        Settings(**values)
    with pytest.raises(ConfigError, match=r"data\.train: is missing\. Write, for example: train: train\.jsonl"):
        Settings(**(values | {"model": "m", "data": {}}))


def test_defaults_conflict_with_nothing() -> None:
    assert settings_of(train={"steps": 5, "warmup_steps": 1}).train.epochs == TrainSettings().epochs
    assert settings_of(train={"keep_best": False}).data.valid is None


def test_sections_made_in_python_are_checked_against_each_other_too() -> None:
    data = DataSettings(train=(DataPart(path="x"),))
    with pytest.raises(ConfigError, match=r"train\.eval_every: needs rows to evaluate on"):
        Settings(model="m", data=data, train=TrainSettings(eval_every=3))
    with pytest.raises(ConfigError, match="steps: stands instead of 'epochs'"):
        TrainSettings(steps=3, epochs=1)
    assert Settings(model="m", data=data, train=TrainSettings()).train.keep_best


@given(st.lists(st.text(min_size=1).filter(lambda path: not path.startswith("hub:")), min_size=1))
def test_a_path_a_list_and_mappings_are_the_same_source(paths: list[str]) -> None:
    parts = tuple(DataPart(path=path) for path in paths)
    mixed = [path if index % 2 else {"path": path, "weight": 1} for index, path in enumerate(paths)]
    assert settings_of(data={"train": paths}).data.train == parts
    assert settings_of(data={"train": mixed}).data.train == parts
    assert settings_of(data={"train": paths[0]}).data.train == parts[:1]


@given(st.none() | st.floats(0, 1, exclude_min=True))
def test_resolving_writes_the_methods_learning_rate_where_none_is_given_and_changes_nothing_else(
    rate: float | None,
) -> None:
    settings = settings_of(train={"learning_rate": rate})
    resolved = settings.resolved()
    assert resolved.train.learning_rate == (Lora.default_learning_rate if rate is None else rate)
    assert resolved.resolved() == resolved
    assert resolved.model_copy(update={"train": settings.train}) == settings
