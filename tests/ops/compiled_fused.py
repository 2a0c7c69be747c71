"""Fused operations compiled, beside themselves as written: run as a process of its own, without the hook that checks shapes.

Raises where a compiled result differs, and prints how many graphs were compiled for three numbers of rows.
"""

import torch
from torch._dynamo.utils import counters

from onebase.ops.elementwise import rms_norm, rms_norm_reference, swiglu, swiglu_reference
from onebase.ops.fused import compile_fused
from onebase.ops.int8 import int8_linear, quantise_weight, reference, reference_gradient


def compare(rows: int) -> None:
    """Hold each operation and its gradient against the reference."""
    draws = torch.Generator().manual_seed(rows)
    x, g = (torch.randn(rows, 48, generator=draws).requires_grad_() for _ in range(2))
    weight, bias = torch.randn(48, generator=draws), torch.randn(24, generator=draws)
    integers, scales = quantise_weight(torch.randn(24, 48, generator=draws))
    pairs = [
        (swiglu(x, g), swiglu_reference(x, g)),
        (rms_norm(x, weight, 1e-5), rms_norm_reference(x, weight, 1e-5)),
    ]
    for found, meant in pairs:
        torch.testing.assert_close(found, meant, rtol=1e-5, atol=1e-5)
        grad = torch.randn(found.shape, generator=draws)
        for one, other in zip(gradients(found, x, g, grad), gradients(meant, x, g, grad), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)
    y = int8_linear(x, integers, scales, bias)
    torch.testing.assert_close(y, reference(x.detach(), integers, scales, bias), rtol=1e-5, atol=1e-5)
    (dx,) = torch.autograd.grad(y, x, grad[:, :24])
    torch.testing.assert_close(dx, reference_gradient(grad[:, :24], integers, scales), rtol=1e-5, atol=1e-5)


def gradients(result: torch.Tensor, x: torch.Tensor, g: torch.Tensor, grad: torch.Tensor) -> list[torch.Tensor]:
    """Return the gradients of those inputs that have one."""
    return list(filter(lambda d: d is not None, torch.autograd.grad(result, [x, g], grad, allow_unused=True)))


if __name__ == "__main__":
    compile_fused(True)
    for count in (33, 7, 64):
        compare(count)
    print(counters["stats"]["unique_graphs"])
