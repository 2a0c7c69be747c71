"""LoRA: beside a frozen layer W a trained product of two thin matrices, y = W x + s B A x.

A starts random and B at zero, so a fresh adapter changes nothing. s is lora_alpha / r, or lora_alpha / sqrt(r) with
use_rslora (arXiv:2312.03732), which keeps the update's size independent of the rank. Trained: r * (in + out) numbers
a layer, against in * out. Source: arXiv:2106.09685 sec. 4.1.

For linear layers the arithmetic is ops/low_rank.py's, and their tensors are here; convolutions, embeddings and DoRA
have files of their own. Here too: what the settings mean for each layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onebase.adapters.conv import make_conv
from onebase.adapters.dense import add_product_
from onebase.adapters.dora import make_magnitude
from onebase.adapters.embedding import make_embedding
from onebase.adapters.matching import Reach, check_patterns, for_path
from onebase.adapters.pair import PairPlan, initialise_, matrix_shape, scaling_of
from onebase.adapters.part import Built, Part
from onebase.adapters.places import Places
from onebase.base import memory
from onebase.config.methods import Lora
from onebase.errors import ConfigError, TargetError, list_problems


@dataclass(frozen=True, eq=False)
class LoraPart:
    """One adapter's pair on one linear layer: lora_A is (r, in), lora_B is (out, r), both fp32."""

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


def rank_and_alpha(settings: Lora, path: str) -> tuple[int, float]:
    """Return the rank and lora_alpha of one module: the patterns' where one matches, the adapter's otherwise."""
    r = for_path(settings.rank_pattern, path, settings.r)
    return r, float(for_path(settings.alpha_pattern, path, settings.lora_alpha))


def build(places: Places, settings: Lora, seed: int) -> Built:
    """Return a new adapter's pairs, one for each target.

    Raises:
        TargetError: the settings name a module that is not there, or none, or one that cannot have what they say.
        CapacityError: there is no memory for them.
    """
    _refuse_what_is_not_computed_yet(settings)
    match = places.choose(settings, REACH)
    patterns = {"rank_pattern": [*settings.rank_pattern], "alpha_pattern": [*settings.alpha_pattern]}
    check_patterns(patterns, match.paths, places.base.name)
    plans = [plan_of(settings, path, seed) for path in match.paths]
    shapes = [matrix_shape(places.module(path)) for path in match.paths]
    _check_ranks(plans, shapes)
    numbers = sum(plan.r * sum(shape) for plan, shape in zip(plans, shapes, strict=True))
    memory.check_room_for("the adapter", 4 * numbers, "Set a smaller adapter.r, or fewer target_modules.")
    parts: list[Part] = []
    for plan in plans:
        module = places.module(plan.path)
        part = _MAKERS[places.kind(plan.path)](plan, module)
        parts.append(part)
        if settings.use_dora:
            parts.append(make_magnitude(part, module, places.squares(plan.path)))
    return Built(tuple(parts), match.paths, match.warnings)


def plan_of(settings: Lora, path: str, seed: int) -> PairPlan:
    """Return what the settings say of the pair on one module."""
    r, lora_alpha = rank_and_alpha(settings, path)
    return PairPlan(
        path=path,
        r=r,
        lora_alpha=lora_alpha,
        scaling=scaling_of(r, lora_alpha, settings.use_rslora),
        dropout=settings.lora_dropout,
        init=settings.init_lora_weights,
        seed=seed,
    )


def make_linear(plan: PairPlan, module: Any) -> LoraPart:
    """Return a new pair for a linear layer, transposed or not."""
    outputs, inputs = matrix_shape(module)
    lora_A, lora_B = torch.empty(plan.r, inputs), torch.zeros(outputs, plan.r)
    initialise_(lora_A, lora_B, plan.init, plan.r, plan.generator())
    device = module.weight.device
    return LoraPart(
        path=plan.path,
        lora_A=nn.Parameter(lora_A.to(device)),
        lora_B=nn.Parameter(lora_B.to(device)),
        lora_alpha=plan.lora_alpha,
        scaling=plan.scaling,
        dropout=plan.dropout,
    )


_MAKERS: dict[str, Callable[[PairPlan, Any], Any]] = {
    **dict.fromkeys(("linear", "transposed-linear"), make_linear),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), make_conv),
    "embedding": make_embedding,
}
"""Kind of layer -> what makes its pair."""

REACH = Reach("LoRA", "linear layers, convolutions and embeddings", frozenset(_MAKERS))


def _check_ranks(plans: Sequence[PairPlan], shapes: Sequence[tuple[int, int]]) -> None:
    """Raise if a pair has more rank than its layer has room for: it would say nothing more and cost more.

    Raises:
        TargetError: every layer that is too small, by name.
    """
    small: dict[str, str] = {}
    for plan, (outputs, inputs) in zip(plans, shapes, strict=True):
        most, name = min(outputs, inputs), plan.path.rpartition(".")[2]
        if plan.r > most:
            small[name] = (
                f"adapter.r: {plan.r} is larger than {plan.path} ({outputs} x {inputs}) has room for, which is {most}. "
                f"Set adapter.rank_pattern: {{{name}: {most}}}, or a smaller adapter.r."
            )
    if small:
        raise TargetError(list_problems("adapter", list(small.values())))


def _refuse_what_is_not_computed_yet(settings: Lora) -> None:
    names = ("target_parameters", "trainable_token_indices", "ensure_weight_tying", "loraplus_lr_ratio")
    given = [name for name in names if getattr(settings, name)]
    given += ["init_lora_weights"] if settings.init_lora_weights not in (True, False, "gaussian") else []
    if given:
        raise ConfigError(list_problems("adapter", [f"{name}: is not available in this version." for name in given]))
