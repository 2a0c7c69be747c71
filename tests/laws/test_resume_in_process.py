"""Stopped after any step and resumed equals never stopped, to the bit, for every kind of part: member and checkpoint."""

import json
from typing import Any

import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.config.methods import BitFit, Bottleneck, Full, Ia3, LnTuning, Lora, PrefixTuning, PromptTuning
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
    "full": Full(),
    "full, the weight of a tied head in one of its modules": Full(target_modules=["embed_tokens", "q_proj"]),
    "norms": LnTuning(modules_to_save=["lm_head"]),
    "whole modules": Lora(r=4, modules_to_save=["embed_tokens", "layers.1.mlp"], target_modules=["q_proj"]),
    "token rows": Lora(r=4, trainable_token_indices=[3, 5, 17, 40], lora_dropout=0.1),
    "biases": Lora(r=4, bias="all"),
    "biases of the targets": Lora(r=4, bias="lora_only", use_rslora=True),
    "bitfit": BitFit(),
    "ia3": Ia3(),
    "bottleneck": Bottleneck(reduction_factor=4, placement="houlsby"),
    "tied pair": Lora(
        r=4, ensure_weight_tying=True, target_modules=["embed_tokens", "lm_head", "q_proj"], lora_dropout=0.1
    ),
    "tied copies": Lora(r=4, ensure_weight_tying=True, modules_to_save=["embed_tokens", "lm_head"]),
    "tied rows": Lora(r=4, ensure_weight_tying=True, trainable_token_indices=[3, 5, 17, 40]),
}
BASES: dict[str, str] = {
    **dict.fromkeys(("full", "tied pair", "tied copies", "tied rows"), "llama-tied"),
    "full, the weight of a tied head in one of its modules": "llama-tied",
    **dict.fromkeys(("biases", "biases of the targets", "bitfit"), "gpt2"),
}
"""What a method is tried on, where that is not llama."""


def member_of(method: str) -> Member:
    """Return a new member on a new base, as a new process makes it."""
    bank = Bank(tiny.base_of(BASES.get(method, "llama")))
    adapter = bank.add("learner", METHODS[method], seed=5)
    examples = tiny.examples_of(9, 21, 4, 13, 7, 18)
    training = TrainSettings(epochs=3, batch_size=2, learning_rate=0.05, weight_decay=0.01)
    return Member(bank, adapter, examples, training, shuffle=True, budget=40)


def books_of(member: Member) -> dict[str, Any]:
    return {name: value for name, value in vars(member.books).items() if name != "seconds"}


@pytest.mark.parametrize("method", METHODS)
def test_stopped_after_any_step_and_resumed_equals_never_stopped(method):
    whole = member_of(method)
    first = {name: tensor.clone() for name, tensor in whole.adapter.state.items()}
    states = []
    while not whole.finished:
        whole.run_step()
        whole.check_moved()
        held, books = whole.state()
        read = {name: t.clone(memory_format=torch.contiguous_format) for name, t in held.items()}  # as a file gives it
        states.append((read, json.dumps(books)))
    assert len(states) == 9
    rests = whole.adapter.may_rest
    assert not any(torch.equal(p, first[name]) for name, p in whole.adapter.parameters() if name not in rests)
    for done, (tensors, text) in enumerate(states[:-1]):
        resumed = member_of(method)
        resumed.load_state(tensors, json.loads(text), None)
        resumed.run_step()  # a new member at every step: what one step after it equals, all later ones equal
        assert_same(resumed, *states[done + 1])
        while done == 0 and not resumed.finished:
            resumed.run_step()
            assert_same(resumed, *states[resumed.books.step - 1])


def assert_same(member: Member, tensors: dict[str, torch.Tensor], text: str) -> None:
    assert books_of(member) == {name: value for name, value in json.loads(text).items() if name != "seconds"}
    found = member.state()[0]
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor), name
