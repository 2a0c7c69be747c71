"""Holding the frozen linear layers of a base's trunk in fewer bits: which ones, and what has to be seen first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch

from onebase.base import int8, nf4
from onebase.base.route import Route
from onebase.errors import ModelError

if TYPE_CHECKING:
    from onebase.base.model import Base

Quantize = Literal["none", "int8", "nf4"]
_RANDOM_TOKENS = 256


def quantise_(base: Base, how: Quantize) -> None:
    """Hold the linear layers of the trunk in 8 or 4 bits from now on; the layout was chosen at full precision.

    Raises:
        ModelError: the model has no linear layer that can be.
        MissingExtraError: what 4 bits need is not installed.
    """
    if how == "none":
        return
    heads = () if isinstance(base.task_head, str) else base.task_head.paths
    kept = (*heads, *(path for path, module in base.model.named_modules() if module is base.head_module))
    if how == "nf4":
        nf4.check_installed()
        count = nf4.quantise_(base.model, kept)
    else:
        count = int8.quantise_(base.model, kept, None if base.layout_kind == "native" else lambda: _see_tokens(base))
    if not count:
        sides = ", both sides multiples of 8" if how == "int8" else ""
        raise ModelError(
            f"{base.name} has no linear layer that can be held in {how} (torch.nn.Linear{sides}). Remove quantize."
        )
    for tensor in (*base.model.parameters(), *base.model.buffers()):
        if tensor.is_floating_point():  # may lie in the mapped file, which stays in memory for the last of them
            tensor.data = tensor.data.clone()
    base.quantize = how


def _see_tokens(base: Base) -> None:
    """Run the base on random tokens, the same each time."""
    config = base.model.config.get_text_config()
    count = min(_RANDOM_TOKENS, getattr(config, "max_position_embeddings", None) or _RANDOM_TOKENS)
    ids = torch.randint(config.vocab_size, (1, count), generator=torch.Generator().manual_seed(0))
    with base.native(Route()) as model:
        model(input_ids=ids.to(base.device))
