"""What settings ask for and nobody would compute is refused, before a tensor is made of it or a result differs."""

import pytest

from onebase.adapters.bank import Bank
from onebase.config.methods import Lora
from onebase.errors import ConfigError, TargetError
from tests import tiny


def test_dropout_is_refused_where_none_is_computed_and_a_trained_adapter_opens_all_the_same():
    settings = Lora(r=2, lora_dropout=0.5)
    with pytest.raises(ConfigError, match=r"lora_dropout: .* runs as it is .* Set it to 0"):
        Bank(tiny.base_of("vit")).add("a", settings)
    plain = Bank(tiny.base_of("vit")).add("a", Lora(r=2))
    Bank(tiny.base_of("vit")).add("a", settings, tensors=plain.state)
    Bank(tiny.base_of("llama")).add("a", settings)


@pytest.mark.parametrize("given", [{"layers_to_transform": [0]}, {"exclude_modules": ["experts"]}])
def test_settings_that_choose_modules_are_refused_where_parameters_alone_are_named(given):
    bank = Bank(tiny.base_of("mixtral"))
    with pytest.raises(TargetError, match=f"{next(iter(given))} chooses modules"):
        bank.add("a", Lora(r=2, target_modules=[], target_parameters=["experts.gate_up_proj"], **given))


@pytest.mark.parametrize("saved", ["experts", "mlp"])
def test_parameters_in_a_module_that_is_trained_whole_are_refused(saved):
    bank = Bank(tiny.base_of("mixtral"))
    named = ["experts.gate_up_proj"]
    with pytest.raises(TargetError, match=r"trained whole, so .* cannot be a target too"):
        bank.add("a", Lora(r=2, target_modules=["q_proj"], target_parameters=named, modules_to_save=[saved]))


def test_token_rows_in_a_module_that_is_trained_whole_are_refused():
    settings = Lora(r=2, target_modules=["query"], modules_to_save=["embeddings"], trainable_token_indices=[3])
    with pytest.raises(TargetError, match=r"trainable_token_indices: .* Remove it from one"):
        Bank(tiny.base_of("bert")).add("a", settings)


def test_embeddings_that_share_a_weight_are_not_taken_for_heads():
    settings = Lora(r=2, target_modules=["shared", "q"], ensure_weight_tying=True)
    with pytest.raises(TargetError, match="shares its weight with other embeddings"):
        Bank(tiny.base_of("t5")).add("a", settings)
