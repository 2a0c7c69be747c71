"""The fused rescaling is the reference, gradients included, whatever lies behind the outputs; a factor of 1 is nothing."""

import pytest
import torch

from onebase.ops.rescale import reference, rescale


def draws(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape", [(7, 5), (3, 5, 4), (2, 5, 3, 4), (0, 5)])
def test_values_and_gradients_are_the_references(shape, with_bias):
    bias = draws(5, seed=1) if with_bias else None
    weights = draws(*shape, seed=2)
    found = []
    for function in (rescale, reference):
        y, factor = draws(*shape).requires_grad_(), draws(5, seed=3).requires_grad_()
        out = function(y, factor, bias)
        (out * weights).sum().backward()
        found.append((out, y.grad, factor.grad))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_factor_of_one_returns_y_to_the_bit(dtype):
    y, bias = draws(100, 30, dtype=dtype), draws(30, seed=1, dtype=torch.float32)
    out = rescale(y, torch.ones(30), bias)
    assert torch.equal(out, y) and out.dtype == dtype


def test_half_precision_is_rounded_once():
    y, factor = draws(100, 30, dtype=torch.bfloat16), draws(30, seed=1, dtype=torch.float32)
    assert torch.equal(rescale(y, factor), (y.float() * factor).bfloat16())


def test_a_row_that_is_not_finite_stays_alone_in_the_rows_gradients():
    y, factor = draws(4, 5), draws(5, seed=1).requires_grad_()
    y[2] = float("nan")
    y.requires_grad_()
    out = rescale(y, factor)
    out[:2].sum().backward()
    assert bool(y.grad.isfinite().all())
