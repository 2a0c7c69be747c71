"""Laws of the adapter methods' settings."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from onebase.config import METHODS, AdapterSettings, Lora, PrefixTuning
from onebase.errors import ConfigError
from tests.config.trees import loras


@given(loras)
def test_settings_hold_what_was_given_and_defaults_elsewhere(values: dict[str, Any]) -> None:
    lora = Lora(**values)
    for name, default in Lora():
        held = getattr(lora, name)
        assert (str(held) if name == "init_from" and held else held) == values.get(name, default)


@given(loras)
def test_equal_values_make_equal_settings_however_many_are_written_down(values: dict[str, Any]) -> None:
    assert Lora(**values) == Lora(**{**dict(Lora()), **values})


def test_a_whole_alpha_stays_whole() -> None:
    assert type(Lora(lora_alpha=32).lora_alpha) is int
    assert type(Lora(lora_alpha=0.5).lora_alpha) is float


FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"r": 0}, "r: must be at least 1, got 0."),
    ({"r": 2**16 + 1}, "r: must be at most 65536, got 65537."),
    ({"r": 10**400}, "r: must be at most 65536, got 1000"),
    ({"rank_pattern": {"q_proj": 2**16 + 1}}, "rank_pattern.q_proj: must be at most 65536, got 65537."),
    ({"lora_alpha": 1e9}, "lora_alpha: must be below 1000000000, got 1000000000.0."),
    ({"lora_alpha": 10**400}, "lora_alpha: must be below 1000000000, got 1000"),
    ({"lora_alpha": float("inf")}, "lora_alpha: must be "),
    ({"alpha_pattern": {"q_proj": 1e300}}, "alpha_pattern.q_proj: must be below 1000000000, got 1e+300."),
    ({"r": True}, "r: must be a whole number, got true."),
    ({"r": 16.0}, "r: must be a whole number, got 16.0."),
    ({"r": "16"}, "r: must be a whole number, got '16'. Remove the quotes."),
    ({"r": None}, "r: must be a whole number, got nothing."),
    ({"method": "dora"}, "method: must be 'lora', got 'dora'. Write method: lora with use_dora: true."),
    ({"method": "adalora"}, "method: must be 'lora', got 'adalora'. 'adalora' is not available in this version."),
    ({"num_virtual_tokens": 8}, "unknown setting of lora; it belongs to prompt-tuning and prefix-tuning. Remove it,"),
    ({"lora_alpha": 0}, "lora_alpha: must be at least 1e-06, got 0."),
    ({"lora_alpha": 1e-320}, "lora_alpha: must be at least 1e-06, got 1e-320."),
    ({"loraplus_lr_ratio": 1e30}, "loraplus_lr_ratio: must be at most 1000000, got 1e+30."),
    ({"lora_alpha": "x"}, "lora_alpha: must be a number, got 'x'."),
    ({"lora_alpha": float("inf")}, "lora_alpha: must be a finite number, got inf."),
    ({"lora_dropout": 1}, "lora_dropout: must be below 1, got 1."),
    ({"lora_dropout": -0.1}, "lora_dropout: must be at least 0, got -0.1."),
    ({"lora_dropout": float("nan")}, "lora_dropout: must be a finite number, got nan."),
    ({"use_rslora": "no"}, "use_rslora: must be true or false, got 'no'."),
    ({"target_modules": 3}, "target_modules: must be text or a list of texts, got 3."),
    ({"target_modules": {"a": 1}}, "target_modules: must be text or a list of texts, got {'a': 1}."),
    ({"target_modules": []}, "target_modules: must name at least one module, got []."),
    ({"target_modules": ["q", 3]}, "target_modules[1]: must be text, got 3."),
    ({"target_modules": "("}, "target_modules: must be a preset, a module's name or a regular expression, got '('"),
    ({"layers_to_transform": [0, -1]}, "layers_to_transform[1]: must be at least 0, got -1."),
    ({"layers_to_transform": []}, "layers_to_transform: must name at least one layer, got []. Remove it to adapt all."),
    ({"layers_to_transform": "a"}, "layers_to_transform: must be a whole number or a list of whole numbers, got 'a'."),
    ({"layers_pattern": "h"}, "layers_pattern: needs 'layers_to_transform', which is not given. Add it or remove"),
    ({"rank_pattern": 4}, "rank_pattern: must be a mapping, got 4."),
    ({"rank_pattern": {"q.proj": 0}}, "rank_pattern.q.proj: must be at least 1, got 0."),
    ({"alpha_pattern": {"*q": 4}}, "alpha_pattern: '*q' must be a name, a suffix or a regular expression"),
    ({"rank_pattern": {"q": "a"}}, "rank_pattern.q: must be a whole number, got 'a'."),
    ({"alpha_pattern": {"q": -1}}, "alpha_pattern.q: must be at least 1e-06, got -1."),
    (
        {"init_lora_weights": "gausian"},
        "'pissa_niter_16' (or another number up to 9999), got 'gausian'. Closest is 'gaussian'.",
    ),
    ({"init_lora_weights": "pissa_niter_10000"}, "(or another number up to 9999), got 'pissa_niter_10000'."),
    ({"trainable_token_indices": {}}, "trainable_token_indices: must"),
    ({"init_lora_weights": "eva"}, "got 'eva'. 'eva' is not available in this version."),
    ({"init_from": 3}, "init_from: must be a path, got 3."),
    ({"lora_r": 8}, "lora_r: unknown setting; here it is 'r'."),
    ({"lora_aplha": 8}, "lora_aplha: unknown setting; closest is 'lora_alpha'."),
    ({"xyzzy": 8}, "xyzzy: unknown setting. List all: onebase schema"),
    ({"lora_bias": True}, "lora_bias: not available in this version for adapters. Remove it."),
]


@pytest.mark.parametrize(("values", "said"), FAULTS)
def test_a_fault_names_its_place_the_rule_the_value_and_what_to_do(values: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Lora(**values)
    first, fault = str(caught.value).split("\n")
    assert first == "1 problem in Lora"
    assert said in fault


@pytest.mark.parametrize("pattern", ["(", ["layers", "("]])
def test_a_list_of_blocks_that_is_no_regular_expression_is_told(pattern: str | list[str]) -> None:
    with pytest.raises(ConfigError, match=r"layers_pattern: '\(' must be the name of a list of blocks"):
        Lora(layers_to_transform=0, layers_pattern=pattern)


@given(st.lists(st.sampled_from(FAULTS), min_size=1, unique_by=lambda fault: next(iter(fault[0]))))
def test_all_faults_are_reported_at_once(faults: list[tuple[dict[str, Any], str]]) -> None:
    values = {name: value for fault, _ in faults for name, value in fault.items()}
    if "layers_to_transform" in values and "layers_pattern" in values:
        values.pop("layers_pattern")
        faults = [fault for fault in faults if "layers_pattern" not in fault[0]]
    with pytest.raises(ConfigError) as caught:
        Lora(**values)
    assert len(caught.value.problems) == len(faults)
    assert all(said in str(caught.value) for _, said in faults)


def test_every_method_has_a_name_for_sentences_and_a_learning_rate_of_its_own() -> None:
    for name, kind in METHODS.items():
        assert kind().method == name
        assert kind.title and 0 < kind.default_learning_rate < 1
        assert kind().usual_learning_rate == kind.default_learning_rate


def test_settings_that_want_another_learning_rate_have_it() -> None:
    assert PrefixTuning(prefix_projection=True).usual_learning_rate < PrefixTuning().usual_learning_rate
    assert (
        Lora(init_lora_weights="pissa_niter_4").usual_learning_rate
        == Lora(init_lora_weights="pissa").usual_learning_rate
    )
    assert Lora(init_lora_weights="olora").usual_learning_rate < Lora(init_lora_weights="pissa").usual_learning_rate
    assert Lora(loraplus_lr_ratio=16).usual_learning_rate < Lora().usual_learning_rate == Lora.default_learning_rate
    for kind in METHODS.values():
        assert {wanted.partition("=")[0] for wanted in kind.other_learning_rates} <= set(kind.model_fields)
        assert all(f"{rate:g} with " in kind.rates() for rate in kind.other_learning_rates.values())


@pytest.mark.parametrize("kind", METHODS.values())
def test_a_setting_of_another_method_is_told_whose_it_is(kind: type[AdapterSettings]) -> None:
    for other in METHODS.values():
        for name in set(other.model_fields) - set(kind.model_fields):
            values: dict[str, Any] = {name: None}
            with pytest.raises(ConfigError, match=rf"{name}: unknown setting of .*; it belongs to .*{other().method}"):
                kind(**values)
