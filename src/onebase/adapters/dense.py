"""The dense weight of a frozen module, as a matrix with one row an output: the one door for what needs it.

DoRA's norms, the initialisers that start from the base, and merging ask here; no other part of an adapter looks at a
base weight.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from onebase.errors import TargetError
from onebase.ops.attention import at_least_fp32


def dense_weight(module: nn.Module, path: str) -> Tensor:
    """Return the weight as (outputs, what one output reads), at least fp32: a view where dtype and layout allow.

    An embedding's outputs are its dimensions and each reads the whole vocabulary; a convolution's kernel is flattened.

    Raises:
        TargetError: the module has no such weight.
    """
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or not weight.is_floating_point():
        raise TargetError(
            f"{path} is a {type(module).__name__} without a dense weight, which use_dora, pissa, olora and merging need. "
            "Leave it out of target_modules, or set use_dora: false and init_lora_weights: true."
        )
    wide: Tensor = at_least_fp32(weight.detach())
    return wide.T if is_transposed(module) else wide.flatten(1)


@torch.no_grad()
def row_squares(dense: Tensor) -> Tensor:
    """Return ||w||^2 of every row, from a weight as `dense_weight` returns it."""
    return dense.square().sum(1)


@torch.no_grad()
def write_dense_(module: nn.Module, dense: Tensor) -> None:
    """Put a matrix as `dense_weight` returns it in the place of a module's own weight, rounded to its dtype.

    Raises:
        TargetError: the weight is held in 8 or 4 bits.
    """
    weight = module._parameters.get("weight")
    if weight is None:
        raise TargetError(
            f"a {type(module).__name__} holds its weight in fewer bits, which nothing is written into. Open the base with "
            "quantize: none"
        )
    weight.copy_((dense.T if is_transposed(module) else dense).reshape(weight.shape))


def add_product_(module: nn.Module, path: str, A: Tensor, B: Tensor, scaling: float) -> None:
    """Add scaling * B @ A to a module's own weight, computed in fp32 at least and rounded once."""
    dense = dense_weight(module, path)
    write_dense_(module, dense + scaling * (B.to(dense.dtype) @ A.to(dense.dtype)))


def is_transposed(module: nn.Module) -> bool:
    """Return whether a module's weight has a row for each input: embeddings, and transformers' Conv1D of GPT-2."""
    return isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
