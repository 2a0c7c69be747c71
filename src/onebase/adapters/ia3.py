"""IA3: a trained vector l scales what a target puts out, y = l * (W x + b), or what a feed-forward target gets, W (l * x).

l starts at one, so a fresh adapter changes no bit. Trained: one number an output (an input of a feed-forward target).
By default the keys and values of every attention and, as feed-forward targets, the last linear layer of every MLP.
PEFT's own lists name the queries instead of the keys or values of some models (OPT, Gemma, Qwen2), and with BERT's also
catch the attention's output; the paper's choice is made here for every model alike.

Source: arXiv:2205.05638 sec. 3.3.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from onebase.adapters import roles
from onebase.adapters.dense import is_transposed
from onebase.adapters.matching import LINEAR_KINDS, Reach
from onebase.adapters.part import Built, Part, RowCall
from onebase.adapters.places import Places
from onebase.config.methods import Ia3
from onebase.errors import TargetError
from onebase.ops.keyed import mix

REACH = Reach("IA3", "linear layers and 2-D or 3-D convolutions", LINEAR_KINDS | {"conv2d", "conv3d"})


@dataclass(frozen=True, eq=False)
class Ia3Output:
    """A target whose output is scaled: ia3_l is (out, 1), for a convolution (1, out, 1, 1)."""

    path: str
    ia3_l: nn.Parameter

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the vector under PEFT's name, which has no ".weight"."""
        yield f"{self.path}.ia3_l", self.ia3_l

    def on_output(self, y: Tensor, call: RowCall) -> Tensor:
        """Return l * y."""
        return _scaled(y, self.ia3_l)

    @torch.no_grad()
    def merge_(self, module: Any) -> None:
        """Scale the module's outputs: its weight by row and its bias."""
        scale = self.ia3_l.flatten().to(module.weight.device)
        axis = 1 if is_transposed(module) else 0
        module.weight.copy_(module.weight * _along(scale, axis, module.weight.dim()))
        if module.bias is not None:
            module.bias.copy_(module.bias * scale)


@dataclass(frozen=True, eq=False)
class Ia3Input:
    """A target whose input is scaled: ia3_l is (1, in), for a convolution (1, in, 1, 1)."""

    path: str
    ia3_l: nn.Parameter

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the vector under PEFT's name, which has no ".weight"."""
        yield f"{self.path}.ia3_l", self.ia3_l

    def on_input(self, x: Tensor) -> Tensor:
        """Return l * x."""
        return _scaled(x, self.ia3_l)

    @torch.no_grad()
    def merge_(self, module: Any) -> None:
        """Scale the module's inputs: its weight by column; in a grouped convolution each group has columns of its own."""
        scale, weight = self.ia3_l.flatten().to(module.weight.device), module.weight
        groups = getattr(module, "groups", 1)
        if groups == 1:
            weight.copy_(weight * _along(scale, 0 if is_transposed(module) else 1, weight.dim()))
            return
        each = weight.unflatten(0, (groups, -1))  # (groups, out of a group, in of a group, ...)
        columns = scale.view(groups, 1, -1, *([1] * (weight.dim() - 2)))
        weight.copy_((each * columns).flatten(0, 1))


def build(places: Places, settings: Ia3, seed: int) -> Built:
    """Return a new adapter's vectors, one for each target.

    Raises:
        TargetError: the settings name a module that is not there, none, or a feed-forward module that is no target.
    """
    outputs = roles.mlp_outputs(places.candidates)
    default = [*roles.keys_and_values(places.candidates), *outputs]
    if not default and settings.target_modules is None:
        raise TargetError(
            f"{places.base.name}: no keys and values of an attention and no MLP are found in it. Name the layers to scale: "
            "adapter.target_modules."
        )
    match = places.choose(settings, REACH, default=default)
    feedforward = _feedforward(places, settings, match.paths)
    parts = tuple(_part(places.module(path), path, path in feedforward, settings, seed) for path in match.paths)
    partly = settings.target_modules is None and not outputs
    return Built(parts, match.paths, (*match.warnings, *((roles.NO_MLP,) * partly)))


def _feedforward(places: Places, settings: Ia3, targets: tuple[str, ...]) -> set[str]:
    """Return the targets whose input is scaled."""
    if settings.feedforward_modules is None:
        mlp = {c.path for c in places.candidates if c.role == "mlp"}
        return mlp & set(targets)
    if not settings.feedforward_modules:
        return set()
    found = places.choose_named(settings.feedforward_modules, "feedforward_modules", REACH)
    if outside := sorted(set(found) - set(targets)):
        raise TargetError(
            f"adapter.feedforward_modules: {outside[0]!r} is no target{_and_more(outside)}: a feed-forward module is a "
            f"target whose input is scaled. Add it to adapter.target_modules, or remove it here. The targets are "
            f"{', '.join(sorted({path.rpartition('.')[2] for path in targets}))}."
        )
    return set(found)


def _and_more(outside: list[str]) -> str:
    return f" (nor are {len(outside) - 1} more)" if len(outside) > 1 else ""


def _part(module: Any, path: str, feedforward: bool, settings: Ia3, seed: int) -> Part:
    """Return one target's vector: ones, or normal numbers where the settings ask for a start that changes the base."""
    spatial = module.weight.dim() - 2
    outs, ins = _features(module)
    shape = (1, ins if feedforward else outs, *([1] * spatial)) if spatial or feedforward else (outs, 1)
    draws = torch.Generator().manual_seed(mix(seed, path) >> 1)
    start = torch.ones(shape) if settings.init_ia3_weights else torch.randn(shape, generator=draws)
    vector = nn.Parameter(start.to(module.weight.device))
    return Ia3Input(path, vector) if feedforward else Ia3Output(path, vector)


def _features(module: Any) -> tuple[int, int]:
    """Return how many numbers a row of the module's output and of its input has."""
    if hasattr(module, "out_channels"):
        return module.out_channels, module.in_channels
    if hasattr(module, "out_features"):
        return module.out_features, module.in_features
    ins, outs = module.weight.shape
    return int(outs), int(ins)


def _scaled(rows: Tensor, ia3_l: Tensor) -> Tensor:
    """Return l * rows in the rows' dtype; a convolution's l lies along its channels."""
    return (rows * (ia3_l if ia3_l.dim() > 2 else ia3_l.flatten())).to(rows.dtype)


def _along(scale: Tensor, axis: int, dims: int) -> Tensor:
    """Return a vector shaped to lie along one axis of a tensor of `dims` axes."""
    shape = [1] * dims
    shape[axis] = -1
    return scale.view(shape)
