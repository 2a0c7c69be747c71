"""The head of a task on whole examples: from the trunk's hidden rows, one pooled row an example, to its numbers.

The trunk runs flat, and each example's row is gathered: its first one, its last, or the mean of all, whichever gives
the model's own results in a self-check (nothing is decided by a name). The pooled rows then go through the model's own
pooler and head: the model's forward is called on examples of one token each, on a view of the model in which the trunk
only hands these rows over. So dropout, activations and norms in a head are the model's business, and adapters on it
are there as everywhere.

Cost: the head on as many rows as there are examples.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from onebase.base import pretrained
from onebase.base.route import Route, Slot
from onebase.config.labels import Labels

Pooling = Literal["first", "last", "mean"]
POOLINGS: tuple[Pooling, ...] = ("first", "last", "mean")


@dataclass(frozen=True)
class TaskHead:
    """A model's head for whole examples. `paths` are its modules outside the trunk that hold weights.

    `fresh` are the modules, in the trunk or outside, that no file held weights for: each adapter begins with its own.
    """

    model: Any
    labels: Labels
    pooling: Pooling
    paths: tuple[str, ...]
    fresh: tuple[str, ...] = ()

    def pool(self, hidden: Tensor, examples: Sequence[Tensor]) -> Tensor:
        """Return (examples, hidden): what the head reads of each example, whose hidden rows are given by number."""
        if self.pooling == "mean":
            return torch.stack([hidden.index_select(0, rows.to(hidden.device)).mean(0) for rows in examples])
        place = 0 if self.pooling == "first" else -1
        return hidden.index_select(0, torch.stack([rows[place] for rows in examples]).to(hidden.device))

    def logits(self, pooled: Tensor, slot: Slot, route: Route) -> Tensor:
        """Return (examples, outputs), under a route that knows the owners of the examples."""
        model = self.model
        view = copy.copy(model)
        view.__dict__["_modules"] = dict(model._modules)
        trunk = model.base_model
        view._modules[model.base_model_prefix] = _Rows(pooled, getattr(trunk, "pooler", None))
        padding = getattr(model.config, "pad_token_id", None)
        ids = torch.full((pooled.shape[0], 1), 1 if padding == 0 else 0, device=pooled.device)
        with slot.use(route):
            logits: Tensor = view(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        return logits


class _Rows(nn.Module):
    """A trunk that has run already: whatever it is called with, it returns the pooled rows, each a sequence of one."""

    def __init__(self, rows: Tensor, pooler: nn.Module | None) -> None:
        super().__init__()
        self.rows, self._pooler = rows[:, None], (pooler,)  # in a tuple: it stays the trunk's

    def forward(self, *_: Any, **__: Any) -> Any:
        """Return the rows as a trunk of transformers does."""
        pooler = self._pooler[0]
        return pretrained.trunk_output(self.rows, None if pooler is None else pooler(self.rows))
