"""Scores of an adapter, or of the base alone, on whole examples: classes or numbers; also on slices of them.

Losses are means over examples, kept in fp64; the metrics and their intervals are those of metrics.py.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from onebase.adapters.bank import Bank
from onebase.config.labels import Problem
from onebase.data.examples import Examples
from onebase.errors import ConfigError
from onebase.measure.by_class import ClassScores, scores_by_class
from onebase.measure.evaluate import EVALUATION_TOKENS, Scores, evaluate
from onebase.measure.forward import batches_of, labels_of, task_logits
from onebase.measure.metrics import (
    Estimate,
    Kind,
    SliceScores,
    class_scores,
    multi_label_scores,
    number_scores,
    slices_of,
    with_intervals,
)
from onebase.ops.objective import Objective, example_losses, objectives_of, probabilities

_MOST_SLICES = 100
_KINDS: dict[Problem, Kind] = {
    "single_label_classification": "class",
    "multi_label_classification": "multi_label",
    "regression": "number",
}


@dataclass(frozen=True)
class TaskScores:
    """What an evaluation of whole examples found.

    `loss` is the mean over examples, `metrics` those of metrics.py by name, `outputs` the classes' probabilities
    (examples, classes) or the numbers (examples,); `targets` what they were to be. `tokens` are the examples' own.
    """

    problem: Problem
    loss: float
    metrics: Mapping[str, float]
    examples: int
    tokens: int
    outputs: NDArray[np.float64] = field(repr=False)
    targets: NDArray[np.generic] = field(repr=False)

    def as_dict(self) -> dict[str, float | int]:
        """Return the scores by name."""
        return {"loss": self.loss, **self.metrics, "examples": self.examples, "tokens": self.tokens}

    def intervals(self, members: NDArray[np.int64] | None = None) -> dict[str, Estimate]:
        """Return each metric with its bootstrap interval, of all examples or of those of these numbers."""
        chosen = slice(None) if members is None else members
        return with_intervals(_KINDS[self.problem], self.outputs[chosen], self.targets[chosen])

    def by_class(self, names: Sequence[str]) -> list[ClassScores]:
        """Return the scores of each class, by the classes' names in their order; of numbers there are none."""
        return scores_by_class(self.outputs, self.targets, names) if names else []

    def slices(self, examples: Examples, columns: Sequence[str]) -> list[SliceScores]:
        """Return the scores of the examples by their rows' values in some columns.

        Raises:
            ConfigError: no row has one of the columns, or it has too many values for slices.
        """
        return [
            SliceScores(column, value, len(members), self.intervals(members))
            for column, values in members_of(examples, columns).items()
            for value, members in values
        ]


def members_of(
    examples: Examples, columns: Sequence[str], *, option: str = "eval.slices"
) -> dict[str, list[tuple[str, NDArray[np.int64]]]]:
    """Return, for each column, its values and the numbers of the examples whose rows have them.

    `option` is where the columns were named, for the error.

    Raises:
        ConfigError: no row has one of the columns, or it has too many values for slices.
    """
    found = slices_of([example.values for example in examples], columns, option=option)
    for column, values in found.items():
        if len(values) > _MOST_SLICES:
            raise ConfigError(
                f"{option}: '{column}' has {len(values):,} values, at most {_MOST_SLICES} make slices. Name a column "
                "that sorts the rows into few kinds."
            )
    return found


def score(
    bank: Bank,
    name: str | None,
    examples: Examples,
    *,
    batch_tokens: int = EVALUATION_TOKENS,
    objective: Objective | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Scores | TaskScores:
    """Return the scores of an adapter on examples of any task: those of `judge` where they have targets."""
    if examples.targets is None:
        return evaluate(bank, name, examples, batch_tokens=batch_tokens, on_progress=on_progress)
    return judge(bank, name, examples, batch_tokens=batch_tokens, objective=objective, on_progress=on_progress)


@torch.no_grad()
def judge(
    bank: Bank,
    name: str | None,
    examples: Examples,
    *,
    batch_tokens: int = EVALUATION_TOKENS,
    objective: Objective | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> TaskScores:
    """Return the scores of adapter `name` (None: of the base alone) on examples that have targets.

    `objective` is the loss; None: the one that follows from the labels. `on_progress(done, all)` is called after each
    batch with numbers of examples.
    """
    wanted = examples.targets
    assert wanted is not None, "examples of such a task have targets"
    problem = labels_of(bank.base).problem
    logits = _logits(bank, name, examples, batch_tokens, on_progress)
    losses = example_losses(objective or objectives_of(problem)[0], problem, logits, torch.from_numpy(wanted))
    found = _answers(problem, logits)
    scores = {"class": class_scores, "multi_label": multi_label_scores, "number": number_scores}[_KINDS[problem]]
    metrics = scores(found, wanted) if np.isfinite(found).all() else {}  # the loss says it
    return TaskScores(
        problem, float(losses.double().mean()), metrics, len(examples), examples.token_count, found, wanted
    )


@torch.no_grad()
def outputs_for(
    bank: Bank,
    name: str | None,
    examples: Examples,
    *,
    batch_tokens: int = EVALUATION_TOKENS,
    on_progress: Callable[[int, int], None] | None = None,
) -> NDArray[np.float64]:
    """Return what an adapter gives each example: (examples, classes) probabilities, or (examples,) numbers."""
    return _answers(labels_of(bank.base).problem, _logits(bank, name, examples, batch_tokens, on_progress))


def _logits(
    bank: Bank,
    name: str | None,
    examples: Examples,
    batch_tokens: int,
    on_progress: Callable[[int, int], None] | None,
) -> torch.Tensor:
    """Return (examples, outputs) on the CPU, in the examples' order."""
    found: list[torch.Tensor] = []
    order: list[int] = []
    for batch in batches_of(bank, name, examples, range(len(examples)), batch_tokens):
        found.append(task_logits(bank, batch).cpu())
        order += batch.examples
        if on_progress is not None:
            on_progress(len(order), len(examples))
    return torch.cat(found)[torch.tensor(order).argsort()]


def _answers(problem: Problem, logits: torch.Tensor) -> NDArray[np.float64]:
    found: NDArray[np.float64] = probabilities(problem, logits).double().numpy()
    return found[:, 0] if problem == "regression" else found
