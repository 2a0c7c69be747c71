"""What must have a gradient and must move, and what may rest: rows of tokens and experts that no example visits."""

import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.base.model import Base
from onebase.config.methods import Full, Lora
from onebase.errors import TrainingError
from onebase.measure.forward import forward_loss
from onebase.train import checks
from tests import tiny

NEVER = [0, 1]  # examples hold ids from 3 on


def trained(name, settings):
    """Return an adapter after one backward and one step of plain descent, and its tensors of before."""
    bank = Bank(tiny.base_of(name))
    adapter = bank.add("one", settings)
    before = {key: tensor.clone() for key, tensor in adapter.state.items()}
    batch = tiny.batch_of(tiny.examples_of(9, 14), "one")
    for _ in range(2):  # lora_A moves with the second: lora_B was zero
        forward_loss(bank, batch, 1 / batch.label_count)[0].backward()
        with torch.no_grad():
            for _, parameter in adapter.parameters():
                if parameter.grad is not None:
                    parameter.sub_(0.1 * parameter.grad)
    return adapter, before


def test_rows_of_tokens_that_no_example_has_may_rest():
    adapter, before = trained("llama", Lora(target_modules=["q_proj"], trainable_token_indices=NEVER))
    key = "model.embed_tokens.token_adapter.trainable_tokens_delta"
    assert adapter.may_rest == {key}
    assert torch.equal(adapter.state[key], before[key])
    checks.check_gradients(adapter)
    checks.check_moved(adapter, before)


def test_rows_that_the_head_reads_too_learn_at_every_label_and_may_not_rest():
    adapter, before = trained("llama-tied", Lora(target_modules=["q_proj"], trainable_token_indices=NEVER))
    assert not adapter.may_rest
    checks.check_moved(adapter, before)
    for key in before:
        if "token" in key:
            before[key] = adapter.state[key].clone()
    with pytest.raises(TrainingError, match="trainable_tokens_delta: has not changed in three steps"):
        checks.check_moved(adapter, before)


def test_what_is_visited_must_move_and_have_a_gradient():
    adapter, before = trained("llama", Full(target_modules=["q_proj"]))
    checks.check_moved(adapter, before)
    with pytest.raises(TrainingError, match=r"q_proj.weight: has not changed in three steps"):
        checks.check_moved(adapter, dict(adapter.state))
    for _, parameter in adapter.parameters():
        parameter.grad = None
    with pytest.raises(TrainingError, match=r"q_proj.weight: no gradient reaches it"):
        checks.check_gradients(adapter)


class Experts(torch.nn.Module):
    """A stand-in for a block of experts that are modules of their own."""

    def __init__(self):
        super().__init__()
        self.experts = torch.nn.ModuleList(torch.nn.Linear(32, 32) for _ in range(2))

    def forward(self, x):
        return x + self.experts[1](x)


def test_an_expert_that_no_token_was_sent_to_may_rest():
    model = tiny.model_of("llama")
    model.model.layers[0].mlp = Experts()
    bank = Bank(Base(model, name="experts"))
    adapter = bank.add("one", Lora(target_modules=["experts.0", "experts.1", "q_proj"]))
    batch = tiny.batch_of(tiny.examples_of(9, 14), "one")
    forward_loss(bank, batch, 1.0)[0].backward()
    assert any(p.grad is None for _, p in adapter.parameters())
    checks.check_gradients(adapter)
    assert {name.partition(".lora_")[0] for name in adapter.may_rest} == {
        f"model.layers.0.mlp.experts.{i}" for i in range(2)
    }
    for _, parameter in adapter.parameters():
        if parameter.grad is not None:
            parameter.grad.fill_(float("nan"))
    with pytest.raises(TrainingError, match=r"experts.1.lora_A.weight: its gradient is not finite"):
        checks.check_gradients(adapter)
