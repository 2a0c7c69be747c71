"""DoRA is PEFT's: forward, gradients, names and merged weights; a fresh one changes no bit; the norm is not dense."""

from typing import Any

import peft
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from onebase.adapters.dense import row_squares
from onebase.adapters.dora import direction_norms
from onebase.base.route import RowSpace
from onebase.config.methods import Lora
from tests.adapters.against_peft import assert_equal_to_peft
from tests.adapters.bare import Bare, assert_is_pefts, draws

SETTINGS: dict[str, Any] = {"r": 3, "lora_alpha": 5, "use_dora": True}


@pytest.mark.parametrize("use_rslora", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_pefts(bias, use_rslora):
    bare = Bare(nn.Linear(5, 6, bias=bias).double())
    settings = SETTINGS | {"use_rslora": use_rslora}
    bare.add(**settings, dtype=torch.float64, size=0.5)
    assert_is_pefts(bare, draws(2, 7, 5), **settings)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fresh_one_changes_no_bit(dtype, bias):
    bare = Bare(nn.Linear(50, 60, bias=bias).to(dtype))
    bare.add(**SETTINGS)
    x = draws(9, 50, dtype=dtype)
    assert torch.equal(bare(x), bare.layer(x))


def test_the_first_magnitudes_are_the_norms_of_the_sum_whatever_the_pair():
    bare = Bare(nn.Linear(5, 6))
    bare.add(**SETTINGS, init_lora_weights=False)
    pair, magnitude = bare.parts[0]
    W = bare.layer.weight + pair.scaling * pair.lora_B @ pair.lora_A
    torch.testing.assert_close(magnitude.magnitude, W.norm(dim=1))
    x = draws(4, 5, dtype=torch.float32)
    torch.testing.assert_close(bare(x), x @ W.T + bare.layer.bias)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.floats(0.01, 30), st.integers(0, 99))
def test_the_norms_are_those_of_the_dense_sum(outputs, inputs, r, scaling, seed):
    W, A, B = draws(outputs, inputs, seed=seed), draws(r, inputs, seed=seed + 1), draws(outputs, r, seed=seed + 2)
    dense = (W + scaling * B @ A).norm(dim=1)
    torch.testing.assert_close(direction_norms(W, row_squares(W), A, B, scaling), dense, rtol=1e-6, atol=1e-6)


def test_the_norms_follow_every_change_of_the_pair():
    bare = Bare(nn.Linear(5, 6))
    bare.add(**SETTINGS)
    pair, magnitude = bare.parts[0]

    def dense():
        return (bare.layer.weight + pair.scaling * pair.lora_B @ pair.lora_A).norm(dim=1)

    optimizer = torch.optim.AdamW([pair.lora_A, pair.lora_B], lr=0.1, fused=True)
    for _ in range(3):
        pair.lora_A.grad, pair.lora_B.grad = torch.ones(3, 5), torch.ones(6, 3)
        optimizer.step()
        torch.testing.assert_close(magnitude.magnitude / magnitude.factor(), dense())
    with torch.no_grad():
        pair.lora_B.detach().copy_(torch.full((6, 3), 0.5))  # as loading does
    torch.testing.assert_close(magnitude.magnitude / magnitude.factor(), dense())
    with torch.inference_mode():
        pair.lora_A.add_(1)
        torch.testing.assert_close(magnitude.magnitude / magnitude.factor(), dense())
    bare(draws(2, 5, dtype=torch.float32)).sum().backward()  # what inference left behind can be trained on


def test_the_norms_are_not_computed_again_while_the_pair_stays():
    bare = Bare(nn.Linear(5, 6))
    bare.add(**SETTINGS)
    _, magnitude = bare.parts[0]
    first = magnitude._norms()
    assert magnitude._norms() is first


def test_an_output_of_zeros_stays_the_bias_and_keeps_finite_gradients():
    layer = nn.Linear(5, 6)
    layer.weight.data[2] = 0
    bare = Bare(layer)
    bare.add(**SETTINGS)
    x = draws(4, 5, dtype=torch.float32)
    y = bare(x)
    assert torch.equal(y, bare.layer(x))
    y.sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in bare.parameters().values())


def test_dropout_is_on_the_update_alone():
    bare = Bare(nn.Linear(5, 6).double())
    bare.add(**SETTINGS, dtype=torch.float64, size=0.5, lora_dropout=0.999)
    _, magnitude = bare.parts[0]
    x, keys = draws(4, 5), torch.arange(4) * 977
    y = bare(x, row_keys={RowSpace.TOKEN: keys})
    bias = bare.layer.bias
    torch.testing.assert_close(y, (bare.layer(x) - bias) * magnitude.factor() + bias)


@pytest.mark.parametrize("name", ["llama", "opt"])
def test_in_a_model_and_beside_another_it_is_pefts(name):
    settings = SETTINGS | {"target_modules": ["q_proj", "fc1" if name == "opt" else "up_proj"]}
    assert_equal_to_peft(name, Lora(**settings), peft.LoraConfig(**settings))


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_on_the_output_head_it_is_pefts(name):
    settings = SETTINGS | {"target_modules": ["v_proj", "lm_head"]}
    saving = {"save_embedding_layers": False}  # PEFT's file has the head's own weight too
    assert_equal_to_peft(name, Lora(**settings), peft.LoraConfig(**settings), saving=saving)
