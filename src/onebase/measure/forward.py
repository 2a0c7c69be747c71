"""One micro-batch to its loss: where adapters learn and where they are judged.

The loss of a step is the mean over the labelled tokens of the whole step: each row is weighted by one over that
number, so gradients of micro-batches add up to those of one large batch, however it was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from onebase.adapters.bank import Bank
from onebase.base.model import Base
from onebase.base.route import RowSpace
from onebase.config.labels import Labels
from onebase.data.batches import FlatBatch, Front, micro_batches
from onebase.data.examples import Examples
from onebase.errors import ModelError
from onebase.ops.loss import RowLosses, head_loss
from onebase.ops.objective import Objective, example_losses, is_right, objectives_of


def batches_of(
    bank: Bank, name: str | None, examples: Examples, numbers: Sequence[int], budget_tokens: int
) -> Iterator[FlatBatch]:
    """Yield examples as flat batches of an adapter (None: of the base alone), behind its virtual tokens.

    Those are computed once a batch where a prefix can be shared; a padded batch repeats them anyway.
    """
    shared = bank.base.shares_prefixes and bank.base.layout_kind == "flat"
    return micro_batches(examples, numbers, budget_tokens, name, Front(bank.virtual_ids(name), shared))


def forward_loss(
    bank: Bank,
    batch: FlatBatch,
    label_weight: float,
    *,
    dropout_step: int | None = None,
    objective: Objective | None = None,
) -> tuple[torch.Tensor, RowLosses]:
    """Return label_weight * (sum of the labels' losses), ready for backward, and each label's own loss.

    A label is a labelled token, or the target of an example.

    Args:
        dropout_step: the step that keys dropout; None switches it off.
        objective: the loss of a task on whole examples; None: the one that follows from what is predicted.
    """
    if batch.targets is not None:
        logits, targets = task_logits(bank, batch, dropout_step=dropout_step), batch.targets.to(bank.base.device)
        problem = labels_of(bank.base).problem
        losses = example_losses(objective or objectives_of(problem)[0], problem, logits, targets)
        return label_weight * losses.sum(), RowLosses(losses.detach(), is_right(problem, logits.detach(), targets))
    head = bank.head
    route = bank.route(batch.layout, label_rows=batch.label_rows, dropout_step=dropout_step)
    hidden = bank.base.hidden(batch.token_ids, route)
    device = hidden.device
    rows = hidden.index_select(0, batch.label_rows.to(device))  # one row may predict for several examples
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weights = torch.full(batch.label_ids.shape, label_weight, dtype=dtype, device=device)
    segments, keys = route.rows[RowSpace.LABEL], route.row_keys.get(RowSpace.LABEL)
    return head_loss(rows, batch.label_ids.to(device), weights, head, segments, keys)


def task_logits(bank: Bank, batch: FlatBatch, *, dropout_step: int | None = None) -> torch.Tensor:
    """Return (examples, outputs): what the head for whole examples gives for a batch."""
    route = bank.route(batch.layout, label_rows=batch.label_rows, dropout_step=dropout_step)
    return bank.base.task_logits(bank.base.hidden(batch.token_ids, route), route)


def labels_of(base: Base) -> Labels:
    """Return what the base's head for whole examples predicts.

    Raises:
        ModelError: it has none.
    """
    if isinstance(base.task_head, str):
        raise ModelError(f"{base.name}: {base.task_head}.")
    return base.task_head.labels
