"""LoRA: beside a frozen linear layer W a trained product of two thin matrices, y = W x + s B A x.

A starts random and B at zero, so a fresh adapter changes nothing. s is lora_alpha / r, or lora_alpha / sqrt(r) with
use_rslora (arXiv:2312.03732), which keeps the update's size independent of the rank. Trained: r * (in + out) numbers
a layer, against in * out. Source: arXiv:2106.09685 sec. 4.1.

The arithmetic is ops/low_rank.py's; here are the tensors, their initial values and what the settings mean for a layer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from onebase.adapters.matching import for_path
from onebase.config.methods import Lora
from onebase.ops.keyed import mix


@dataclass(frozen=True, eq=False)
class LoraTarget:
    """One adapter's pair on one module: lora_A is (r, in), lora_B is (out, r), both fp32."""

    path: str
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_alpha: float
    scaling: float
    dropout: float

    @property
    def r(self) -> int:
        """The rank of the pair."""
        return int(self.lora_A.shape[0])

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the tensors under the names of PEFT's format, without its "base_model.model." in front."""
        yield f"{self.path}.lora_A.weight", self.lora_A
        yield f"{self.path}.lora_B.weight", self.lora_B


def scaling_of(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """Return lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.

    Source: arXiv:2106.09685 sec. 4.1; arXiv:2312.03732 theorem 3.2.
    """
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def rank_and_alpha(settings: Lora, path: str) -> tuple[int, float]:
    """Return the rank and lora_alpha of one module: the patterns' where one matches, the adapter's otherwise."""
    r = for_path(settings.rank_pattern, path, settings.r)
    return r, float(for_path(settings.alpha_pattern, path, settings.lora_alpha))


def make_target(settings: Lora, path: str, shape: tuple[int, int], seed: int, device: torch.device) -> LoraTarget:
    """Return a new pair for the module at `path` with weight `shape` (out, in), from the adapter's seed and the path."""
    r, lora_alpha = rank_and_alpha(settings, path)
    out_features, in_features = shape
    lora_A = torch.empty(r, in_features)
    lora_B = torch.zeros(out_features, r)
    initialise_(lora_A, lora_B, settings.init_lora_weights, r, torch.Generator().manual_seed(mix(seed, path) >> 1))
    return LoraTarget(
        path=path,
        lora_A=nn.Parameter(lora_A.to(device)),
        lora_B=nn.Parameter(lora_B.to(device)),
        lora_alpha=lora_alpha,
        scaling=scaling_of(r, lora_alpha, settings.use_rslora),
        dropout=settings.lora_dropout,
    )


def initialise_(
    lora_A: Float[Tensor, "r in"],
    lora_B: Float[Tensor, "out r"],
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
        bound = 1 / math.sqrt(r)
        lora_B.uniform_(-bound, bound, generator=generator)
