"""DoRA: each output's magnitude is trained beside the direction that LoRA changes.

    y = m * (W + s B A) x / ||W + s B A|| + bias, the norm taken over what each output reads

The pair is LoRA's own and goes through its operation; `MagnitudePart` then scales what came out around the bias by
m / ||W + s B A||. The norm is a constant to the gradient (arXiv:2402.09353 sec. 4.3) and never needs the dense sum:

    ||w + s b A||^2 = ||w||^2 + 2 s b . (A w) + s^2 b (A A^T) b    for each output's row w of W and b of B

||w||^2 is computed once a base weight; the rest costs outputs * inputs * r multiply-adds, as much as the pair's A for
as many tokens as there are outputs. On a CPU the norms are kept with a copy of the pair, and computed again when it
has changed (by its numbers: torch's fused optimisers raise no tensor's version); elsewhere once a forward.
A fresh m is the norm by the same formula, so its factor is exactly 1 and changes no bit. Dropout acts on the update
alone; PEFT drops the base's input too. Source: arXiv:2402.09353 eq. 5.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from onebase.adapters.dense import dense_weight, write_dense_
from onebase.adapters.pair import Pair
from onebase.adapters.part import RowCall
from onebase.errors import TargetError
from onebase.ops.attention import at_least_fp32
from onebase.ops.rescale import rescale


@dataclass(frozen=True, eq=False)
class MagnitudePart:
    """One adapter's magnitudes on one module, fp32, beside the pair that they belong to.

    (outputs,), for a convolution (1, outputs, 1, ...), as PEFT stores them.
    """

    pair: Pair
    magnitude: nn.Parameter
    module: nn.Module
    squares: Tensor
    _kept: dict[str, tuple[tuple[Tensor, ...], Tensor]] = field(default_factory=dict, repr=False)

    @property
    def path(self) -> str:
        """The path of its module."""
        return self.pair.path

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the magnitudes under PEFT's name, which has no ".weight"."""
        yield f"{self.path}.lora_magnitude_vector", self.magnitude

    def factor(self) -> Tensor:
        """Return m / ||W + s B A|| for each output, differentiable in m; 0 / 0 is 0."""
        norms = self._norms()
        return self.magnitude.flatten() / torch.where(norms > 0, norms, 1)

    def on_output(self, y: Tensor, call: RowCall) -> Tensor:
        """Return the rows scaled around the base's bias."""
        bias = getattr(call.module, "bias", None)
        return rescale(y, self.factor(), None if bias is None else at_least_fp32(bias))

    @torch.no_grad()
    def merge_(self, module: nn.Module) -> None:
        """Scale the outputs of a module into which the pair is merged already."""
        write_dense_(module, dense_weight(module, self.path) * self.factor()[:, None])

    def _norms(self) -> Tensor:
        """Return the norms for the pair as it is now; those kept, if no number of it has changed."""
        now = tuple(parameter for _, parameter in self.pair.parameters())
        kept = self._kept.get("norms")
        if kept is not None and all(map(_same, kept[0], now)):
            return kept[1]
        dense = dense_weight(self.module, self.path)
        norms = direction_norms(dense, self.squares, *self.pair.factors(), self.pair.scaling)
        if norms.device.type == "cpu" and not torch.is_inference_mode_enabled():
            self._kept["norms"] = (tuple(tensor.detach().clone() for tensor in now), norms)
        return norms


def make_magnitude(pair: Pair, module: nn.Module, squares: Tensor) -> MagnitudePart:
    """Return fresh magnitudes: the norms as they are, so that nothing changes.

    Args:
        squares: ||w||^2 of each output, as `row_squares` returns it.

    Raises:
        TargetError: the module is a convolution with groups, of whose update no output's weight can say the norm.
    """
    if getattr(module, "groups", 1) != 1:
        raise TargetError(
            f"adapter.use_dora: {pair.path} is a convolution of {module.groups} groups, and DoRA goes on those without. "
            "Set use_dora: false, or leave it out: adapter.exclude_modules."
        )
    norms = direction_norms(dense_weight(module, pair.path), squares, *pair.factors(), pair.scaling).float()
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.dim() > 2:
        norms = norms.view(1, -1, *(1 for _ in weight.shape[2:]))
    return MagnitudePart(pair, nn.Parameter(norms), module, squares)


@torch.no_grad()
def direction_norms(dense: Tensor, squares: Tensor, A: Tensor, B: Tensor, scaling: float) -> Tensor:
    """Return ||W + scaling * B A|| of every row of W without making the sum.

    Args:
        dense: W, (outputs, inputs).
        squares: ||w||^2 of its rows.
    """
    A, B = A.to(dense.dtype), B.to(dense.dtype)
    cross = (B * (dense @ A.T)).sum(1)
    own = (B * (B @ (A @ A.T))).sum(1)
    return (squares + 2 * scaling * cross + scaling**2 * own).clamp_min(0).sqrt()


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)
