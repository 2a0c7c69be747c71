"""Logits of rows through the flat path, and through the model's own forward on a padded batch: the same numbers?

The flat path is what trains and evaluates: tokens end to end, no padding, logits only where something is predicted:
at labelled positions, or once an example where it has a class or a number.
The padded one is the model as transformers runs it, adapters on it. Cost: two forwards, and the padded one's logits.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from onebase.adapters.bank import Bank
from onebase.base.route import RowSpace
from onebase.data.batches import FlatBatch
from onebase.data.examples import Examples
from onebase.measure.forward import batches_of, task_logits

_PADDED_TOGETHER = 2
_NO_CUT = 2**31


@torch.no_grad()
def flat_and_padded(bank: Bank, name: str, examples: Examples) -> float:
    """Return the largest difference of a predicted logit between both ways, relative to the largest logit.

    Raises:
        ConfigError, ModelError: the base predicts nothing.
    """
    distances, largest = [0.0], [1e-6]
    for first in range(0, len(examples), _PADDED_TOGETHER):
        numbers = range(first, min(first + _PADDED_TOGETHER, len(examples)))
        for batch in batches_of(bank, name, examples, numbers, _NO_CUT):
            flat, own = _flat(bank, batch), _padded(bank, name, batch)
            wide = torch.promote_types(own.dtype, torch.float32)
            largest.append(float(own.abs().max()))
            distances.append(float((flat.to(wide) - own.to(wide)).abs().max()))
    return float(torch.tensor(distances, dtype=torch.float64).max()) / max(
        largest
    )  # unlike Python's max, NaN if any is


def _flat(bank: Bank, batch: FlatBatch) -> Tensor:
    """Return what the path of training predicts: a row for each labelled position, or for each example."""
    if batch.targets is not None:
        return task_logits(bank, batch)
    route = bank.route(batch.layout, label_rows=batch.label_rows)
    hidden = bank.base.hidden(batch.token_ids, route)
    rows = hidden.index_select(0, batch.label_rows.to(hidden.device))
    return bank.head.logits(rows, route.rows[RowSpace.LABEL])


def _padded(bank: Bank, name: str, batch: FlatBatch) -> Tensor:
    """Return what the model itself predicts in the same places, its examples padded on the right."""
    base, virtual = bank.base, list(bank.virtual_ids(name))
    lines, places = [], []
    for line, (tokens, positions) in enumerate(_entries(batch, len(virtual))):
        lines.append(torch.cat([torch.tensor(virtual, dtype=torch.int64), tokens]))
        places += [(line, len(virtual) + position) for position in positions]
    padding = getattr(base.model.config, "pad_token_id", None)
    longest = max(map(len, lines))
    ids = torch.stack([_filled(line, longest, int(line[-1]) if padding is None else padding) for line in lines])
    mask = torch.stack([_filled(torch.ones_like(line), longest, 0) for line in lines])
    route = bank.batch_route([name] * len(lines), [0] * len(lines) if virtual else None)
    with base.native(route) as model:
        logits = model(input_ids=ids.to(base.device), attention_mask=mask.to(base.device), use_cache=False).logits
    if batch.targets is not None:
        whole: Tensor = logits
        return whole
    entry, position = (torch.tensor(side, device=logits.device) for side in zip(*places, strict=True))
    found: Tensor = logits[entry, position]
    return found


def _entries(batch: FlatBatch, virtual: int) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield each example's own tokens, and the positions in them that predict something, without virtual tokens."""
    layout, seen = batch.layout, 0
    for leaf in layout.leaves:
        start, node = layout.starts[leaf], layout.nodes[leaf]
        rows = [*layout.ancestor_rows(leaf), *range(start, start + node.length)]
        predict = batch.label_rows[seen : seen + node.labels].tolist()
        seen += node.labels
        yield batch.token_ids[rows[virtual:]], [rows.index(row) - virtual for row in predict]


def _filled(line: Tensor, length: int, value: int) -> Tensor:
    return torch.cat([line, torch.full((length - len(line),), value, dtype=line.dtype)])
