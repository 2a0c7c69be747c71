"""LoRA+ gives PEFT's tensors PEFT's rates; without it there is one rate."""

import warnings
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from onebase.adapters.bank import Bank
from onebase.config.methods import Ia3, Lora
from onebase.config.settings import TrainSettings
from onebase.train.member import Member
from onebase.train.rates import parameter_groups
from tests import tiny

PREFIX = "base_model.model."


def rates_of(settings, named, rate=0.01):
    named = list(named)
    names = {id(parameter): name for name, parameter in named}
    return {names[id(p)]: group["lr"] for group in parameter_groups(settings, named, rate) for p in group["params"]}


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"bias": "lora_only"}])
def test_the_rates_are_pefts(settings):
    given: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "fc1"]} | settings
    adapter = Bank(tiny.base_of("opt")).add("one", Lora(**given, loraplus_lr_ratio=16))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(tiny.model_of("opt"), peft.LoraConfig(**given))
        optimizer = create_loraplus_optimizer(theirs, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=16)
    names = {id(p): name.replace(".base_layer", "") for name, p in theirs.named_parameters()}
    expected = {
        names[id(p)].removeprefix(PREFIX).replace(".default", "").replace("vector.weight", "vector"): group["lr"]
        for group in optimizer.param_groups
        for p in group["params"]
    }
    found = {
        name.replace(".base_layer", ""): rate for name, rate in rates_of(adapter.settings, adapter.parameters()).items()
    }
    assert found == pytest.approx(expected)
    assert set(found.values()) == {0.01, 0.16}


def test_an_embeddings_pair_learns_at_the_plain_rate():
    adapter = Bank(tiny.base_of()).add("one", Lora(r=4, target_modules=["embed_tokens", "q_proj"], loraplus_lr_ratio=4))
    found = rates_of(adapter.settings, adapter.parameters())
    assert {rate for name, rate in found.items() if "embedding" in name} == {0.01}
    assert {rate for name, rate in found.items() if "lora_B" in name} == {0.04}


@pytest.mark.parametrize("settings", [Lora(r=4), Ia3()])
def test_without_it_there_is_one_rate(settings):
    adapter = Bank(tiny.base_of()).add("one", settings)
    assert set(rates_of(settings, adapter.parameters()).values()) == {0.01}


def test_every_step_keeps_the_ratio_to_the_schedule():
    bank = Bank(tiny.base_of())
    adapter = bank.add("one", Lora(r=4, loraplus_lr_ratio=8))
    settings = TrainSettings(epochs=2, batch_size=2, learning_rate=0.01, lr_scheduler_type="linear")
    member = Member(bank, adapter, tiny.examples_of(9, 12, 7, 8), settings, shuffle=False, budget=200)
    rates = []
    while not member.finished:
        record = member.run_step()
        slow, fast = (group["lr"] for group in member.optimizer.param_groups)
        assert slow == record.learning_rate and fast == pytest.approx(8 * slow)
        rates.append(slow)
    assert len(set(rates)) > 1
