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

from onebase.adapters.dense import add_product_
from onebase.adapters.dora import make_magnitude
from onebase.adapters.matching import check_patterns, for_path
from onebase.adapters.part import Built, Part
from onebase.adapters.places import Places
from onebase.base import memory
from onebase.config.methods import Lora
from onebase.errors import ConfigError, list_problems
from onebase.ops.keyed import mix


@dataclass(frozen=True, eq=False)
class LoraPart:
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

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A as (r, in) and B as (out, r), so that scaling * B @ A is what the dense weight gets."""
        return self.lora_A.detach(), self.lora_B.detach()

    @torch.no_grad()
    def merge_(self, module: nn.Module) -> None:
        """Add the pair to the weight of a copy of its module, in fp32 at least."""
        add_product_(module, self.path, *self.factors(), self.scaling)


def scaling_of(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """Return lora_alpha / r, or lora_alpha / sqrt(r) with `use_rslora`.

    Source: arXiv:2106.09685 sec. 4.1; arXiv:2312.03732 theorem 3.2.
    """
    return lora_alpha / math.sqrt(r) if use_rslora else lora_alpha / r


def rank_and_alpha(settings: Lora, path: str) -> tuple[int, float]:
    """Return the rank and lora_alpha of one module: the patterns' where one matches, the adapter's otherwise."""
    r = for_path(settings.rank_pattern, path, settings.r)
    return r, float(for_path(settings.alpha_pattern, path, settings.lora_alpha))


def build(places: Places, settings: Lora, seed: int) -> Built:
    """Return a new adapter's pairs, one for each target.

    Raises:
        TargetError: the settings name a module that is not there, or none.
        CapacityError: there is no memory for them.
    """
    base = places.base
    _refuse_what_is_not_computed_yet(settings)
    match = places.choose(settings)
    patterns = {"rank_pattern": [*settings.rank_pattern], "alpha_pattern": [*settings.alpha_pattern]}
    check_patterns(patterns, match.paths, base.name)
    shapes = {path: tuple(places.module(path).weight.shape) for path in match.paths}
    numbers = sum(rank_and_alpha(settings, path)[0] * sum(shape) for path, shape in shapes.items())
    memory.check_room_for("the adapter", 4 * numbers, "Set a smaller adapter.r, or fewer target_modules.")
    parts: list[Part] = []
    for path, shape in shapes.items():
        part = make_part(settings, path, (shape[0], shape[1]), seed, base.device)
        parts.append(part)
        if settings.use_dora:
            parts.append(make_magnitude(part, places.module(path), places.squares(path)))
    return Built(tuple(parts), match.paths, match.warnings)


def _refuse_what_is_not_computed_yet(settings: Lora) -> None:
    names = ("target_parameters", "trainable_token_indices", "ensure_weight_tying", "loraplus_lr_ratio")
    given = [name for name in (*names, "modules_to_save") if getattr(settings, name)]
    given += ["init_lora_weights"] if settings.init_lora_weights not in (True, False, "gaussian") else []
    if given:
        raise ConfigError(list_problems("adapter", [f"{name}: is not available in this version." for name in given]))


def make_part(settings: Lora, path: str, shape: tuple[int, int], seed: int, device: torch.device) -> LoraPart:
    """Return a new pair for the module at `path` with weight `shape` (out, in), from the adapter's seed and the path."""
    r, lora_alpha = rank_and_alpha(settings, path)
    out_features, in_features = shape
    lora_A = torch.empty(r, in_features)
    lora_B = torch.zeros(out_features, r)
    initialise_(lora_A, lora_B, settings.init_lora_weights, r, torch.Generator().manual_seed(mix(seed, path) >> 1))
    return LoraPart(
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
