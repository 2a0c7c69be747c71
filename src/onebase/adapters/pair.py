"""Low-rank pairs: what is planned for one, what all kinds of layers share of it, and its first values.

Here: the plan, the rank that a layer allows, Kaiming and normal numbers. Which layer holds its pair in which shape is
lora.py's (linear), conv.py's, embedding.py's and experts.py's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from onebase.adapters.dense import is_transposed
from onebase.ops.keyed import mix


@runtime_checkable
class Pair(Protocol):
    """A low-rank pair as matrices: what is added to the dense weight is scaling * B @ A."""

    @property
    def path(self) -> str:
        """The path of its module."""

    @property
    def scaling(self) -> float:
        """What the product is scaled by."""

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A as (r, inputs) and B as (outputs, r)."""

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield what of it is trained."""


@dataclass(frozen=True)
class PairPlan:
    """What settings say of the pair on one module."""

    path: str
    r: int
    lora_alpha: float
    scaling: float
    dropout: float
    init: bool | str
    seed: int

    def generator(self) -> torch.Generator:
        """Return the source of its first values: it follows from seed and path alone."""
        return torch.Generator().manual_seed(mix(self.seed, self.path) >> 1)


def scaling_of(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """Return lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.

    Source: arXiv:2106.09685 sec. 4.1; arXiv:2312.03732 theorem 3.2.
    """
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def matrix_shape(module: nn.Module) -> tuple[int, int]:
    """Return (outputs, inputs) of a module as its pair sees it: B is (outputs, r), A is (r, inputs).

    A convolution's A reads every channel under its kernel, whatever its groups (PEFT's shapes).
    """
    weight = module.weight
    assert isinstance(weight, Tensor)
    if is_transposed(module):
        return int(weight.shape[1]), int(weight.shape[0])
    groups = getattr(module, "groups", 1)
    assert isinstance(groups, int)
    return int(weight.shape[0]), math.prod(weight.shape[1:]) * groups


def initialise_(
    lora_A: Float[Tensor, "r in"],
    lora_B: Float[Tensor, "out rank"],
    init: bool | str,
    r: int,
    generator: torch.Generator,
) -> None:
    """Fill a pair in place: A uniform as in nn.Linear, or normal with standard deviation 1/r; B zero.

    `init` False leaves B random too, as PEFT does, for tests of merging: not a no-op at the start.
    Source: PEFT, LoraLayer.reset_lora_parameters; Kaiming uniform with a = sqrt(5) is uniform in +-1/sqrt(in).
    """
    if init == "gaussian":
        lora_A.normal_(std=1 / r, generator=generator)
        return
    bound = 1 / math.sqrt(lora_A.shape[1])
    lora_A.uniform_(-bound, bound, generator=generator)
    if init is False:
        bound = 1 / math.sqrt(lora_B.shape[1])
        lora_B.uniform_(-bound, bound, generator=generator)
