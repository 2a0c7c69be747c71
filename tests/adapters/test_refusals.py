"""What settings ask for and nobody would compute is refused, before a tensor is made of it or a result differs."""

from typing import Any

import pytest
import torch
import transformers

from onebase.adapters.bank import Bank
from onebase.base.model import Base
from onebase.config.methods import Bottleneck, Full, Lora
from onebase.errors import CapacityError, ConfigError, TargetError
from tests import tiny


def bart(name: str = "Bart") -> Any:
    sides = {f"{side}_{what}": 4 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    widths = {"vocab_size": 61, "d_model": 32, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, f"{name}Config")(**sides, **widths)
        return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()


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


@pytest.mark.parametrize("name", ["t5", "bart", "pegasus"])
@pytest.mark.parametrize(
    "settings",
    [
        Lora(r=2, target_modules=["shared", "fc1", "wo"]),
        Lora(r=2, target_modules=["fc1", "wo"], modules_to_save=["shared"]),
        Full(target_modules=["shared"]),
    ],
)
def test_what_is_trained_on_an_embedding_that_is_never_called_is_refused(name, settings):
    model = tiny.model_of("t5") if name == "t5" else bart(name.title())
    ends = [end for end in settings.target_modules if any(path.endswith(end) for path, _ in model.named_modules())]
    bank = Bank(Base(model))
    with pytest.raises(TargetError, match=r"shared only lends its weight to .*encoder\.embed_tokens and .*Name those"):
        bank.add("a", settings.model_copy(update={"target_modules": ends}))


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_rows_and_copies_of_a_lent_weight_reach_those_that_are_called(name):
    model = tiny.model_of("t5") if name == "t5" else bart()
    bank = Bank(Base(model))
    target = ["wo"] if name == "t5" else ["fc1"]
    bank.add("rows", Lora(r=2, target_modules=target, trainable_token_indices=[3, 5]))
    bank.add("copy", Lora(r=2, target_modules=target, modules_to_save=["shared"], ensure_weight_tying=True))
    inputs = tiny.native_inputs("t5", 2)
    plain = tiny.native_outputs(bank.base, bank.batch_route([None, None]), inputs)
    for name in ("rows", "copy"):
        tiny.fill_(bank.adapters[name])
        assert not torch.allclose(tiny.native_outputs(bank.base, bank.batch_route([name, name]), inputs), plain)


def test_rows_of_an_embedding_that_is_named_twice_are_refused():
    rows = {"embed_tokens": [1], "model.embed_tokens": [2]}
    with pytest.raises(TargetError, match=r"model\.embed_tokens is named twice, .* by 'model\.embed_tokens'"):
        Bank(tiny.base_of()).add("a", Lora(trainable_token_indices=rows))


def test_a_bottleneck_too_wide_for_the_memory_is_refused_before_it_is_made(monkeypatch):
    monkeypatch.setattr("onebase.base.memory.available_bytes", lambda: 1_000_000)
    with pytest.raises(CapacityError, match=r"Set a larger adapter\.reduction_factor"):
        Bank(tiny.base_of()).add("a", Bottleneck(reduction_factor=0.001))


def test_a_preset_in_a_list_is_told_to_stand_alone():
    with pytest.raises(TargetError, match="'all-linear' is a preset, which stands alone"):
        Bank(tiny.base_of()).add("a", Lora(target_modules=["all-linear", "lm_head"]))


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ({"target_modules": ["mlp"], "exclude_modules": ["gate_proj"]}, {"up_proj", "down_proj"}),
        ({"target_modules": ["layers.0"], "exclude_modules": ["mlp", "self_attn"]}, {"input_layernorm", "post_attention_layernorm"}),
        ({"target_modules": ["layers.0"], "exclude_modules": "all-linear"}, {"input_layernorm", "post_attention_layernorm"}),
        ({"exclude_modules": ["layers"]}, {"embed_tokens", "norm", "lm_head"}),
    ],
)  # fmt: skip
def test_full_fine_tuning_leaves_out_what_is_excluded_with_all_inside_it(given, left):
    adapter = Bank(tiny.base_of()).add("a", Full(**given))
    assert {path.rpartition(".")[2] for path in adapter.target_paths} == left


def test_full_fine_tuning_of_nothing_is_refused():
    with pytest.raises(TargetError, match=r"exclude_modules: leaves nothing"):
        Bank(tiny.base_of()).add("a", Full(target_modules=["q_proj"], exclude_modules=["self_attn"]))
