"""Losses of an adapter, or of the base alone, on examples: means over labelled tokens, never means of batch means."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import torch

from onebase.adapters.bank import Bank
from onebase.data.examples import Examples
from onebase.errors import DataError
from onebase.measure.forward import batches_of, forward_loss

EVALUATION_TOKENS = 2048


@dataclass(frozen=True)
class Scores:
    """What an evaluation found. `loss` is nats a labelled token; `token_accuracy` the share of labels ranked first.

    `tokens` are those of the examples: virtual ones belong to the adapter.
    """

    loss: float
    perplexity: float
    token_accuracy: float
    examples: int
    labelled_tokens: int
    tokens: int

    def as_dict(self) -> dict[str, float | int]:
        """Return the scores by name."""
        return asdict(self)


@torch.no_grad()
def evaluate(
    bank: Bank,
    name: str | None,
    examples: Examples,
    *,
    batch_tokens: int = EVALUATION_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scores:
    """Return the scores of adapter `name` (None: of the base alone) on examples.

    Sums are kept in fp64, so the result does not depend on how the examples were batched beyond fp32 rounding of a
    token's own loss. `on_progress(done, all)` is called after each batch with numbers of examples.

    Raises:
        DataError: no token of the examples is labelled.
    """
    if not examples.label_count:
        raise DataError(f"{len(examples)} examples without a labelled token: there is nothing to evaluate.")
    loss_sum, correct, labels, done = 0.0, 0, 0, 0
    for batch in batches_of(bank, name, examples, range(len(examples)), batch_tokens):
        _, found = forward_loss(bank, batch, 1.0)
        loss_sum += float(found.loss.double().sum())
        correct += int(found.correct.sum())
        labels += batch.label_count
        done += len(batch.examples)
        if on_progress is not None:
            on_progress(done, len(examples))
    loss = loss_sum / labels
    return Scores(
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        token_accuracy=correct / labels,
        examples=len(examples),
        labelled_tokens=labels,
        tokens=examples.token_count,
    )
