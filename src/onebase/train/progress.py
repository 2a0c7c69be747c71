"""What a training says while it runs, as plain records; how it is shown is the caller's business."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from onebase.measure.evaluate import Scores
from onebase.measure.judge import TaskScores
from onebase.train.data import TrainingData


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is about to be trained, before the first step. Sizes are bytes."""

    model: str
    dtype: str
    device: str
    steps: int
    first_step: int
    """Steps done already: 0, or the checkpoint's."""
    examples: int
    tokens: int
    labelled_tokens: int
    valid_examples: int
    batch_size: int
    micro_batch_tokens: int
    learning_rate: float
    warmup_steps: int
    threads: int
    trainable_parameters: int
    total_parameters: int
    gradient_bytes: int
    optimizer_bytes: int
    adapter_bytes: int
    layout: str
    warnings: Sequence[str] = ()

    @property
    def full_parameter_bytes(self) -> int:
        """Bytes of one fp32 copy of all the base's parameters: gradients or weights of full fine-tuning."""
        return 4 * self.total_parameters

    @property
    def full_optimizer_bytes(self) -> int:
        """Bytes of AdamW's two fp32 states for all the base's parameters."""
        return 8 * self.total_parameters


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One finished optimiser step; `step` counts from 1. `loss` is the mean over the step's labelled tokens."""

    step: int
    loss: float
    learning_rate: float
    grad_norm: float
    examples: int
    tokens: int
    labelled_tokens: int
    seconds: float


class Progress(Protocol):
    """Who watches a training. Every method may do nothing."""

    def loaded(self, data: TrainingData) -> None:
        """The rows are read and checked."""

    def started(self, plan: Plan) -> None:
        """Everything is checked; the first step comes next."""

    def stepped(self, record: StepRecord) -> None:
        """A step is done."""

    def evaluated(self, step: int, scores: Scores | TaskScores) -> None:
        """The validation rows were scored after `step` steps."""

    def saved(self, path: Path) -> None:
        """A checkpoint or the adapter was written."""

    def note(self, text: str) -> None:
        """Something the user should know."""


class Quiet:
    """Progress that nobody watches."""

    def loaded(self, data: TrainingData) -> None:
        """Do nothing."""

    def started(self, plan: Plan) -> None:
        """Do nothing."""

    def stepped(self, record: StepRecord) -> None:
        """Do nothing."""

    def evaluated(self, step: int, scores: Scores | TaskScores) -> None:
        """Do nothing."""

    def saved(self, path: Path) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""
