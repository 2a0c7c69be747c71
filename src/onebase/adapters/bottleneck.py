"""Bottleneck adapters: two small layers with a non-linear function between them, after a sublayer of every block.

    y + up(act(down(y))),  down: (m, width) and (m,);  up: (width, m) and (width,);  m = width / reduction_factor

y is what the sublayer's last linear layer returns, before the residual is added; that layer is found by its role, not
by name: the last one of every MLP (pfeiffer, arXiv:2005.00247 sec. 2.1) and of every attention too (houlsby,
arXiv:1902.00751 sec. 2.1). down starts normal with deviation 0.02, up and the biases at zero, where AdapterHub draws
small numbers for up too: so a fresh adapter changes no bit. Trained: 2 m width + m + width numbers a place.

It cannot be merged: no weight of the layer expresses it. relu gives the same bits wherever a number lies in memory;
torch rounds gelu, silu and tanh by a row's place in a vector, so with those a row's last bit can depend on its batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebase.adapters import roles
from onebase.adapters.matching import LINEAR_KINDS, Reach
from onebase.adapters.pair import matrix_shape
from onebase.adapters.part import Built, RowCall
from onebase.adapters.places import Places
from onebase.base import memory
from onebase.config.methods import Bottleneck
from onebase.errors import TargetError
from onebase.ops.keyed import mix

REACH = Reach("bottleneck", "linear layers", LINEAR_KINDS)
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
}
_DEVIATION = 0.02


@dataclass(frozen=True, eq=False)
class BottleneckPart:
    """One adapter's bottleneck after one module, fp32."""

    path: str
    down: nn.Parameter
    down_bias: nn.Parameter
    up: nn.Parameter
    up_bias: nn.Parameter
    non_linearity: str

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained tensors."""
        yield f"{self.path}.adapter_down.weight", self.down
        yield f"{self.path}.adapter_down.bias", self.down_bias
        yield f"{self.path}.adapter_up.weight", self.up
        yield f"{self.path}.adapter_up.bias", self.up_bias

    def on_output(self, y: Tensor, call: RowCall) -> Tensor:
        """Return y + up(act(down(y)))."""
        h = F.linear(y, self.down.to(y.dtype), self.down_bias.to(y.dtype))
        h = ACTIVATIONS[self.non_linearity](h)
        return y + F.linear(h, self.up.to(y.dtype), self.up_bias.to(y.dtype)).to(y.dtype)


def build(places: Places, settings: Bottleneck, seed: int) -> Built:
    """Return a new adapter's bottlenecks, one for each target.

    Raises:
        TargetError: the settings name a module that is not there or is no linear layer, or the base has no such place.
        CapacityError: there is no memory for them.
    """
    default = roles.mlp_outputs(places.candidates)
    if settings.placement == "houlsby":
        default += roles.attention_outputs(places.candidates)
    if not default and settings.target_modules is None:
        raise TargetError(
            f"{places.base.name}: no MLP in it ends in a linear layer (experts are no such layers). Name the layers to put "
            "bottlenecks after: adapter.target_modules."
        )
    match = places.choose(settings, REACH, default=default)
    widths = [matrix_shape(places.module(path))[0] for path in match.paths]
    numbers = sum(2 * width * _narrow(width, settings) for width in widths)
    memory.check_room_for("the adapter", 4 * numbers, "Set a larger adapter.reduction_factor.")
    parts = tuple(_part(places.module(path), path, settings, seed) for path in match.paths)
    partly = settings.target_modules is None and not roles.mlp_outputs(places.candidates)
    return Built(parts, match.paths, (*match.warnings, *((roles.NO_MLP,) * partly)))


def _narrow(width: int, settings: Bottleneck) -> int:
    return max(1, int(width / settings.reduction_factor))


def _part(module: Any, path: str, settings: Bottleneck, seed: int) -> BottleneckPart:
    width = matrix_shape(module)[0]
    narrow = _narrow(width, settings)
    draws = torch.Generator().manual_seed(mix(seed, path) >> 1)
    device = module.weight.device
    return BottleneckPart(
        path=path,
        down=nn.Parameter((torch.randn(narrow, width, generator=draws) * _DEVIATION).to(device)),
        down_bias=nn.Parameter(torch.zeros(narrow, device=device)),
        up=nn.Parameter(torch.zeros(width, narrow, device=device)),
        up_bias=nn.Parameter(torch.zeros(width, device=device)),
        non_linearity=settings.non_linearity,
    )
