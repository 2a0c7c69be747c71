"""Norm, gated activation and rotation in one pass are what their formulas say, forward and backward."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase.base.kernels import use_kernels
from onebase.ops import native
from onebase.ops.elementwise import (
    rms_norm,
    rms_norm_reference,
    rotary,
    rotary_reference,
    swiglu,
    swiglu_reference,
)

SHAPES = st.sampled_from([(1, 8), (5, 16), (2, 3, 6), (40, 576)])
EPS = 1e-5


@pytest.fixture(scope="module", autouse=True)
def compiled():
    why = use_kernels()
    if why:
        pytest.skip(why)


def numbers(shape, seed, size=1.0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * size


def cases(shape, seed, dtype):
    """Return each function with its reference and what it is a function of."""
    one, two, weight = (numbers(s, seed + i).to(dtype) for i, s in enumerate([shape, shape, shape[-1:]]))
    heads, angles = numbers((3, *shape[-2:]), seed + 3).to(dtype), numbers(shape[-2:], seed + 4).to(dtype)
    yield swiglu, swiglu_reference, [one * 4, two]
    yield lambda x: rms_norm(x, weight, EPS), lambda x: rms_norm_reference(x, weight, EPS), [one]
    yield (
        lambda x: rotary(x, angles.cos(), angles.sin()), lambda x: rotary_reference(x, angles.cos(), angles.sin()), [heads]
    )  # fmt: skip


def with_gradients(function, inputs, seed):
    leaves = [x.clone().requires_grad_() for x in inputs]
    y = function(*leaves)
    grad = numbers(y.shape, seed + 9).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


@given(SHAPES, st.integers(0, 99))
def test_each_equals_its_formula_and_autograd_in_fp64(shape, seed):
    for (ours, _, inputs), (_, meant, wide) in zip(
        cases(shape, seed, torch.float32), cases(shape, seed, torch.float64), strict=True
    ):
        assert native.fits(*inputs)
        for found, true in zip(with_gradients(ours, inputs, seed), with_gradients(meant, wide, seed), strict=True):
            torch.testing.assert_close(found.double(), true, rtol=2e-6, atol=2e-6 * float(true.abs().max()))


def test_a_row_alone_is_the_row_among_others_whatever_the_number_of_threads():
    gate, up, weight = numbers((101, 576), 0), numbers((101, 576), 1), numbers((576,), 2)
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for function in (swiglu, lambda one, other: rms_norm(one + other, weight, EPS)):
                together = with_gradients(function, [gate, up], 3)
                for row in (0, 50, 100):
                    cut = [part[row : row + 1].clone().requires_grad_() for part in (gate, up)]
                    y = function(*cut)
                    grads = torch.autograd.grad(y, cut, numbers((101, 576), 12)[row : row + 1])
                    for one, all_rows in zip([y, *grads], together, strict=True):
                        assert torch.equal(one[0], all_rows[row])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_so_and_in_its_row(bad):
    gate, up, weight = numbers((5, 16), 0), numbers((5, 16), 1), numbers((16,), 2)
    clean = [swiglu(gate, up), rms_norm(gate, weight, EPS)]
    gate[2, 3] = bad
    for found, before in zip([swiglu(gate, up), rms_norm(gate, weight, EPS)], clean, strict=True):
        assert not found[2, 3].isfinite()
        assert torch.equal(found[[0, 1, 3, 4]], before[[0, 1, 3, 4]])


def test_large_gates_neither_overflow_nor_lose_their_value():
    gate = torch.tensor([-1e4, -100.0, -80.0, 0.0, 80.0, 1e4, 1e30]).requires_grad_()
    y = swiglu(gate, torch.ones(7))
    torch.testing.assert_close(y, swiglu_reference(gate.detach(), torch.ones(7)), rtol=1e-6, atol=1e-30)
    (grad,) = torch.autograd.grad(y.sum(), gate)
    assert grad.isfinite().all() and grad[-1] == 1 and abs(grad[0]) < 1e-30


def test_other_formats_and_trained_weights_take_the_formulas_own_way():
    half = [part.bfloat16() for part in (numbers((4, 16), 0), numbers((4, 16), 1))]
    assert torch.equal(swiglu(*half), swiglu_reference(*half))
    weight = numbers((16,), 2).requires_grad_()
    rms_norm(numbers((4, 16), 0), weight, EPS).sum().backward()
    assert weight.grad is not None
