"""Stopped after any step and resumed equals never stopped, to the bit, for methods beside LoRA: member and checkpoint."""

import json
from typing import Any

import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.config.methods import Lora, PrefixTuning, PromptTuning
from onebase.config.settings import TrainSettings
from onebase.train.member import Member
from tests import tiny

METHODS: dict[str, Any] = {
    "prompt": PromptTuning(num_virtual_tokens=4, prompt_tuning_init="RANDOM"),
    "prefix": PrefixTuning(num_virtual_tokens=4),
    "dora": Lora(r=4, use_dora=True, lora_dropout=0.1),
    "pissa": Lora(r=4, init_lora_weights="pissa"),
    "pissa_niter": Lora(r=4, init_lora_weights="pissa_niter_4"),
    "olora": Lora(r=4, init_lora_weights="olora"),
    "lora+": Lora(r=4, loraplus_lr_ratio=16, target_modules=["q_proj", "embed_tokens"]),
    "projected": PrefixTuning(num_virtual_tokens=4, prefix_projection=True, encoder_hidden_size=8),
}


def member_of(settings: Any) -> Member:
    """Return a new member on a new base, as a new process makes it."""
    bank = Bank(tiny.base_of())
    adapter = bank.add("learner", settings, seed=5)
    examples = tiny.examples_of(9, 21, 4, 13, 7, 18)
    training = TrainSettings(epochs=3, batch_size=2, learning_rate=0.05, weight_decay=0.01)
    return Member(bank, adapter, examples, training, shuffle=True, budget=40)


def books_of(member: Member) -> dict[str, Any]:
    return {name: value for name, value in vars(member.books).items() if name != "seconds"}


@pytest.mark.parametrize("method", METHODS)
def test_stopped_after_any_step_and_resumed_equals_never_stopped(method):
    whole = member_of(METHODS[method])
    first = {name: tensor.clone() for name, tensor in whole.adapter.state.items()}
    states = []
    while not whole.finished:
        whole.run_step()
        whole.check_moved()
        held, books = whole.state()
        read = {name: t.clone(memory_format=torch.contiguous_format) for name, t in held.items()}  # as a file gives it
        states.append((read, json.dumps(books)))
    assert len(states) == 9
    assert not any(torch.equal(tensor, first[name]) for name, tensor in whole.adapter.parameters())
    for tensors, text in states[:-1]:
        resumed = member_of(METHODS[method])
        resumed.load_state(tensors, json.loads(text), None)
        while not resumed.finished:
            resumed.run_step()
        assert books_of(resumed) == books_of(whole)
        for name, tensor in whole.state()[0].items():
            assert torch.equal(tensor, resumed.state()[0][name]), name
