"""A fresh pair starts where PEFT's does: A random, B zero, both from the seed and the path alone."""

import math

import pytest
import torch
from torch import nn

from onebase.adapters.lora import make_linear, plan_of
from onebase.config.methods import Lora
from tests.tiny import global_randomness_untouched


def target_of(path="a.q_proj", seed=0, shape=(40, 300), **settings):
    return make_linear(
        plan_of(Lora(**({"r": 100} | settings)), path, seed), nn.utils.skip_init(nn.Linear, *shape[::-1])
    )


def test_lora_a_is_uniform_within_one_over_the_root_of_its_inputs_and_lora_b_is_zero():
    target = target_of()
    bound = 1 / math.sqrt(300)
    assert target.lora_A.abs().max() <= bound
    assert target.lora_A.abs().max() > 0.99 * bound
    assert target.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert abs(target.lora_A.mean().item()) < 5 * bound / math.sqrt(3 * target.lora_A.numel())
    assert not target.lora_B.any()


def test_gaussian_has_a_deviation_of_one_over_r():
    target = target_of(init_lora_weights="gaussian")
    assert target.lora_A.std().item() == pytest.approx(1 / 100, rel=0.02)
    assert not target.lora_B.any()


def test_without_initialisation_both_are_random_as_in_peft():
    target = target_of(init_lora_weights=False)
    assert target.lora_A.std().item() == pytest.approx(1 / math.sqrt(3 * 300), rel=0.02)
    assert target.lora_B.std().item() == pytest.approx(1 / math.sqrt(3 * 100), rel=0.05)


@pytest.mark.parametrize("init", [True, "gaussian", False])
def test_the_weights_follow_from_seed_and_path_and_from_nothing_else(init):
    one = target_of(init_lora_weights=init)
    torch.rand(3)
    target_of("other", init_lora_weights=init)
    again = target_of(init_lora_weights=init)
    assert torch.equal(one.lora_A, again.lora_A)
    assert torch.equal(one.lora_B, again.lora_B)
    for other in (target_of(seed=1, init_lora_weights=init), target_of("a.v_proj", init_lora_weights=init)):
        share = torch.corrcoef(torch.stack([one.lora_A.detach().flatten(), other.lora_A.detach().flatten()]))[0, 1]
        assert abs(share) < 5 / math.sqrt(one.lora_A.numel())


def test_making_a_target_leaves_the_global_generator_alone():
    with global_randomness_untouched():
        for init in (True, "gaussian", False):
            target_of(init_lora_weights=init)


def test_the_tensors_are_fp32_parameters_with_pefts_names():
    target = target_of(r=3, shape=(4, 5))
    assert [(name, tuple(p.shape), p.dtype, p.requires_grad) for name, p in target.parameters()] == [
        ("a.q_proj.lora_A.weight", (3, 5), torch.float32, True),
        ("a.q_proj.lora_B.weight", (4, 3), torch.float32, True),
    ]
    assert target.r == 3
