"""IA3 equals PEFT's: names, loss, gradients, merged weights; its own choice of targets is the paper's."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn

from onebase.adapters.bank import Bank
from onebase.adapters.ia3 import Ia3Input, Ia3Output
from onebase.adapters.part import RowCall
from onebase.config.methods import Ia3
from onebase.errors import TargetError
from tests import tiny
from tests.adapters.against_peft import assert_equal_to_peft

CHOICES = {
    "llama": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "mistral": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "gpt2": (["c_attn", "mlp.c_proj"], ["mlp.c_proj"]),
    "gpt-neox": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
    "phi3": (["qkv_proj", "down_proj"], ["down_proj"]),
    "opt": (["k_proj", "v_proj", "fc2"], ["fc2"]),
    "bloom": (["query_key_value", "dense_4h_to_h"], ["dense_4h_to_h"]),
}
ENCODERS = {
    "bert": r".*(key|value|layer\.\d+\.output\.dense)",
    "roberta": r".*(key|value|layer\.\d+\.output\.dense)",
    "distilbert": r".*(k_lin|v_lin|lin2)",
    "modernbert": r".*(Wqkv|mlp\.Wo)",
}


@pytest.mark.parametrize("name", sorted(CHOICES))
def test_by_itself_it_takes_keys_values_and_the_end_of_every_mlp_and_equals_peft_there(name):
    targets, feedforward = CHOICES[name]
    config = peft.IA3Config(target_modules=targets, feedforward_modules=feedforward)
    adapter, _ = assert_equal_to_peft(name, Ia3(), config)
    assert len(adapter.target_paths) == len(targets) * 2


@pytest.mark.parametrize("name", sorted(ENCODERS))
def test_of_an_encoder_it_takes_the_same(name):
    adapter = Bank(tiny.base_of(name)).add("one", Ia3())
    bank = Bank(tiny.base_of(name))
    assert adapter.target_paths == bank.add("two", Ia3(target_modules=ENCODERS[name])).target_paths
    ends = {part.path for part in adapter.parts if isinstance(part, Ia3Input)}
    assert len(ends) == bank.base.model.config.num_hidden_layers
    assert not any("attention" in path or "attn" in path for path in ends)


def test_feedforward_modules_of_ones_own_choice_equal_peft():
    names: Any = {"target_modules": ["q_proj", "up_proj", "o_proj"], "feedforward_modules": ["up_proj", "o_proj"]}
    assert_equal_to_peft("llama", Ia3(**names), peft.IA3Config(**names))


def test_a_feedforward_module_that_is_no_target_is_refused_by_name():
    settings = Ia3(target_modules=["q_proj"], feedforward_modules=["up_proj"])
    with pytest.raises(TargetError, match=r"feedforward_modules: 'model.layers.0.mlp.up_proj' is no target.*q_proj"):
        Bank(tiny.base_of()).add("one", settings)
    settings = Ia3(target_modules=["q_proj"], feedforward_modules=["up_prj"])
    with pytest.raises(TargetError, match=r"adapter.feedforward_modules: 'up_prj' matches none .*'up_proj'"):
        Bank(tiny.base_of()).add("one", settings)


def test_it_does_not_go_on_embeddings():
    with pytest.raises(TargetError, match=r"IA3 goes on linear layers and 2-D or 3-D conv.*embed_tokens \(embedding\)"):
        Bank(tiny.base_of()).add("one", Ia3(target_modules=["embed_tokens"]))


def test_ones_change_no_bit_and_random_ones_follow_from_the_seed():
    base = tiny.base_of("gpt2")
    bank = Bank(base)
    batch = tiny.batch_of(tiny.examples_of(7, 20, 3), None)
    before = base.hidden(batch.token_ids, bank.route(batch.layout))
    bank.add("one", Ia3())
    mixed = tiny.batch_of(tiny.examples_of(7, 20, 3), "one", None, "one")
    assert torch.equal(base.hidden(mixed.token_ids, bank.route(mixed.layout)), before)
    states = [bank.add(f"random{i}", Ia3(init_ia3_weights=False), seed=seed).state for i, seed in enumerate((1, 1, 2))]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    assert not any(torch.equal(states[0][name], states[2][name]) for name in states[0])


@pytest.mark.parametrize("feedforward", [True, False])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dims", [2, 3])
def test_on_a_convolution_it_equals_peft_and_merges(dims, groups, feedforward):
    draws = torch.Generator().manual_seed(0)
    conv = {2: nn.Conv2d, 3: nn.Conv3d}[dims](4, 6, 3, groups=groups).double().requires_grad_(False)
    scale = torch.randn(1, 4 if feedforward else 6, *[1] * dims, generator=draws).double()
    x = torch.randn(3, 4, *[5] * dims, generator=draws).double()
    part: Any = (Ia3Input if feedforward else Ia3Output)("0", nn.Parameter(scale))
    own = conv(part.on_input(x)) if feedforward else part.on_output(conv(x), RowCall(conv, x))
    config = peft.IA3Config(target_modules=["0"], feedforward_modules=["0"] if feedforward else [])
    theirs = peft.get_peft_model(nn.Sequential(copy.deepcopy(conv)), config)
    (parameter,) = [p for name, p in theirs.named_parameters() if "ia3_l" in name]
    assert parameter.shape == scale.shape
    parameter.data = scale
    torch.testing.assert_close(own, theirs(x))
    merged = copy.deepcopy(conv)
    part.merge_(merged)
    torch.testing.assert_close(merged(x), own)
    (wrapped,) = theirs.merge_and_unload()
    torch.testing.assert_close(merged.weight, wrapped.weight)
    torch.testing.assert_close(merged.bias, wrapped.bias)


def test_what_its_own_choice_lacks_is_said():
    adapter = Bank(tiny.base_of("mixtral")).add("one", Ia3())
    assert any("only attention is adapted" in warning for warning in adapter.warnings)
    with pytest.raises(TargetError, match=r"tiny-plain: no keys and values.*adapter.target_modules"):
        Bank(tiny.base_of("plain")).add("one", Ia3())
