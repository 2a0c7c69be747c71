"""Bottleneck adapters: the formula after the end of each sublayer, found by role, a no-op at first."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from onebase.adapters.bank import Bank
from onebase.config.methods import Bottleneck
from onebase.errors import ConfigError, TargetError
from onebase.measure.forward import forward_loss
from tests import tiny
from tests.adapters.against_peft import CLOSE, filled, their_loss

ENDS = {
    "llama": ("down_proj", "o_proj"),
    "gpt2": ("mlp.c_proj", "attn.c_proj"),
    "opt": ("fc2", "out_proj"),
    "gpt-neox": ("dense_4h_to_h", "attention.dense"),
    "bloom": ("dense_4h_to_h", "self_attention.dense"),
    "gemma3": ("down_proj", "o_proj"),
}
ACTIVATIONS = {"relu": F.relu, "gelu": F.gelu, "silu": F.silu, "tanh": torch.tanh}


class Wrapped(nn.Module):
    """The reference: a layer and a bottleneck of plain torch modules behind it."""

    def __init__(self, layer, narrow, act):
        super().__init__()
        width = 32
        self.layer, self.act = layer, act
        self.adapter_down = nn.Linear(width, narrow).double()
        self.adapter_up = nn.Linear(narrow, width).double()

    def __getattr__(self, name):
        return super().__getattr__(name) if name != "weight" else self.layer.weight

    def forward(self, x):
        y = self.layer(x)
        return y + self.adapter_up(self.act(self.adapter_down(y)))


@pytest.mark.parametrize("placement", ["pfeiffer", "houlsby"])
@pytest.mark.parametrize("name", sorted(ENDS))
def test_it_equals_plain_modules_after_the_end_of_every_sublayer(name, placement):
    kind = sorted(ACTIVATIONS)[(sorted(ENDS).index(name) + (placement == "houlsby")) % 4]
    settings = Bottleneck(placement=placement, reduction_factor=5, non_linearity=kind)
    bank = Bank(tiny.base_of(name, dtype=torch.float64))
    filled(bank, "dummy", settings, size=0.7)
    adapter = filled(bank, "one", settings)
    model = tiny.model_of(name, dtype=torch.float64)
    ends = ENDS[name][: 1 if placement == "pfeiffer" else 2]
    paths = [path for path, _ in model.named_modules() if path.endswith(ends)]
    assert sorted(adapter.target_paths) == sorted(paths)
    assert len(paths) == 2 * len(ends)
    for path in paths:
        model.set_submodule(path, Wrapped(model.get_submodule(path), 6, ACTIVATIONS[kind]))
    own = dict(model.named_parameters())
    trained = dict(adapter.parameters())
    assert set(trained) == {key for key in own if ".adapter_" in key}
    for key, parameter in trained.items():
        own[key].data = parameter.detach().clone()
    examples = tiny.examples_of(9, 21, 4)
    batch = tiny.batch_of(examples, "one")
    loss, _ = forward_loss(bank, batch, 1 / batch.label_count)
    loss.backward()
    expected = their_loss(model, examples)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-10)
    for key, parameter in trained.items():
        scale = float(own[key].grad.abs().max())
        assert scale > 0
        torch.testing.assert_close(parameter.grad / scale, own[key].grad / scale, **CLOSE)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_fresh_one_changes_no_bit(name, dtype):
    base = tiny.base_of(name, dtype=dtype)
    bank = Bank(base)
    batch = tiny.batch_of(tiny.examples_of(7, 20, 3), None)
    before = base.hidden(batch.token_ids, bank.route(batch.layout))
    adapter = bank.add("one", Bottleneck(placement="houlsby", non_linearity="silu"))
    mixed = tiny.batch_of(tiny.examples_of(7, 20, 3), "one", None, "one")
    assert torch.equal(base.hidden(mixed.token_ids, bank.route(mixed.layout)), before)
    assert any(p.any() for _, p in adapter.parameters())


def test_at_least_one_number_is_left_and_counts_are_exact():
    adapter = Bank(tiny.base_of()).add("one", Bottleneck(reduction_factor=1000))
    assert adapter.parameter_count == 2 * (32 + 1 + 32 + 32)
    adapter = Bank(tiny.base_of()).add("one", Bottleneck(reduction_factor=4, placement="houlsby"))
    assert adapter.parameter_count == 4 * (32 * 8 + 8 + 8 * 32 + 32)


def test_weights_follow_from_seed_and_path():
    banks = [Bank(tiny.base_of()) for _ in range(3)]
    states = [bank.add("one", Bottleneck(), seed=seed).state for bank, seed in zip(banks, (1, 1, 2), strict=True)]
    down = [state["model.layers.0.mlp.down_proj.adapter_down.weight"] for state in states]
    assert torch.equal(down[0], down[1])
    assert not torch.equal(down[0], down[2])
    assert not torch.equal(down[0], states[0]["model.layers.1.mlp.down_proj.adapter_down.weight"])


def test_where_it_cannot_be_put_or_merged_is_said():
    with pytest.raises(TargetError, match=r"tiny-mixtral: no MLP in it ends in a linear layer.*target_modules"):
        Bank(tiny.base_of("mixtral")).add("one", Bottleneck())
    adapter = Bank(tiny.base_of("mixtral")).add("one", Bottleneck(placement="houlsby"))
    assert any("only attention is adapted" in warning for warning in adapter.warnings)
    with pytest.raises(TargetError, match=r"bottleneck goes on linear layers in this version, got embed_tokens"):
        Bank(tiny.base_of()).add("one", Bottleneck(target_modules=["embed_tokens"]))
    from onebase.adapters.merging import merged_state

    bank = Bank(tiny.base_of())
    bank.add("one", Bottleneck())
    with pytest.raises(ConfigError, match="nonlinear function after a module"):
        merged_state(bank, "one")
