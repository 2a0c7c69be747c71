"""A member's optimiser goes through all tensors at once, and does to each what AdamW does to it alone."""

import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.config.methods import Lora
from onebase.config.settings import TrainSettings
from onebase.train.member import Member
from tests import tiny


def member_of(**train) -> Member:
    bank = Bank(tiny.base_of("llama"))
    adapter = tiny.fill_(bank.add("one", Lora(r=3, loraplus_lr_ratio=4.0), seed=0), seed=2)
    settings = TrainSettings(steps=6, batch_size=3, learning_rate=1e-2, **train)
    return Member(bank, adapter, tiny.examples_of(5, 9, 3, 12, 7), settings, shuffle=True, budget=20)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_the_fused_step_is_that_of_each_tensor_alone(weight_decay):
    fused, alone = member_of(weight_decay=weight_decay), member_of(weight_decay=weight_decay)
    before = {name: tensor.clone() for name, tensor in fused.adapter.state.items()}
    for group in alone.optimizer.param_groups:
        group.update(fused=False, foreach=False)
    assert all(group["fused"] for group in fused.optimizer.param_groups)
    draws = torch.Generator().manual_seed(0)
    for _ in range(6):
        for one, other in zip(fused.parameters, alone.parameters, strict=True):
            one.grad = torch.randn(one.shape, generator=draws)
            other.grad = one.grad.clone()
        fused.optimizer.step()
        alone.optimizer.step()
    for name, tensor in fused.adapter.state.items():
        assert not torch.equal(tensor, before[name])
        torch.testing.assert_close(tensor, alone.adapter.state[name], rtol=1e-5, atol=1e-6)
