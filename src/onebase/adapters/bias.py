"""BitFit, and LoRA's `bias`: biases of the base are trained, as copies of one adapter's own.

A part holds the whole bias, as PEFT stores it, and adds the difference to the frozen one: y + (b - b0). So a fresh one
changes no bit, and what is saved is what is loaded, whatever rounding the base's dtype brings. Trained: one number an
output. It goes wherever a bias is added last: linear layers, GPT-2's Conv1D, convolutions, norms.

Source: BitFit, arXiv:2106.10199 sec. 3. LoRA's `bias` is PEFT's: all of the base's, or those of the targets.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onebase.adapters.layer import Rows, rows_of
from onebase.adapters.matching import Candidate, Reach
from onebase.adapters.part import Built, Part, RowCall
from onebase.adapters.places import NORM, Places
from onebase.config.methods import BitFit
from onebase.errors import TargetError

_ADDED_LAST = frozenset({"linear", "transposed-linear", "quantised-linear", "conv1d", "conv2d", "conv3d", NORM})
_WITH_BIAS = "with a bias"
REACH = Reach("BitFit", "modules with a bias", frozenset({_WITH_BIAS}))


@dataclass(frozen=True, eq=False)
class BiasPart:
    """One adapter's bias of one module, under `name`, and the frozen one beside it."""

    path: str
    name: str
    bias: nn.Parameter
    frozen: Tensor

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the bias under the name of PEFT's format."""
        yield self.name, self.bias

    def on_output(self, y: Tensor, call: RowCall) -> Tensor:
        """Return y + (b - b0)."""
        change = self.bias - self.frozen
        if rows_of(call.module) is Rows.FIRST:  # channels come second
            change = change.view(-1, *([1] * (y.dim() - 2)))
        return y + change.to(y.dtype)

    @torch.no_grad()
    def merge_(self, module: Any) -> None:
        """Put the bias in the place of the module's own."""
        module.bias.copy_(self.bias)


def build(places: Places, settings: BitFit, seed: int) -> Built:
    """Return a new adapter's biases: those of the modules that the settings name, or all.

    Raises:
        TargetError: the settings name a module that is not there or has no bias, or the base has none at all.
    """
    candidates = [
        Candidate(c.path, _WITH_BIAS if _has_bias(places, c) else f"{c.kind} without a bias", c.role)
        for c in places.owners
    ]
    default = [c.path for c in candidates if c.kind == _WITH_BIAS and not places.in_own_head(c.path)]
    if not default:
        who = "outside its head it has" if places.base.own_heads else "it has"
        raise _no_bias(places, "Train norms instead (method: ln-tuning), or another method such as lora.", who)
    match = places.choose(settings, REACH, default=default, candidates=candidates)
    return Built(tuple(_part(places, path, f"{path}.bias") for path in match.paths), match.paths, match.warnings)


def beside_lora(places: Places, bias: str, targets: Sequence[str]) -> tuple[Part, ...]:
    """Return the biases that LoRA's setting `bias` (all, lora_only) trains beside pairs on `targets`.

    Raises:
        TargetError: there is none.
    """
    chosen = [c.path for c in places.owners if _has_bias(places, c) and (bias == "all" or c.path in targets)]
    if not chosen:
        raise _no_bias(places, "Remove adapter.bias.", "its targets have" if bias == "lora_only" else "it has")
    names = {path: f"{path}.base_layer.bias" if path in targets else f"{path}.bias" for path in chosen}
    return tuple(_part(places, path, name) for path, name in names.items())


def _no_bias(places: Places, instead: str, who: str = "it has") -> TargetError:
    return TargetError(f"{places.base.name}: there is no bias to train: {who} none. {instead}")


def _has_bias(places: Places, candidate: Candidate) -> bool:
    bias = getattr(places.module(candidate.path), "bias", None)
    return candidate.kind in _ADDED_LAST and isinstance(bias, Tensor) and bias.is_floating_point()


def _part(places: Places, path: str, name: str) -> BiasPart:
    frozen = places.module(path).bias.detach()
    own = frozen.to(torch.promote_types(frozen.dtype, torch.float32), copy=True)
    return BiasPart(path, name, nn.Parameter(own), frozen)
