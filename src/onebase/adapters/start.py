"""Where a pair on a linear layer starts, beyond random numbers: orthogonal, PiSSA, OLoRA.

    orthogonal    A = X Q_odd / 10, B = Y Q_even / 10: B A is zero but for rounding, and neither is zero
    pissa         B A s = the r largest singular directions of W, split evenly           (arXiv:2404.02948 eq. 2-4)
    pissa_niter_N the same by N subspace iterations                                       (sec. 3, Halko et al.)
    olora         B A = the first r columns and rows of W's QR factors                    (arXiv:2406.01775 alg. 1)

PiSSA and OLoRA take what they start from out of the base. Ours stays as it is: the pair (A0, B0) of the start is kept
beside the trained one and the update is s (B A - B0 A0), two like products subtracted, so that a fresh adapter changes no
bit. Values are PEFT's for the same weight; where they are random they follow from seed and path. Cost: once a layer, a
singular value decomposition (pissa: cubic in its width), iterations or a QR.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

PLAIN = (True, False, "gaussian")
"""Starts that need no weight, which every kind of layer can have."""


def takes_from_base(init: bool | str) -> bool:
    """Return whether the pair's first values are taken out of the base's weight."""
    return isinstance(init, str) and init.startswith(("pissa", "olora"))


def first_pair(
    init: str, dense: Float[Tensor, "out in"], r: int, scaling: float, generator: torch.Generator
) -> tuple[Float[Tensor, "r in"], Float[Tensor, "out r"]]:
    """Return A and B for a start that is not plain, fp32.

    Args:
        dense: the layer's weight.
        r: even for orthogonal.
    """
    with torch.no_grad():
        if init == "orthogonal":
            return _orthogonal(dense.shape, r, generator)
        weight = dense.float()
        if init == "olora":
            Q, R = torch.linalg.qr(weight)
            return R[:r].contiguous(), Q[:, :r].contiguous()
        U, S, Vh = _largest(weight, r, init, generator)
        root = (S / scaling).sqrt()
        return root[:, None] * Vh, U * root


def _largest(weight: Tensor, r: int, init: str, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return the r largest singular directions as U (out, r), S (r,), Vh (r, in)."""
    if init == "pissa":
        U, S, Vh = torch.linalg.svd(weight, full_matrices=False)
        return U[:, :r], S[:r], Vh[:r]
    return _iterated(weight, r, int(init.rpartition("_")[2]), generator)


def _iterated(weight: Tensor, r: int, iterations: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Return about the r largest singular directions: torch.svd_lowrank with draws from a generator of one's own.

    Source: Halko, Martinsson and Tropp, arXiv:0909.4061 alg. 4.4 and 5.1.
    """
    tall = weight if weight.shape[0] >= weight.shape[1] else weight.T
    Q = torch.linalg.qr(tall @ torch.randn(tall.shape[1], r, generator=generator).to(weight.device)).Q
    for _ in range(iterations):
        Q = torch.linalg.qr(tall @ torch.linalg.qr(tall.T @ Q).Q).Q
    U, S, Vh = torch.linalg.svd(Q.T @ tall, full_matrices=False)
    U = Q @ U
    return (U, S, Vh) if tall is weight else (Vh.T, S, U.T)


def _orthogonal(shape: torch.Size, r: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Source: PEFT, LoraLayer.orthogonal_init; https://datta0.github.io/posts/rethink-lora-init."""
    assert r % 2 == 0, r
    outputs, inputs = shape
    Q, _ = torch.linalg.qr(torch.randn(r, r, generator=generator))
    A = (torch.randn(inputs, r // 2, generator=generator) @ Q[0::2]).T / 10
    B = torch.randn(r // 2, outputs, generator=generator).T @ Q[1::2] / 10
    return A.contiguous(), B.contiguous()
