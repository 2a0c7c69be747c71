"""The frozen base in 8 bits: its linear layers hold integers and a scale an output (ops/int8.py).

What stays as it is: embeddings, norms, output and task heads, and layers with a side that is no multiple of 8, which
integer products on GPUs do not take. `weight` of such a layer is made from its integers whenever somebody reads it.
Layers that read the same rows (queries, keys and values; gate and up) share one quantisation of them.

Some columns of a layer's input are twenty times the others, in every row, and would leave these a few of 127 steps. So the
columns are divided by factors and the weight's columns multiplied by them, which changes no product: SmoothQuant, arXiv:2211.10438
eq. 4 with alpha 0.5, each factor rounded to a fourth root of a power of two, so that the same integers come out on every
machine. How large columns are is seen in one forward of random tokens: they are large whatever the tokens are.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from onebase.errors import ModelError
from onebase.ops.int8 import int8_linear, quantise_rows, quantise_weight


class LastRows:
    """The rows that were quantised last, for the next layer that reads the same ones."""

    def __init__(self) -> None:
        # read and written at once, as several threads may; the rows are held, so that their memory is not used again
        self._last: tuple[Tensor, int, Tensor | None, tuple[Tensor, Tensor]] | None = None

    def integers_of(self, rows: Tensor, shares: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the integers and scales of (rows, inner) numbers, each column times its share."""
        rows = rows.detach()
        if rows.is_inference():  # these do not say when they are written into
            return quantise_rows(rows, shares)
        if self._last is not None:
            last, version, own, found = self._last
            if (
                own is shares and last.data_ptr() == rows.data_ptr() and last.shape == rows.shape
                and last.stride() == rows.stride() and version == rows._version
            ):  # fmt: skip
                return found
        found = quantise_rows(rows, shares)
        self._last = rows, rows._version, shares, found
        return found


class Int8Linear(nn.Module):
    """A frozen linear layer in 8 bits; `shares` (in,), where given, are what the columns of its input are multiplied by."""

    bias: Tensor | None
    shares: Tensor | None

    def __init__(self, linear: nn.Linear, last: LastRows, shares: Tensor | None = None) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        integers, scales = quantise_weight(weight if shares is None else weight / shares)
        self.integers = nn.Parameter(integers, requires_grad=False)
        self.register_buffer("scales", scales)
        self.register_buffer("shares", shares)
        self.bias = linear.bias
        self.dtype = linear.weight.dtype
        self._last = last

    @property
    def weight(self) -> Tensor:
        """(out, in), what the layer multiplies with, in floating point."""
        assert isinstance(self.scales, Tensor)
        weight = self.integers * self.scales[:, None]
        return (weight if self.shares is None else weight * self.shares).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for every vector of the last dimension."""
        assert isinstance(self.scales, Tensor)
        rows = x.reshape(-1, self.in_features)
        given = self._last.integers_of(rows, self.shares)
        y = int8_linear(rows, self.integers, self.scales, self.bias, self.shares, given)
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)  # in place on a view costs a copy

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight  # what others read of a model are plain layers
        if self.bias is not None:
            destination[f"{prefix}bias"] = self.bias if keep_vars else self.bias.detach()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Int8Linear:
        """Go to another device as every module does, and to no other number format: scales are fp32."""
        if fn(torch.empty(0, dtype=self.dtype, device=self.integers.device)).dtype != self.dtype:
            raise ModelError("a base in 8 bits keeps its number format. Open it again, with dtype set.")
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self


class _Seen:
    """The largest number of each column that layers read in a forward; layers that read one tensor in turn are a group."""

    def __init__(self) -> None:
        self.groups: list[tuple[list[nn.Linear], Tensor]] = []
        self._last: Tensor | None = None

    def watch(self, linear: nn.Module, given: tuple[Any, ...]) -> None:
        """Take note of what a layer is given; a forward pre-hook."""
        assert isinstance(linear, nn.Linear)
        if not given:  # by name: its columns stay as they are
            return
        if self.groups and given[0] is self._last:
            self.groups[-1][0].append(linear)
        else:
            self._last = given[0]
            self.groups.append(([linear], given[0].detach().reshape(-1, linear.in_features).abs().amax(0).float()))

    def shares(self) -> dict[nn.Linear, Tensor]:
        """Return what each layer's columns are to be multiplied by, the same for all layers of a group."""
        found: dict[nn.Linear, Tensor] = {}
        for linears, columns in self.groups:
            weights = torch.stack([linear.weight.abs().amax(0).float() for linear in linears]).amax(0)
            powers = (weights.log2() - columns.log2()) / 2
            shares = torch.exp2(torch.where(powers.isfinite(), (powers * 4).round() / 4, 0.0))
            for linear in linears:
                found.setdefault(linear, shares)
        return found


@torch.no_grad()
def quantise_(model: nn.Module, kept: Collection[str], forward: Callable[[], object] | None) -> int:
    """Put 8-bit layers in the place of a model's linear layers, and return how many.

    Args:
        kept: paths of modules that stay as they are, with all inside them.
        forward: runs the model on something; None: no column is multiplied.
    """
    linears = {
        path: module
        for path, module in model.named_modules()
        if type(module) is nn.Linear
        and not any(path == p or path.startswith(f"{p}.") for p in kept)
        and not (module.in_features % 8 or module.out_features % 8)
    }
    seen = _Seen()
    hooks = [linear.register_forward_pre_hook(seen.watch) for linear in linears.values()]
    try:
        if forward is not None:
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    last, shares, count = LastRows(), seen.shares(), len(linears)
    del seen
    while linears:  # each is let go before the next is made
        path, linear = linears.popitem()
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Int8Linear(linear, last, shares.pop(linear, None)))
        del linear
    return count
