"""Losses of tasks on whole examples: torch's and transformers' own, and their gradients in closed form."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from onebase.config.labels import Problem
from onebase.ops.objective import example_losses, is_right, logit_gradient, objectives_of, probabilities

KINDS = [
    ("single_label_classification", "cross_entropy"),
    ("single_label_classification", "squared_error"),
    ("multi_label_classification", "binary_cross_entropy"),
    ("multi_label_classification", "squared_error"),
    ("regression", "squared_error"),
]


def drawn(problem: str, examples: int, outputs: int, seed: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(examples, 1 if problem == "regression" else outputs, generator=draws, dtype=torch.float64)
    if problem == "regression":
        return logits, torch.randn(examples, generator=draws, dtype=torch.float64)
    if problem == "multi_label_classification":
        return logits, torch.randint(0, 2, logits.shape, generator=draws).float()
    return logits, torch.randint(0, outputs, (examples,), generator=draws)


@pytest.mark.parametrize(("problem", "objective"), KINDS)
@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 2**20))
def test_the_gradient_by_formula_is_that_of_autograd(problem, objective, examples, outputs, seed) -> None:
    logits, targets = drawn(problem, examples, outputs, seed)
    logits.requires_grad_()
    example_losses(objective, problem, logits, targets).sum().backward()
    torch.testing.assert_close(logit_gradient(objective, problem, logits, targets), logits.grad, rtol=1e-9, atol=1e-12)


@given(st.integers(1, 6), st.integers(2, 5), st.integers(0, 2**20))
def test_the_usual_losses_are_those_of_transformers_models(examples, outputs, seed) -> None:
    oracles: tuple[tuple[Problem, Any], ...] = (
        ("single_label_classification", F.cross_entropy),
        ("multi_label_classification", F.binary_cross_entropy_with_logits),
        ("regression", lambda z, y: F.mse_loss(z[:, 0], y)),
    )
    for problem, oracle in oracles:
        logits, targets = drawn(problem, examples, outputs, seed)
        wanted = oracle(logits, targets.double() if problem.startswith("multi") else targets)
        found = example_losses(objectives_of(problem)[0], problem, logits, targets).mean()
        torch.testing.assert_close(found, wanted)


def test_squared_error_of_classes_teaches_nothing_where_the_model_is_sure_and_wrong() -> None:
    logits, wrong = torch.tensor([[20.0, 0.0]]), torch.tensor([1])
    assert logit_gradient("squared_error", "single_label_classification", logits, wrong).abs().max() < 1e-7
    assert logit_gradient("cross_entropy", "single_label_classification", logits, wrong).abs().min() > 0.99


def test_squared_error_of_one_class_is_the_brier_score_over_all_classes() -> None:
    logits, targets = drawn("single_label_classification", 5, 3, 0)
    by_hand = ((logits.softmax(1) - torch.eye(3, dtype=torch.float64)[targets]) ** 2).sum(1)
    found = example_losses("squared_error", "single_label_classification", logits, targets)
    torch.testing.assert_close(found, by_hand)


def test_what_is_right_and_how_likely() -> None:
    logits = torch.tensor([[2.0, -1.0], [-1.0, 3.0]])
    assert is_right("single_label_classification", logits, torch.tensor([0, 0])).tolist() == [True, False]
    both = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert is_right("multi_label_classification", logits, both).tolist() == [True, False]
    assert is_right("regression", logits[:, :1], torch.tensor([2.0, -1.0])).tolist() == [False, False]
    torch.testing.assert_close(probabilities("single_label_classification", logits), logits.softmax(1))
    torch.testing.assert_close(probabilities("multi_label_classification", logits), logits.sigmoid())
