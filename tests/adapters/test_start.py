"""Where pairs start: PEFT's values for the same weight, equal functions then and after a step, and no bit changed."""

import copy
from typing import Any

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from onebase.adapters.bank import Bank
from onebase.adapters.lora import settings_in_file
from onebase.adapters.start import first_pair
from onebase.config.methods import Lora
from onebase.errors import TargetError
from onebase.measure.forward import forward_loss
from onebase.ops.keyed import mix
from tests import tiny
from tests.adapters.bare import Bare, Holder, draws

FROM_BASE = ["pissa", "pissa_niter_4", "olora"]
SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 6}
fp32: dict[str, Any] = {"rtol": 1e-4, "atol": 1e-5}


def layers():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return {"linear": nn.Linear(9, 7), "transposed": Conv1D(7, 9)}


def theirs_of(layer, init, seed, **settings):
    """Return PEFT's model with its own start, its draws those of our generator."""
    config = peft.LoraConfig(target_modules=["layer"], **SETTINGS | settings)
    theirs = peft.get_peft_model(Holder(copy.deepcopy(layer)), config).eval()
    wrapper: Any = theirs.base_model.model.layer
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if init == "orthogonal":
            wrapper.orthogonal_init("default")
        elif init == "olora":
            wrapper.olora_init("default")
        else:
            wrapper.pissa_init("default", init)
    return theirs, wrapper


# PEFT's olora factors the transposed weight as it lies, and then fails.
@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize(
    ("kind", "init"),
    [("linear", init) for init in (*FROM_BASE, "orthogonal")]
    + [("transposed", init) for init in ("pissa", "pissa_niter_4", "orthogonal")],
)
def test_values_and_outputs_are_pefts_at_the_start_and_after_a_step(kind, init, use_rslora):
    layer = layers()[kind]
    bare = Bare(layer)
    bare.add(**SETTINGS, init_lora_weights=init, use_rslora=use_rslora, seed=5)
    (part,) = bare.parts[0]
    theirs, wrapper = theirs_of(bare.layer, init, seed_of(5), use_rslora=use_rslora)
    torch.testing.assert_close(part.lora_A.detach(), wrapper.lora_A["default"].weight.detach(), **fp32)
    torch.testing.assert_close(part.lora_B.detach(), wrapper.lora_B["default"].weight.detach(), **fp32)
    x, weights = draws(5, 9, dtype=torch.float32), draws(5, 7, seed=1, dtype=torch.float32)
    torch.testing.assert_close(bare(x), theirs(x), **fp32)
    mine = [part.lora_A, part.lora_B]
    other = [wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight]
    for forward, parameters in ((bare, mine), (theirs, other)):
        (forward(x) * weights).sum().backward()
        torch.optim.SGD(parameters, lr=0.05).step()
    torch.testing.assert_close(bare(x), theirs(x), **fp32)
    torch.testing.assert_close(bare.merged()(x), bare(x), **fp32)
    assert (bare(x) - bare.layer(x)).abs().max() > 1e-2


def seed_of(seed):
    return torch.Generator().manual_seed(mix(seed, "layer") >> 1).initial_seed()


@pytest.mark.parametrize("use_dora", [False, True])
@pytest.mark.parametrize("init", FROM_BASE)
@pytest.mark.parametrize("kind", ["linear", "transposed"])
def test_a_start_from_the_base_changes_no_bit_beside_other_rows_too(kind, init, use_dora):
    bare = Bare(layers()[kind])
    bare.add(**SETTINGS, init_lora_weights=init, use_dora=use_dora, lora_dropout=0.3)
    bare.add(r=2, size=0.5)
    x = draws(6, 3, 9, dtype=torch.float32)
    out = bare(x, owners=(0, 0, 1, -1, 0, 1))
    plain = bare.layer(x)
    assert torch.equal(out[[0, 1, 3, 4]], plain[[0, 1, 3, 4]])
    assert (out[2] - plain[2]).abs().max() > 1e-3


@pytest.mark.parametrize("init", FROM_BASE)
def test_what_is_taken_off_is_never_trained(init):
    bare = Bare(layers()["linear"])
    bare.add(**SETTINGS, init_lora_weights=init)
    (part,) = bare.parts[0]
    before = [tensor.clone() for tensor in part.start]
    optimizer = torch.optim.AdamW([part.lora_A, part.lora_B], lr=0.1)
    x = draws(5, 9, dtype=torch.float32)
    for _ in range(2):
        bare(x).square().sum().backward()
        optimizer.step()
    assert all(torch.equal(one, other) for one, other in zip(part.start, before, strict=True))
    A, B = part.lora_A, part.lora_B
    update = part.scaling * (x @ A.T @ B.T - x @ before[0].T @ before[1].T)
    torch.testing.assert_close(bare(x), bare.layer(x) + update, **fp32)


def test_orthogonal_pairs_cancel_and_neither_is_zero():
    A, B = first_pair("orthogonal", draws(70, 90), 8, 2.0, torch.Generator().manual_seed(1))
    assert (B @ A).abs().max() < 1e-6 < A.abs().min() + B.abs().max()
    assert torch.linalg.matrix_rank(A) == 4 and torch.linalg.matrix_rank(B) == 4


def test_starts_leave_the_global_generator_alone_and_follow_from_the_seed():
    with tiny.global_randomness_untouched():
        pairs = [
            first_pair(init, draws(30, 40), 4, 2.0, torch.Generator().manual_seed(1))
            for init in ("pissa_niter_2", "orthogonal")
            for _ in range(2)
        ]
    for one, other in (pairs[:2], pairs[2:]):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("init", FROM_BASE)
@pytest.mark.parametrize(
    "settings", [{}, {"use_rslora": True, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"q_proj": 3}}]
)
def test_its_file_is_a_plain_pair_of_twice_the_rank_that_does_the_same(init, settings):
    given = Lora(**SETTINGS | settings, target_modules=["q_proj", "v_proj", "lm_head"], init_lora_weights=init)
    bank = Bank(tiny.base_of("llama"))
    adapter = bank.add("one", given)
    for seed, (_, parameter) in enumerate(adapter.parameters()):
        parameter.data += 0.1 * draws(*parameter.shape, seed=seed, dtype=torch.float32)
    bank.add("read", settings_in_file(given), tensors=adapter.file_tensors)
    examples = tiny.examples_of(9, 21)
    losses = [forward_loss(bank, tiny.batch_of(examples, name), 1.0)[0] for name in ("one", "read", None)]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-5)
    assert (losses[0] - losses[2]).abs() > 1e-3


def test_a_checkpoint_holds_the_start_too():
    given = Lora(**SETTINGS, target_modules=["q_proj"], init_lora_weights="pissa")
    adapter = Bank(tiny.base_of("llama")).add("one", given)
    assert len(adapter.state) == 2 * len(dict(adapter.parameters()))
    again = Bank(tiny.base_of("llama", seed=3)).add("one", given, tensors=adapter.state)
    assert all(torch.equal(tensor, again.state[name]) for name, tensor in adapter.state.items())


# ------------------------------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize("layer", [nn.Embedding(11, 6), nn.Conv2d(3, 6, 2)])
@pytest.mark.parametrize("init", [*FROM_BASE, "orthogonal"])
def test_a_start_that_the_layer_cannot_have_is_an_error(layer, init):
    with pytest.raises(TargetError, match=rf"init_lora_weights: {init} starts pairs on linear layers, not on layer"):
        Bare(layer).add(**SETTINGS, init_lora_weights=init)


@pytest.mark.parametrize(("width", "r", "even"), [(9, 3, 4), (16, 15, 16), (16, 17, 16), (9, 9, 8), (16, 33, 16)])
def test_an_odd_rank_cannot_be_orthogonal_and_the_one_that_is_advised_can(width, r, even):
    layer = nn.Linear(width, 40)
    with pytest.raises(TargetError, match=rf"orthogonal needs an even r, got {r}\. Set adapter\.r: {even}\.$"):
        Bare(layer).add(r=r, init_lora_weights="orthogonal")
    Bare(layer).add(r=even, init_lora_weights="orthogonal")


def test_where_no_rank_is_even_another_start_is_advised():
    with pytest.raises(TargetError, match=r"orthogonal needs an even r, got 1\. Set it to true\."):
        Bare(nn.Linear(1, 4)).add(r=1, init_lora_weights="orthogonal")


def test_an_odd_rank_by_pattern_is_said_to_be_one():
    with pytest.raises(TargetError, match=r"got 3\. Set the rank of layer in adapter\.rank_pattern: 4\."):
        Bare(nn.Linear(9, 7)).add(r=2, rank_pattern={"layer": 3}, init_lora_weights="orthogonal")


@pytest.mark.parametrize("shape", [(7, 9), (9, 7), (8, 8)])
def test_iterations_are_torchs_for_tall_and_wide_weights(shape):
    weight = draws(*shape, dtype=torch.float32)
    A, B = first_pair("pissa_niter_2", weight, 4, 1.0, torch.Generator().manual_seed(3))
    with torch.random.fork_rng():
        torch.manual_seed(3)
        U, S, V = torch.svd_lowrank(weight, 4, niter=2)
    torch.testing.assert_close(B @ A, U * S @ V.T, **fp32)
    torch.testing.assert_close((B * B).sum(0), S, **fp32)
