"""One micro-batch to its loss: where adapters learn and where they are judged.

The loss of a step is the mean over the labelled tokens of the whole step: each row is weighted by one over that
number, so gradients of micro-batches add up to those of one large batch, however it was cut.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from onebase.adapters.bank import Bank
from onebase.base.route import RowSpace
from onebase.data.batches import FlatBatch, Front, micro_batches
from onebase.data.examples import Examples
from onebase.ops.loss import RowLosses, head_loss


def batches_of(
    bank: Bank, name: str | None, examples: Examples, numbers: Sequence[int], budget_tokens: int
) -> Iterator[FlatBatch]:
    """Yield examples as flat batches of an adapter (None: of the base alone), behind its virtual tokens.

    Those are computed once a batch where a prefix can be shared; a padded batch repeats them anyway.
    """
    shared = bank.base.shares_prefixes and bank.base.layout_kind == "flat"
    return micro_batches(examples, numbers, budget_tokens, name, Front(bank.virtual_ids(name), shared))


def forward_loss(
    bank: Bank, batch: FlatBatch, label_weight: float, *, dropout_step: int | None = None
) -> tuple[torch.Tensor, RowLosses]:
    """Return label_weight * (sum of the labelled tokens' losses), ready for backward, and each label's own loss.

    Args:
        dropout_step: the step that keys dropout; None switches it off.
    """
    head = bank.head
    route = bank.route(batch.layout, label_rows=batch.label_rows, dropout_step=dropout_step)
    hidden = bank.base.hidden(batch.token_ids, route)
    device = hidden.device
    rows = hidden.index_select(0, batch.label_rows.to(device))  # one row may predict for several examples
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    weights = torch.full(batch.label_ids.shape, label_weight, dtype=dtype, device=device)
    segments, keys = route.rows[RowSpace.LABEL], route.row_keys.get(RowSpace.LABEL)
    return head_loss(rows, batch.label_ids.to(device), weights, head, segments, keys)
