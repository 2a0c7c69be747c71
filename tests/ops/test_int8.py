"""Products in 8 bits are what their formula says, forward and backward, row by row."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase.base.kernels import use_kernels
from onebase.ops import native
from onebase.ops.int8 import (
    int8_linear,
    quantise_rows,
    quantise_weight,
    reference,
    reference_gradient,
    scale_products,
)

SIZES = st.sampled_from([8, 16, 24, 40])
EXACT: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def layer(rows, inputs, outputs, seed=0, bias=True):
    draws = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, inputs, generator=draws) * torch.logspace(-3, 3, rows)[:, None]
    weight = torch.randn(outputs, inputs, generator=draws)
    return x, *quantise_weight(weight), torch.randn(outputs, generator=draws) if bias else None, weight


@given(st.integers(1, 40), SIZES, SIZES, st.integers(0, 99), st.booleans(), st.booleans())
def test_the_output_and_the_gradient_are_the_formulas(rows, inputs, outputs, seed, bias, shared):
    x, integers, scales, b, _ = layer(rows, inputs, outputs, seed, bias)
    x.requires_grad_()
    shares = torch.linspace(0.5, 2, inputs) if shared else None
    y = int8_linear(x, integers, scales, b, shares)
    torch.testing.assert_close(y, reference(x.detach(), integers, scales, b, shares), **EXACT)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed + 1))
    y.backward(g)
    torch.testing.assert_close(x.grad, reference_gradient(g, integers, scales, shares), **EXACT)


def test_the_error_is_that_of_the_last_of_127_steps():
    x, integers, scales, _, weight = layer(64, 256, 64)
    steps_x, steps_w = x.abs().amax(1) / 127 / 2, scales / 2
    true, found = x.double() @ weight.T.double(), int8_linear(x, integers, scales).double()
    bound = steps_x[:, None] * weight.abs().sum(1) + steps_w * (x.abs().sum(1)[:, None] + 256 * steps_x[:, None])
    assert ((found - true).abs() <= bound).all()
    assert ((found - true).norm(dim=1) / true.norm(dim=1)).median() < 0.02


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_row_that_is_not_finite_stays_so_and_spoils_no_other(bad):
    x, integers, scales, bias, _ = layer(5, 16, 8)
    clean = int8_linear(x, integers, scales, bias)
    x[2, 3] = bad
    found = int8_linear(x, integers, scales, bias)
    assert not found[2].isfinite().any()
    others = [0, 1, 3, 4]
    assert torch.equal(found[others], clean[others])


def test_a_row_alone_is_the_row_among_others():
    x, integers, scales, bias, _ = layer(9, 32, 24)
    together = int8_linear(x, integers, scales, bias)
    assert torch.equal(torch.cat([int8_linear(row[None], integers, scales, bias) for row in x]), together)


def test_zeros_give_the_bias_and_other_formats_their_own():
    _, integers, scales, bias, _ = layer(1, 16, 8)
    assert torch.equal(int8_linear(torch.zeros(3, 16), integers, scales, bias), bias.expand(3, 8))
    half = int8_linear(torch.ones(3, 16, dtype=torch.bfloat16), integers, scales, None)
    assert half.dtype == torch.bfloat16


@pytest.mark.parametrize("shared", [False, True])
def test_compiled_and_not_the_integers_and_the_numbers_are_the_same_to_the_bit(shared, monkeypatch):
    if why := use_kernels():
        pytest.skip(why)
    draws = torch.Generator().manual_seed(0)
    x = torch.randn(900, 200, generator=draws) * torch.logspace(-6, 6, 900)[:, None]
    x[7] = 0
    factors = torch.rand(400, generator=draws)[::2] if shared else None
    products = torch.randint(-(10**6), 10**6, (200, 900), generator=draws, dtype=torch.int32).T
    bias = torch.randn(200, generator=draws) if shared else None
    found = []
    for library in (native._Process.library, None):
        monkeypatch.setattr(native._Process, "library", library)
        integers, scales = quantise_rows(x, factors)
        found.append((integers, scales, scale_products(products, scales, factors, bias, torch.float32)))
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_a_number_for_every_column_is_needed():
    if why := use_kernels():
        pytest.skip(why)
    with pytest.raises(ValueError, match="columns"):
        native.quantise_rows(torch.ones(3, 8), torch.ones(4))
