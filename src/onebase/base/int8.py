"""The frozen base in 8 bits: its linear layers hold integers and a scale an output (ops/int8.py).

What stays as it is: embeddings, norms, output and task heads, and layers with a side that is no multiple of 8, which
integer products on GPUs do not take. `weight` of such a layer is made from its integers whenever somebody reads it.
Layers that read the same rows (queries, keys and values; gate and up) share one quantisation of them.
"""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn

from onebase.ops.int8 import int8_linear, quantise_rows, quantise_weight


class LastRows:
    """The rows that were quantised last, for the next layer that reads the same ones."""

    def __init__(self) -> None:
        self._rows: Tensor | None = None
        self._version = 0
        self._found: tuple[Tensor, Tensor] | None = None

    def integers_of(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the integers and scales of (rows, inner) numbers."""
        last = self._rows
        if (
            self._found is None or last is None or last.data_ptr() != rows.data_ptr() or last.shape != rows.shape
            or last.stride() != rows.stride() or self._version != rows._version
        ):  # fmt: skip
            self._found = quantise_rows(rows.detach(), None)
            self._rows, self._version = rows.detach(), rows._version  # held, so that its memory is not used again
        assert self._found is not None
        return self._found

    def forget(self) -> None:
        """Let the last rows go."""
        self._rows = self._found = None


class Int8Linear(nn.Module):
    """A frozen linear layer in 8 bits."""

    def __init__(self, linear: nn.Linear, last: LastRows) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        integers, scales = quantise_weight(linear.weight.detach())
        self.integers = nn.Parameter(integers, requires_grad=False)
        self.register_buffer("scales", scales)
        self.bias = linear.bias
        self.dtype = linear.weight.dtype
        self._last = last

    @property
    def weight(self) -> Tensor:
        """(out, in), what the layer multiplies with, in floating point."""
        assert isinstance(self.scales, Tensor)
        return (self.integers * self.scales[:, None]).to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for every vector of the last dimension."""
        assert isinstance(self.scales, Tensor)
        rows = x.reshape(-1, self.in_features)
        y = int8_linear(rows, self.integers, self.scales, self.bias, self._last.integers_of(rows))
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)  # in place on a view costs a copy


@torch.no_grad()
def quantise_(model: nn.Module, kept: Collection[str]) -> int:
    """Put 8-bit layers in the place of a model's linear layers, and return how many.

    Args:
        kept: paths of modules that stay as they are, with all inside them.
    """
    last, count = LastRows(), 0
    for path, module in list(model.named_modules()):
        if type(module) is not nn.Linear or any(path == p or path.startswith(f"{p}.") for p in kept):
            continue
        if module.in_features % 8 or module.out_features % 8:
            continue
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, Int8Linear(module, last))
        count += 1
    return count
