"""Norm and gated activation in one pass are what their formulas say, forward and backward, compiled or not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase.ops.elementwise import rms_norm, rms_norm_reference, swiglu, swiglu_reference

SHAPES = st.sampled_from([(1, 8), (5, 16), (2, 3, 8)])


def leaves(shape, count, seed):
    draws = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=draws, dtype=torch.float64).requires_grad_() for _ in range(count)]


@given(SHAPES, st.integers(0, 99))
def test_each_equals_its_formula_and_autograd_in_fp64(shape, seed):
    gate, up = leaves(shape, 2, seed)
    weight, eps = torch.randn(shape[-1], generator=torch.Generator().manual_seed(seed), dtype=torch.float64), 1e-5
    for found, meant in (
        (swiglu(gate, up), swiglu_reference(gate, up)),
        (rms_norm(gate, weight, eps), rms_norm_reference(gate, weight, eps)),
    ):
        torch.testing.assert_close(found, meant, rtol=1e-12, atol=1e-12)
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
        own, theirs = (torch.autograd.grad(y, [gate, up], grad, allow_unused=True) for y in (found, meant))
        for one, other in zip(own, theirs, strict=True):
            assert (one is None) == (other is None)
            if one is not None:
                torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_half_precision_stays_half_and_is_computed_in_fp32():
    gate, up = (leaf.detach().bfloat16().requires_grad_() for leaf in leaves((4, 16), 2, 0))
    weight = torch.ones(16, dtype=torch.bfloat16)
    for found, meant in (
        (swiglu(gate, up), swiglu_reference(gate, up)),
        (rms_norm(gate, weight, 1e-5), rms_norm_reference(gate, weight, 1e-5)),
    ):
        assert found.dtype == torch.bfloat16
        torch.testing.assert_close(found, meant, rtol=2e-2, atol=1e-2)


@pytest.mark.slow
def test_compiled_one_graph_an_operation_serves_any_number_of_rows():
    """Norm, activation and their gradients, two quantisations and two scalings: eight, and one more where one row differs."""
    command = [sys.executable, "-m", "tests.ops.compiled_fused"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["8"]
