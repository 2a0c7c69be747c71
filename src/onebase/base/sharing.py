"""Two bases of one model in one memory: the second holds the first one's weights, where they are the same.

A head for whole examples is part of a model's modules, so runs of different tasks have bases of their own. What they have in
common, the frozen weights, need not lie in memory twice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from onebase.base.model import Base


def share_weights_(base: Base, other: Base) -> int:
    """Let `base` hold the tensors of `other` in the place of its own equal ones, and return the bytes that this frees."""
    known = dict(_tensors(other.model))
    freed = 0
    for path, tensor in _tensors(base.model):
        twin = known.get(path)
        if twin is None or twin.data_ptr() == tensor.data_ptr() or not _same(tensor, twin):
            continue
        freed += tensor.numel() * tensor.element_size()
        tensor.data = twin.data
    return freed


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers by their path in the model without adapters."""
    for path, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        yield path.replace(".base_layer", ""), tensor


def _same(one: Tensor, other: Tensor) -> bool:
    return (
        one.shape == other.shape and one.dtype == other.dtype and one.device == other.device and torch.equal(one, other)
    )
