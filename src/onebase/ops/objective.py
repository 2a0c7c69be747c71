"""The losses of tasks on whole examples, each the negative log-likelihood of what it says the labels are drawn from.

    cross_entropy         one class of k            -log softmax(z)_y               categorical
    binary_cross_entropy  each of k classes or not  mean over k of -log sigmoid     Bernoulli
    squared_error         a number                  (z - y)^2                       Gaussian of constant variance

Squared error may be asked for with classes too: |softmax(z) - e_y|^2 (the Brier score), or the mean of (sigmoid(z) - y)^2.
That is no likelihood of a class, and its gradient has the factors p (1 - p): it vanishes where the model is sure, also
where it is sure and wrong, while that of cross-entropy is p - y. `logit_gradient` has both in closed form.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor

from onebase.config.labels import Problem
from onebase.ops.attention import at_least_fp32

Objective = Literal["cross_entropy", "binary_cross_entropy", "squared_error"]


def example_losses(
    objective: Objective,
    problem: Problem,
    logits: Float[Tensor, "examples outputs"],
    targets: Shaped[Tensor, "examples ..."],
) -> Float[Tensor, " examples"]:
    """Return the loss of each example, in fp32 at least; `targets` are class numbers, ones and zeros, or numbers."""
    z = at_least_fp32(logits)
    if problem == "regression":
        return (z[:, 0] - targets.to(z.dtype)).square()
    if problem == "multi_label_classification":
        y = targets.to(z.dtype)
        if objective == "squared_error":
            return (z.sigmoid() - y).square().mean(1)
        return F.binary_cross_entropy_with_logits(z, y, reduction="none").mean(1)
    if objective == "squared_error":
        return (z.softmax(1) - F.one_hot(targets, z.shape[1])).square().sum(1)
    return F.cross_entropy(z, targets, reduction="none")


@torch.no_grad()
def logit_gradient(
    objective: Objective,
    problem: Problem,
    logits: Float[Tensor, "examples outputs"],
    targets: Shaped[Tensor, "examples ..."],
) -> Float[Tensor, "examples outputs"]:
    """Return the gradient of each example's loss with respect to its logits, by formula.

    With p = softmax(z) and e the one-hot target: cross-entropy p - e; squared error 2 p (p - e - <p, p - e>). For
    several classes with p = sigmoid(z): (p - y) / k, and 2 (p - y) p (1 - p) / k. For a number: 2 (z - y).
    """
    z = at_least_fp32(logits)
    if problem == "regression":
        return 2 * (z - targets.to(z.dtype)[:, None])
    if problem == "multi_label_classification":
        p = z.sigmoid()
        error = (p - targets.to(z.dtype)) / z.shape[1]
        return 2 * error * p * (1 - p) if objective == "squared_error" else error
    p = z.softmax(1)
    error = p - F.one_hot(targets, z.shape[1])
    return 2 * p * (error - (p * error).sum(1, keepdim=True)) if objective == "squared_error" else error


def probabilities(problem: Problem, logits: Float[Tensor, "examples outputs"]) -> Float[Tensor, "examples outputs"]:
    """Return what the model gives each class; of a regression, its numbers."""
    z = at_least_fp32(logits)
    return z if problem == "regression" else z.sigmoid() if problem == "multi_label_classification" else z.softmax(1)


def is_right(
    problem: Problem, logits: Float[Tensor, "examples outputs"], targets: Shaped[Tensor, "examples ..."]
) -> Tensor:
    """Return (examples,) whether the likeliest class is the target's, or every class is as it should; False for numbers."""
    if problem == "regression":
        return torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    if problem == "multi_label_classification":
        return ((logits > 0) == (targets > 0)).all(1)
    return logits.argmax(1) == targets


_OBJECTIVES: Mapping[Problem, tuple[Objective, ...]] = {
    "single_label_classification": ("cross_entropy", "squared_error"),
    "multi_label_classification": ("binary_cross_entropy", "squared_error"),
    "regression": ("squared_error",),
}
"""What may be the loss of each problem; the usual one first."""


def objectives_of(problem: Problem) -> tuple[Objective, ...]:
    """Return the losses that a problem may have; the first is the one that follows from it."""
    return _OBJECTIVES[problem]
