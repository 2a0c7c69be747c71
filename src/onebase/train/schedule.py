"""The learning rate of every step, and how many steps there are.

Steps count from 0. Warm-up gives lr (s + 1) / W, so that the first step is not lost; after it the curves are those of
transformers' schedulers (transformers.optimization, 5.23).
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """A learning rate curve over `total_steps`: `kind` is cosine, linear, constant or step."""

    kind: str
    learning_rate: float
    total_steps: int
    warmup_steps: int
    step_size: int = 0
    step_gamma: float = 0.1

    def at(self, step: int) -> float:
        """Return the learning rate of step `step`, from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        done = step - self.warmup_steps
        progress = done / max(1, self.total_steps - self.warmup_steps)
        if self.kind == "cosine":
            return self.learning_rate * 0.5 * (1 + math.cos(math.pi * progress))
        if self.kind == "linear":
            return self.learning_rate * (1 - progress)
        if self.kind == "step":
            return float(self.learning_rate * self.step_gamma ** (done // self.step_size))
        assert self.kind == "constant", self.kind
        return self.learning_rate


def warmup_of(total_steps: int, warmup_steps: int | None, warmup_ratio: float) -> int:
    """Return the number of warm-up steps: as given, or the ratio of the total, rounded up."""
    return math.ceil(total_steps * warmup_ratio) if warmup_steps is None else warmup_steps


def total_steps_of(per_epoch: int, epochs: float, steps: int | None) -> int:
    """Return the number of optimiser steps: as given, or the epochs', rounded up (1.1 epochs of 100 steps are 110)."""
    return max(1, math.ceil(round(per_epoch * epochs, 6))) if steps is None else steps


def never_due(
    total_steps: int, *, warmup_steps: int | None, eval_every: int | None, save_every: int | None
) -> tuple[str, ...]:
    """Return a line for each setting that names a step beyond the last one, so that it never has its effect."""
    there = f"but the training has {total_steps:,} step{'' if total_steps == 1 else 's'}"
    what = (
        ("warmup_steps", warmup_steps, "the learning rate never reaches its full value"),
        ("eval_every", eval_every, "data.valid is measured before the first step and after the last alone"),
        ("save_every", save_every, "no checkpoint is written unless it is interrupted"),
    )
    return tuple(
        f"train.{name} is {steps:,}, {there}: {effect}"
        for name, steps, effect in what
        if steps is not None and steps > total_steps
    )
