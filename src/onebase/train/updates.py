"""What a LoRA adapter adds to its layers, against sums of pairs that it should equal, or is to be near.

A layer's update is given as weighted pairs, sum of w_i s_i B_i A_i, and never made dense. Called by what writes pairs:
portable.py and combining.py. Cost: a few products with the pairs of each layer, in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from onebase.adapters.ingredients import Ingredient, StoredPair, pairs_of
from onebase.errors import VerificationError, list_problems
from onebase.files.peft_format import read_adapter

Terms = Sequence[tuple[float, StoredPair]]
"""A layer's update: pairs, each with its weight."""

_ROUNDING = 2.0**-20  # a rounding of B to fp32 is 2**-24; the product is compared in fp64
_CANCELLED = 1e-6  # a sum that is so much smaller than its terms is their rounding
_PROBES = 4


@dataclass(frozen=True)
class Distance:
    """How far updates are from others, as a share of these: of all layers together, and of the one where it is largest.

    By Frobenius norms; infinite where the others are zero.
    """

    whole: float
    worst_layer: str
    worst: float


@torch.no_grad()
def check_updates(folder: Path, wanted: Mapping[str, Terms], what: str) -> float:
    """Return the largest relative difference between the updates of the adapter in a folder and those `wanted`.

    A layer that is not wanted must get nothing; every pair must be scaled by 1.

    Raises:
        VerificationError: more than rounding, or another set of layers; `what` names the adapter.
    """
    stored = read_adapter(folder)
    problems: list[str] = []
    again = pairs_of(Ingredient(str(folder), stored.settings, stored.tensors), problems)
    problems += [f"{path} has no pair." for path in wanted if path not in again]
    problems += [f"{path} is scaled by {pair.scaling}, not 1." for path, pair in again.items() if pair.scaling != 1]
    differences = {}
    if not problems:
        differences = {path: _difference(pair, wanted.get(path, ())) for path, pair in again.items()}
        problems += [
            f"the update of {path} differs by {value:.1e} of its size (bound {_ROUNDING:.0e})."
            for path, value in differences.items()
            if not value <= _ROUNDING
        ]
    if problems:
        raise VerificationError(list_problems(f"{what}, written and read again", problems, shown=5))
    return max(differences.values())


def is_nothing(found: Mapping[str, StoredPair], others: Mapping[str, Terms]) -> bool:
    """Return whether pairs add nothing to any layer but the rounding of what they were made of."""
    return all(
        _norm([(1.0, pair)]) <= _CANCELLED * max((_norm([term]) for term in others[path]), default=0.0)
        for path, pair in found.items()
    )


def _difference(found: StoredPair, wanted: Terms) -> float:
    """Return how far what a pair makes of random inputs is from what a sum makes of them, relative to |B| |A| |x|."""
    probes = torch.randn(found.A.shape[1], _PROBES, generator=torch.Generator().manual_seed(0)).double()
    difference = _applied(found, probes)
    for weight, pair in wanted:
        difference = difference - weight * _applied(pair, probes)
    size = float((found.B.double().abs() @ (found.A.double().abs() @ probes.abs())).max())
    return float(difference.abs().max()) / max(size, 1e-300)


def _applied(pair: StoredPair, x: Tensor) -> Tensor:
    return pair.scaling * (pair.B.double() @ (pair.A.double() @ x))


@torch.no_grad()
def distance(found: Mapping[str, StoredPair], others: Mapping[str, Terms]) -> Distance:
    """Return how far the updates of pairs are from those of sums on the same layers."""
    squares = {path: _distance_and_size(found[path], terms) for path, terms in others.items()}
    shares = {path: _share(*of) for path, of in squares.items()}
    worst = max(shares, key=lambda path: shares[path])
    whole = _share(*(math.sqrt(sum(of[place] ** 2 for of in squares.values())) for place in range(3)))
    return Distance(whole, worst, shares[worst])


def _distance_and_size(found: StoredPair, terms: Terms) -> tuple[float, float, float]:
    """Return the norms of the difference, of the sum, and of the sum's terms."""
    apart = [(1.0, found), *((-weight, pair) for weight, pair in terms)]
    largest = math.sqrt(sum(_norm([term]) ** 2 for term in terms))
    return _norm(apart), _norm(terms), largest


def _norm(terms: Terms) -> float:
    """Return the Frobenius norm of a sum of updates B A: the root of the sum of (B^T B) * (A A^T)."""
    A = torch.cat([pair.A.double() for _, pair in terms])
    B = torch.cat([weight * pair.scaling * pair.B.double() for weight, pair in terms], 1)
    return math.sqrt(max(float(((B.T @ B) * (A @ A.T)).sum()), 0.0))


def _share(apart: float, size: float, terms: float) -> float:
    if size > _CANCELLED * terms:
        return apart / size
    return 0.0 if apart <= _CANCELLED * terms else math.inf
