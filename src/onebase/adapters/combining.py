"""One LoRA adapter from several: sums, sums cut to a rank, and sums of what TIES, DARE and magnitude pruning leave.

With the update of adapter i on a layer U_i = s_i B_i A_i and its weight w_i (below zero takes it off):

    cat                  sum of w_i U_i, exactly: the ranks add up
    svd                  the same, cut to `svd_rank`: the nearest update of that rank (Eckart-Young)
    linear               A = sum of sign sqrt(|w_i s_i|) A_i, B = sum of sqrt(|w_i s_i|) B_i: rough, with products B_i A_j
    magnitude_prune      as linear, of every A_i and B_i the largest `density` alone
    ties                 so pruned; a sign is elected for each number, and those that have it are averaged
    dare_linear          as linear, of every A_i and B_i a random `density`, divided by it
    dare_ties            pruned as in dare_linear, joined as in ties
    ..._svd              what stands before it, of the U_i, then cut to `svd_rank`

The arithmetic is PEFT's (0.21.2, LoraModel.add_weighted_adapter), whose result these equal. Signs are elected and sizes
compared before the weights, as there. A layer that only some adapters have is combined from these: to all ways a missing
pair is one of zeros. What differs: draws are keyed by (seed, place in the list, tensor), not global; one adapter is
treated as several are (PEFT makes every way linear); each layer has the rank that it needs, not the largest with zeros,
so ranks are compared and chosen layer by layer (PEFT compares the adapters' largest); an embedding tied to the head stays
so; and what PEFT drops, such as DoRA's magnitudes, is an error (ingredients.py).

Cost: cat, svd and the ways without _svd work on the pairs; the others make every U_i dense, a layer at a time, and
decompose a matrix as large as the layer's weight. Sources: TIES arXiv:2306.01708 sec. 4; DARE arXiv:2311.03099 sec. 3.2.
"""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import reduce

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from onebase.adapters.ingredients import Ingredient, StoredPair, pairs_of, tied_heads
from onebase.adapters.matching import for_path
from onebase.base import memory
from onebase.config.methods import Lora
from onebase.errors import ConfigError, list_problems
from onebase.ops.keyed import mix


@dataclass(frozen=True)
class _Way:
    """What a way does to numbers of the same place: which it drops ("magnitude", "random"), and how it joins the rest."""

    drops: str = ""
    elects: bool = False


_ON_PAIRS = {
    "linear": _Way(),
    "ties": _Way("magnitude", elects=True),
    "dare_linear": _Way("random"),
    "dare_ties": _Way("random", elects=True),
    "magnitude_prune": _Way("magnitude"),
}
_ON_UPDATES = {f"{name}_svd": way for name, way in _ON_PAIRS.items() if way.drops}
_WAYS = {"cat": _Way(), "svd": _Way(), **_ON_PAIRS, **_ON_UPDATES}

WAYS = tuple(_WAYS)
"""The names of all ways to combine."""
SIGN_METHODS = ("total", "frequency")
"""How TIES elects a sign: that of the sum, or the one that most have."""


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined, under PEFT's names: `how` is one of WAYS.

    `svd_rank` (with svd): the rank to cut to, where a layer's update has more; None is the largest of its pairs. `density`
    (with pruning): the share of numbers that is kept. `majority_sign_method` (with ties): one of SIGN_METHODS. `seed` (with dare) keys the
    draws.
    """

    how: str
    svd_rank: int | None = None
    density: int | float | None = None
    majority_sign_method: str = "total"
    seed: int = 0

    @property
    def draws(self) -> bool:
        """Whether what is dropped is drawn, so that the seed counts."""
        return self.how in _WAYS and _WAYS[self.how].drops == "random"

    @property
    def said(self) -> dict[str, str | int | float]:
        """What decides the result, by name, without what this way has no use for."""
        return {
            "how": self.how,
            **({} if self.svd_rank is None else {"svd_rank": self.svd_rank}),
            **({} if self.density is None else {"density": self.density}),
            **({"majority_sign_method": self.majority_sign_method} if _WAYS[self.how].elects else {}),
            **({"seed": self.seed} if self.draws else {}),
        }

    def problems(self) -> list[str]:
        """Return what is wrong with it."""
        way = _WAYS.get(self.how)
        if way is None:
            close = get_close_matches(str(self.how), WAYS, 1, 0.5)
            hint = f"closest is {close[0]!r}. There are" if close else "there are"
            return [f"how: {self.how!r} is no way to combine; {hint} {', '.join(WAYS)}."]
        cuts = self.how.endswith("svd")
        problems = []
        if self.svd_rank is not None and not cuts:
            problems.append(f"svd_rank: {self.how} cuts to no rank. Remove it, or take svd.")
        elif self.svd_rank is not None and self.svd_rank < 1:
            problems.append(f"svd_rank: must be a whole number from 1, got {self.svd_rank}.")
        if self.density is None and way.drops:
            problems.append(f"density: {self.how} needs it, the share of numbers that is kept. Try 0.5.")
        elif self.density is not None and not way.drops:
            problems.append(f"density: {self.how} drops nothing. Remove it, or take ties or dare_linear.")
        elif self.density is not None and not 0 < self.density <= 1:
            problems.append(f"density: must be above 0 and at most 1, got {self.density}.")
        if self.majority_sign_method not in SIGN_METHODS:
            allowed = " or ".join(SIGN_METHODS)
            problems.append(f"majority_sign_method: must be {allowed}, got {self.majority_sign_method!r}.")
        elif self.majority_sign_method != "total" and not way.elects:
            problems.append(f"majority_sign_method: {self.how} elects no sign. Remove it, or take ties.")
        return problems


@dataclass(frozen=True)
class _Share:
    """One adapter's pair on a layer, its weight, and what keys its draws."""

    pair: StoredPair
    weight: float
    key: int


def combine(
    ingredients: Sequence[Ingredient], weights: Sequence[int | float], recipe: Recipe
) -> tuple[Lora, dict[str, Tensor]]:
    """Return settings and tensors of the adapter that `weights` and `recipe` make of these, for `Bank.add`.

    The settings have scaling 1 on every layer and nothing that only training needs; the tensors are on the CPU in
    the widest dtype of the adapters', fp32 at least. Whether the adapters have one base is the caller's question.

    Raises:
        ConfigError: all that is wrong with weights, recipe or adapters, and what cannot be combined.
        CapacityError: the dense updates of a layer do not fit into memory.
    """
    problems = [*weight_problems(len(ingredients), weights), *recipe.problems()]
    pairs = [pairs_of(one, problems) for one in ingredients]
    if not problems:
        problems += _layer_problems(ingredients, pairs, recipe)
    if problems:
        raise ConfigError(list_problems("combining adapters", problems, shown=10))
    tied = tied_heads(ingredients, pairs)
    ranks: dict[str, int] = {}
    tensors: dict[str, Tensor] = {}
    for path in sorted({path for own in pairs for path in own if path not in tied}):
        shares = [
            _Share(own[path], float(weight), mix(recipe.seed, place, path))
            for place, (own, weight) in enumerate(zip(pairs, weights, strict=True))
            if path in own
        ]
        A, B = _on_layer(path, shares, recipe)
        if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
            raise ConfigError(f"combining adapters: {path} comes out as NaN or infinite. Take smaller weights.")
        for place in [path, *(head for head, embedding in tied.items() if embedding == path)]:
            pair = next(own[place] for own in pairs if place in own)
            tensors |= pair.tensors(A, B) if place == path else pair.tensors(B.T, A.T)
            ranks[place] = int(A.shape[0])
    return _settings(ranks, tied=bool(tied)), tensors


def weight_problems(count: int, weights: Sequence[int | float]) -> list[str]:
    """Return what is wrong with the weights of `count` adapters."""
    if not count:
        return ["there is no adapter. Give at least one."]
    if count != len(weights):
        return [f"weights: must be one for each of {count} adapters, got {len(weights)}."]
    most = sys.float_info.max
    wrong = [f"weights: must be finite numbers, got {weight}." for weight in weights if not -most <= weight <= most]
    if not wrong and not any(weights):
        return ["weights: all are 0, so the adapter would change nothing. Give at least one other."]
    return wrong


def keep_mask(shape: torch.Size, density: float, key: int) -> Bool[Tensor, "rows columns"]:
    """Return which numbers DARE keeps, each with probability `density`, drawn from `key` alone."""
    draws = torch.Generator().manual_seed(key >> 1)
    return torch.empty(shape).bernoulli_(density, generator=draws).bool()


def _on_layer(path: str, shares: Sequence[_Share], recipe: Recipe) -> tuple[Tensor, Tensor]:
    """Return A and B of one layer, to be scaled by 1."""
    dtype = reduce(torch.promote_types, (t.dtype for s in shares for t in (s.pair.A, s.pair.B)), torch.float32)
    wide = torch.float64 if recipe.how == "svd" else dtype  # cutting multiplies what is rounded, and pairs are small
    As, Bs = [s.pair.A.cpu().to(wide) for s in shares], [s.pair.B.cpu().to(wide) for s in shares]
    factors = [s.weight * s.pair.scaling for s in shares]
    most = recipe.svd_rank or max(s.pair.r for s in shares)
    if recipe.how in ("cat", "svd"):
        A, B = torch.cat([A * factor for A, factor in zip(As, factors, strict=True)]), torch.cat(Bs, 1)
        A, B = (A, B) if recipe.how == "cat" else _cut_pair(A, B, most)
        return A.to(dtype), B.to(dtype)
    if recipe.how in _ON_PAIRS:
        roots = [math.sqrt(abs(factor)) for factor in factors]
        signed = [math.copysign(root, factor) for root, factor in zip(roots, factors, strict=True)]
        return (
            _mixed(f"{path}.lora_A", As, signed, [mix(s.key, "A") for s in shares], recipe),
            _mixed(f"{path}.lora_B", Bs, roots, [mix(s.key, "B") for s in shares], recipe),
        )
    numbers = Bs[0].shape[0] * As[0].shape[1]
    memory.check_room_for(
        f"{recipe.how} on {path}",
        (3 * len(shares) + 3) * numbers * dtype.itemsize,
        "Take a way that ends without _svd.",
    )
    updates = [s.pair.scaling * (B @ A) for s, A, B in zip(shares, As, Bs, strict=True)]
    keys = [mix(s.key, "update") for s in shares]
    mixed = _mixed(path, updates, [s.weight for s in shares], keys, recipe)
    U, S, Vh = torch.linalg.svd(mixed, full_matrices=False)
    return Vh[:most], U[:, :most] * S[:most]


def _cut_pair(A: Float[Tensor, "r in"], B: Float[Tensor, "out r"], most: int) -> tuple[Tensor, Tensor]:
    """Return the pair of at most this rank that is nearest to B @ A, without making that: by the QR factors of both."""
    Q_out, R_out = torch.linalg.qr(B)
    Q_in, R_in = torch.linalg.qr(A.T)
    U, S, Vh = torch.linalg.svd(R_out @ R_in.T, full_matrices=False)
    return Vh[:most] @ Q_in.T, Q_out @ (U[:, :most] * S[:most])


def _mixed(
    name: str, tensors: Sequence[Tensor], weights: Sequence[int | float], keys: Sequence[int], recipe: Recipe
) -> Float[Tensor, "rows columns"]:
    """Return the weighted tensors, pruned, as their sum, or as the mean of those with the elected sign."""
    way = _WAYS[recipe.how]
    kept = tensors
    if recipe.density is not None and recipe.density < 1:
        if way.drops == "random":
            kept = [_drawn(tensor, recipe.density, key) for tensor, key in zip(tensors, keys, strict=True)]
        else:
            kept = [_largest(name, tensor, recipe.density) for tensor in tensors]
    stack = torch.stack([*kept])
    weighted = stack * torch.tensor(weights, dtype=stack.dtype).view(-1, 1, 1)
    if not way.elects:
        return weighted.sum(0)
    signs = stack.sign()
    votes = (stack if recipe.majority_sign_method == "total" else signs).sum(0)
    agree = signs == torch.where(votes >= 0, 1, -1)
    return (weighted * agree).sum(0) / agree.sum(0).clamp(min=1)


def _largest(name: str, tensor: Tensor, density: float) -> Tensor:
    """Return the tensor with all but the largest int(density * size) numbers set to zero.

    Raises:
        ConfigError: that is not one number.
    """
    count = int(density * tensor.numel())
    if not count:
        raise ConfigError(
            f"combining adapters: density {density} keeps none of the {tensor.numel()} numbers of {name}. Take a larger one."
        )
    mask = torch.zeros(tensor.numel(), dtype=torch.bool)
    mask[torch.topk(tensor.abs().flatten(), count).indices] = True
    return torch.where(mask.view(tensor.shape), tensor, 0)


def _drawn(tensor: Tensor, density: float, key: int) -> Tensor:
    """Return a random share of the tensor divided by that share, so that its mean stays."""
    return tensor * keep_mask(tensor.shape, density, key) / density


def _layer_problems(
    ingredients: Sequence[Ingredient], pairs: Sequence[Mapping[str, StoredPair]], recipe: Recipe
) -> list[str]:
    """Return on which layers the adapters' pairs do not go together, or have no room for the rank to cut to."""
    problems = []
    for path in sorted({path for own in pairs for path in own}):
        here = [(one.name, own[path]) for one, own in zip(ingredients, pairs, strict=True) if path in own]
        first = here[0][1]
        if any(pair.layer != first.layer for _, pair in here):
            shapes = ", ".join(f"{name} {tuple(p.B.shape)} x {(p.r, *p.inputs)}" for name, p in here)
            problems.append(f"{path}: the adapters are for different layers ({shapes}). Combine adapters of one base.")
            continue
        if recipe.how in _ON_PAIRS and any(pair.r != first.r for _, pair in here):
            ranks = ", ".join(f"{name} {pair.r}" for name, pair in here)
            problems.append(f"{path}: {recipe.how} needs equal ranks, got {ranks}. Take cat or svd.")
        room = min(first.B.shape[0], first.A.shape[1])
        if recipe.svd_rank is not None and recipe.svd_rank > room:
            problems.append(f"svd_rank: {recipe.svd_rank} is more than {path} has room for, which is {room}.")
    return problems


def _settings(ranks: Mapping[str, int], *, tied: bool) -> Lora:
    """Return settings of pairs of these ranks by path, each scaled by 1."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    others: dict[str, int] = {}
    for path in sorted(ranks, key=len):  # a pattern means what ends like it, too, so that the longest must stand first
        if for_path(others, path, r) != ranks[path]:
            others = {re.escape(path): ranks[path], **others}
    return Lora(
        target_modules=sorted(ranks),
        r=r,
        lora_alpha=r,
        rank_pattern=others,
        alpha_pattern={**others},
        ensure_weight_tying=tied,
    )
