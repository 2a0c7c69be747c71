"""Failing loudly: what must hold of a step's losses and gradients, or training stops before it wastes an hour."""

from __future__ import annotations

import math

import torch

from onebase.adapters.bank import Adapter
from onebase.data.batches import FlatBatch
from onebase.data.examples import Examples
from onebase.errors import TrainingError, list_problems
from onebase.ops.loss import RowLosses

_SHOWN = 5


def check_losses(rows: RowLosses, batch: FlatBatch, examples: Examples, step: int) -> None:
    """Raise if a labelled token's loss is not finite, naming the examples.

    Raises:
        TrainingError: step, place of the first such examples and what to do.
    """
    bad = ~torch.isfinite(rows.loss)
    if not bool(bad.any()):
        return
    counts = [1 if batch.targets is not None else batch.layout.nodes[leaf].labels for leaf in batch.layout.leaves]
    of_label = torch.tensor(batch.examples).repeat_interleave(torch.tensor(counts))
    places = [examples[number].place for number in dict.fromkeys(of_label[bad.cpu()].tolist())]
    shown = ", ".join(places[:_SHOWN]) + (f" and {len(places) - _SHOWN} more" if len(places) > _SHOWN else "")
    raise TrainingError(
        f"step {step}: the loss is not finite ({int(bad.sum())} of {len(bad)} labelled tokens), first in {shown}. "
        "Lower train.learning_rate, look at these rows (onebase preview), or set dtype: float32."
    )


def check_gradients(adapter: Adapter) -> None:
    """Raise unless every trained tensor has a finite gradient; called after the first backward.

    Experts that no token was sent to, and rows of tokens that did not come, need none.

    Raises:
        TrainingError: the tensors without one.
    """
    problems = []
    may_rest = adapter.may_rest
    for name, parameter in adapter.parameters():
        if parameter.grad is None and name in may_rest:
            continue
        if parameter.grad is None:
            problems.append(f"{name}: no gradient reaches it. Is its module used by this model's forward?")
        elif not bool(torch.isfinite(parameter.grad).all()):
            problems.append(f"{name}: its gradient is not finite.")
    if problems:
        raise TrainingError(list_problems(f"the first backward of adapter {adapter.name!r}", problems, shown=_SHOWN))


def check_grad_norm(norm: float, step: int) -> None:
    """Raise if the norm of all gradients is not finite although the loss was.

    Raises:
        TrainingError: step and what to do.
    """
    if not math.isfinite(norm):
        raise TrainingError(
            f"step {step}: the loss is finite but the norm of its gradients is {norm}. Lower train.learning_rate, or "
            "set dtype: float32."
        )


def check_validation(loss: float, step: int) -> None:
    """Raise if the loss on the validation rows is not finite; `step` is the number of steps done.

    Raises:
        TrainingError: when, and what to do.
    """
    if math.isfinite(loss):
        return
    if step == 0:
        what = "what training starts from (the base, with the adapter's first values): look at these rows (onebase preview), or set dtype: float32."
    else:
        what = f"what was learned in {step} steps: lower train.learning_rate, or set dtype: float32."
    raise TrainingError(f"the loss on data.valid is not finite ({loss}) with {what}")


def check_moved(adapter: Adapter, before: dict[str, torch.Tensor]) -> None:
    """Raise unless every trained tensor differs from `before`; called after the third step.

    Experts and rows of tokens that were not visited are as they were.

    Raises:
        TrainingError: the tensors that did not move.
    """
    may_rest = adapter.may_rest
    still = [
        name
        for name, parameter in adapter.parameters()
        if name not in may_rest and torch.equal(parameter, before[name])
    ]
    if still:
        problems = [
            f"{name}: has not changed in three steps; its gradient is zero, or train.learning_rate too small."
            for name in still
        ]
        raise TrainingError(list_problems(f"adapter {adapter.name!r}", problems, shown=_SHOWN))
