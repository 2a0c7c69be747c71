"""LoRA on convolutions: a convolution down to r channels with the base's own kernel, then one of width 1 up again.

    y = base(x) + s * B * (A * x),  A: (r, in, kernel), stride, padding and dilation the base's;  B: (out, r / groups, 1)

Shapes, names and groups are PEFT's: A reads all channels, B has the base's groups, so that r is a multiple of them.
A grouped one therefore changes what an output reads, which no plain copy of the layer can hold: it merges nowhere.
PEFT forgets the dilation. Rows are entries of a batch; dropout is keyed by entry. Source: PEFT, tuners/lora/layer.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebase.adapters.dense import add_product_
from onebase.adapters.pair import PairPlan, initialise_
from onebase.adapters.part import RowCall
from onebase.errors import TargetError
from onebase.ops.keyed import keep_mask

_CONVOLUTIONS: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@dataclass(frozen=True, eq=False)
class ConvPart:
    """One adapter's pair on one convolution: A is (r, in, *kernel), B is (out, r / groups, 1, ...), both fp32."""

    path: str
    A: nn.Parameter
    B: nn.Parameter
    lora_alpha: float
    scaling: float
    dropout: float

    @property
    def r(self) -> int:
        """The rank of the pair."""
        return int(self.A.shape[0])

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the tensors under PEFT's names."""
        yield f"{self.path}.lora_A.weight", self.A
        yield f"{self.path}.lora_B.weight", self.B

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A as (r, inputs under the kernel) and B as (out, r), where there are no groups."""
        return self.A.detach().flatten(1), self.B.detach().flatten(1)

    def on_output(self, y: Tensor, call: RowCall) -> Tensor:
        """Return y with the update added."""
        conv: Any = call.module
        convolve = _CONVOLUTIONS[self.A.dim() - 2]
        x = call.x.to(y.dtype)
        if call.row_keys is not None and self.dropout > 0:
            kept = keep_mask(call.row_keys, x[0].numel(), self.dropout).view_as(x)
            x = x * kept / (1 - self.dropout)
        h = convolve(x, self.A.to(y.dtype), None, conv.stride, conv.padding, conv.dilation)
        update = convolve(h, self.B.to(y.dtype), groups=conv.groups)
        return torch.add(y, update, alpha=self.scaling)

    def merge_(self, module: Any) -> None:
        """Add the pair to the weight of a copy of its module, in fp32 at least.

        Raises:
            TargetError: the module has groups.
        """
        if module.groups > 1:
            raise TargetError(
                f"{self.path} has {module.groups} groups: its update reads all channels, which its own weight cannot hold, "
                "so it cannot be merged. Serve it unmerged, or train without this module (adapter.exclude_modules)."
            )
        add_product_(module, self.path, *self.factors(), self.scaling)


def make_conv(plan: PairPlan, module: Any) -> ConvPart:
    """Return a new pair for a convolution.

    Raises:
        TargetError: its groups do not divide the rank, or it pads with something other than zeros.
    """
    if plan.r % module.groups:
        raise TargetError(
            f"adapter.r: {plan.path} is a convolution of {module.groups} groups and needs a multiple of that, got {plan.r}. "
            f"Set adapter.rank_pattern: {{{plan.path.rpartition('.')[2]}: {module.groups}}} or adapter.exclude_modules."
        )
    if module.padding_mode != "zeros":
        raise TargetError(
            f"adapter.target_modules: {plan.path} pads with {module.padding_mode!r}; LoRA goes on convolutions that pad "
            "with zeros (as PEFT's does). Leave it out: adapter.exclude_modules."
        )
    spatial = module.weight.shape[2:]
    A = torch.empty(plan.r, module.in_channels, *spatial)
    B = torch.zeros(module.out_channels, plan.r // module.groups, *(1 for _ in spatial))
    initialise_(A.flatten(1), B.flatten(1), plan.init, plan.r, plan.generator())
    device = module.weight.device
    return ConvPart(
        path=plan.path,
        A=nn.Parameter(A.to(device)),
        B=nn.Parameter(B.to(device)),
        lora_alpha=plan.lora_alpha,
        scaling=plan.scaling,
        dropout=plan.dropout,
    )
