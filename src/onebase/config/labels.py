"""`Labels`: what a task on whole examples predicts - one class, several, or a number - and the names of its classes.

The words are transformers' own (`problem_type`, `id2label`), so that its models are made from them and users get them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Task = Literal["chat", "text", "classify", "regress"]
Problem = Literal["single_label_classification", "multi_label_classification", "regression"]


@dataclass(frozen=True)
class Labels:
    """The names of the classes, in the order of the head's outputs; a regression has one output without a name."""

    problem: Problem
    names: tuple[str, ...] = ()

    @property
    def outputs(self) -> int:
        """Numbers that the head gives for an example."""
        return len(self.names) or 1

    @property
    def config(self) -> dict[str, Any]:
        """The fields of a transformers configuration that say so."""
        if not self.names:
            return {"problem_type": self.problem, "num_labels": 1}
        return {
            "problem_type": self.problem,
            "id2label": dict(enumerate(self.names)),
            "label2id": {name: number for number, name in enumerate(self.names)},
        }


def labels_of(config: Any) -> Labels:
    """Return what a transformers configuration says of its model's labels.

    One output without a word about the problem is a regression, as transformers takes it.
    """
    count, named = int(config.num_labels), dict(config.id2label or {})
    problem: Any = config.problem_type or ("regression" if count == 1 else "single_label_classification")
    if problem == "regression":
        return Labels(problem)
    return Labels(problem, tuple(str(named.get(number, f"LABEL_{number}")) for number in range(count)))
