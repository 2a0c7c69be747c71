"""LoRA: beside a frozen layer W a trained product of two thin matrices, y = W x + s B A x.

A starts random and B at zero, so a fresh adapter changes nothing. s is lora_alpha / r, or lora_alpha / sqrt(r) with
use_rslora (arXiv:2312.03732), which keeps the update's size independent of the rank. Trained: r * (in + out) numbers
a layer, against in * out. Source: arXiv:2106.09685 sec. 4.1.

For linear layers the arithmetic is ops/low_rank.py's, and their tensors are here; convolutions, embeddings and DoRA
have files of their own. Here too: what the settings mean for each layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onebase.adapters import start
from onebase.adapters.conv import make_conv
from onebase.adapters.dense import add_product_, dense_weight
from onebase.adapters.dora import make_magnitude
from onebase.adapters.embedding import make_embedding
from onebase.adapters.experts import choose_parameters, make_experts, pair_width
from onebase.adapters.matching import Match, Reach, check_patterns, for_path
from onebase.adapters.pair import PairPlan, initialise_, matrix_shape, scaling_of
from onebase.adapters.part import Built, Part
from onebase.adapters.places import Places
from onebase.base import memory
from onebase.config.methods import Lora
from onebase.errors import TargetError


@dataclass(frozen=True, eq=False)
class LoraPart:
    """One adapter's pair on one linear layer: lora_A is (r, in), lora_B is (out, r), both fp32."""

    path: str
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    lora_alpha: float
    scaling: float
    dropout: float
    start: tuple[Tensor, Tensor] | None = None
    """A and B as they began, where the update is what has been added to that (adapters/start.py)."""

    @property
    def r(self) -> int:
        """The rank of the pair."""
        return int(self.lora_A.shape[0])

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the tensors under the names of PEFT's format, without its "base_model.model." in front."""
        yield f"{self.path}.lora_A.weight", self.lora_A
        yield f"{self.path}.lora_B.weight", self.lora_B

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A as (r, in) and B as (out, r), so that scaling * B @ A is what the dense weight gets; 2r with a start."""
        A, B = self.lora_A.detach(), self.lora_B.detach()
        if self.start is None:
            return A, B
        return torch.cat([A, self.start[0].to(A.dtype)]), torch.cat([B, -self.start[1].to(B.dtype)], 1)

    def constants(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the start, where it is taken off."""
        if self.start is not None:
            yield f"{self.path}.lora_A.start", self.start[0]
            yield f"{self.path}.lora_B.start", self.start[1]

    def file_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the pair as PEFT knows pairs: with a start, one of rank 2r that is the difference."""
        A, B = self.factors()
        yield f"{self.path}.lora_A.weight", A
        yield f"{self.path}.lora_B.weight", B

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
    match = Match((), ()) if settings.target_modules == [] else places.choose(settings, REACH)
    stacked = _parameters(places, settings, match.paths)
    every = [*match.paths, *(f"{path}.{name}" for path, names in stacked.items() for name in names)]
    patterns = {"rank_pattern": [*settings.rank_pattern], "alpha_pattern": [*settings.alpha_pattern]}
    check_patterns(patterns, every, places.base.name)
    plans = [plan_of(settings, path, seed) for path in match.paths]
    shapes = [matrix_shape(places.module(path)) for path in match.paths]
    _check_starts(places, settings, plans, shapes)
    numbers = sum(plan.r * sum(shape) for plan, shape in zip(plans, shapes, strict=True))
    for path, names in stacked.items():
        weights = {name: places.module(path).get_parameter(name) for name in names}
        numbers += sum(plan_of(settings, f"{path}.{n}", seed).r * pair_width(w) for n, w in weights.items())
    copies = 2 if start.takes_from_base(settings.init_lora_weights) else 1
    memory.check_room_for("the adapter", 4 * copies * numbers, "Set a smaller adapter.r, or fewer target_modules.")
    parts: list[Part] = []
    for plan in plans:
        module = places.module(plan.path)
        part = _MAKERS[places.kind(plan.path)](plan, module)
        parts.append(part)
        if settings.use_dora:
            parts.append(make_magnitude(part, module, places.squares(plan.path)))
    for path, names in stacked.items():
        experts, planned = make_experts(path, names, places, lambda name: plan_of(settings, name, seed))
        parts.append(experts)
        plans += [plan for plan, _ in planned]
        shapes += [shape for _, shape in planned]
    return Built(tuple(parts), match.paths, match.warnings, refusals=_too_large(plans, shapes))


def _parameters(places: Places, settings: Lora, targets: Sequence[str]) -> dict[str, list[str]]:
    """Return what `target_parameters` names, by module.

    Raises:
        TargetError: a name matches nothing or a target, or another setting cannot be had on bare parameters.
    """
    if not settings.target_parameters:
        return {}
    given = settings.model_fields_set
    choosing = ["layers_to_transform", *(["exclude_modules"] if settings.target_modules == [] else [])]
    if ignored := [name for name in choosing if name in given and getattr(settings, name) is not None]:
        raise TargetError(
            f"adapter.target_parameters: {', '.join(ignored)} chooses modules and would not hold for bare parameters. Name "
            "the parameters of those blocks by their whole paths, and remove it."
        )
    cannot = {
        "lora_dropout": settings.lora_dropout > 0,
        "use_dora": settings.use_dora,
        "init_lora_weights": settings.init_lora_weights not in start.PLAIN,
    }
    if wrong := [name for name, given in cannot.items() if given]:
        raise TargetError(
            f"adapter.target_parameters: {', '.join(wrong)} cannot be had on bare parameters, whose input is not seen. "
            "Remove it, or target_parameters."
        )
    return choose_parameters(places, settings.target_parameters, targets)


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
    device = module.weight.device
    if plan.init in start.PLAIN:
        initialise_(lora_A, lora_B, plan.init, plan.r, plan.generator())
    else:
        dense = dense_weight(module, plan.path)
        lora_A, lora_B = start.first_pair(str(plan.init), dense, plan.r, plan.scaling, plan.generator())
    first = (lora_A.to(device, copy=True), lora_B.to(device, copy=True)) if start.takes_from_base(plan.init) else None
    return LoraPart(
        path=plan.path,
        lora_A=nn.Parameter(lora_A.to(device)),
        lora_B=nn.Parameter(lora_B.to(device)),
        lora_alpha=plan.lora_alpha,
        scaling=plan.scaling,
        dropout=plan.dropout,
        start=first,
    )


_LINEAR = ("linear", "transposed-linear")
_MAKERS: dict[str, Callable[[PairPlan, Any], Any]] = {
    **dict.fromkeys(_LINEAR, make_linear),
    **dict.fromkeys(("conv1d", "conv2d", "conv3d"), make_conv),
    "embedding": make_embedding,
}
"""Kind of layer -> what makes its pair."""

REACH = Reach("LoRA", "linear layers, convolutions and embeddings", frozenset(_MAKERS))


def _too_large(plans: Sequence[PairPlan], shapes: Sequence[tuple[int, int]]) -> tuple[str, ...]:
    """Return a sentence for each layer that has no room for its pair's rank: more would say nothing more."""
    small: dict[str, str] = {}
    for plan, (outputs, inputs) in zip(plans, shapes, strict=True):
        most, name = min(outputs, inputs), plan.path.rpartition(".")[2]
        if plan.r > most:
            small[name] = (
                f"adapter.r: {plan.r} is larger than {plan.path} ({outputs} x {inputs}) has room for, which is {most}. "
                f"Set adapter.rank_pattern: {{{name}: {most}}}, or a smaller adapter.r."
            )
    return tuple(small.values())


def _check_starts(places: Places, settings: Lora, plans: Sequence[PairPlan], shapes: Sequence[tuple[int, int]]) -> None:
    """Raise if a layer cannot start as the settings say.

    Raises:
        TargetError: the layers that are no linear ones, or an odd rank for orthogonal.
    """
    init = settings.init_lora_weights
    kinds = {plan.path.rpartition(".")[2]: kind for plan in plans if (kind := places.kind(plan.path)) not in _LINEAR}
    if init not in start.PLAIN and kinds:
        listed = ", ".join(f"{name} ({kind})" for name, kind in sorted(kinds.items()))
        raise TargetError(
            f"adapter.init_lora_weights: {init} starts pairs on linear layers, not on {listed}. Set it to true or gaussian, "
            "or leave these out: adapter.exclude_modules."
        )
    for odd in (plan for plan in plans if init == "orthogonal" and plan.r % 2):
        room = min(min(shape) for plan, shape in zip(plans, shapes, strict=True) if plan.r == odd.r)
        even = odd.r + 1 if odd.r < room else room - room % 2
        where = "adapter.r" if odd.r == settings.r else f"the rank of {odd.path} in adapter.rank_pattern"
        todo = f"Set {where}: {even}" if even else "Set it to true"
        raise TargetError(f"adapter.init_lora_weights: orthogonal needs an even r, got {odd.r}. {todo}.")


def settings_in_file(settings: Lora) -> Lora:
    """Return the settings as an adapter's file has them: a pair with a start is there a plain one of rank 2r, so scaled."""
    if not start.takes_from_base(settings.init_lora_weights):
        return settings
    double = math.sqrt(2) if settings.use_rslora else 2
    return settings.model_copy(
        update={
            "r": 2 * settings.r,
            "lora_alpha": double * settings.lora_alpha,
            "rank_pattern": {key: 2 * r for key, r in settings.rank_pattern.items()},
            "alpha_pattern": {key: double * alpha for key, alpha in settings.alpha_pattern.items()},
            "init_lora_weights": True,
        }
    )
