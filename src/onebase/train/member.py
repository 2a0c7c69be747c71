"""A member of a training: one adapter with its own rows, optimiser, schedule and books.

A member's step depends on nothing but itself: its batch on (seed, epoch), its dropout on (seed, step, example,
position, target), its losses on its own labels. So a member can stop and go on, alone or beside others, to the bit.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from onebase.adapters.bank import Adapter, Bank
from onebase.config.settings import TrainSettings
from onebase.data.batches import batch_of_step, steps_per_epoch
from onebase.data.examples import Examples
from onebase.measure.forward import batches_of, forward_loss
from onebase.train import checks
from onebase.train.progress import StepRecord
from onebase.train.rates import parameter_groups
from onebase.train.schedule import Schedule, total_steps_of, warmup_of
from onebase.train.step_parts import BATCHING, HEAD, part_range

_MOVED_BY = 3


@dataclass
class Books:
    """What a member has done so far; saved with every checkpoint, so that a resumed run adds up.

    `tokens` are those of the examples, however often a prefix was computed; virtual ones belong to the adapter.
    """

    step: int = 0
    examples: int = 0
    tokens: int = 0
    labels: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    valid_loss_before: float | None = None
    last_valid_loss: float | None = None
    best_loss: float | None = None
    scores_before: dict[str, float] = field(default_factory=dict)
    """What the task measures beside the loss, where it is a finite number; so with the others."""
    last_scores: dict[str, float] = field(default_factory=dict)
    best_scores: dict[str, float] = field(default_factory=dict)
    best_step: int | None = None
    evaluations_without_gain: int = 0


class Member:
    """One adapter in training. `run_step` does the next step; `state` and `load_state` are its checkpoint."""

    def __init__(
        self, bank: Bank, adapter: Adapter, examples: Examples, settings: TrainSettings, *, shuffle: bool, budget: int
    ) -> None:
        self.bank, self.adapter, self.examples, self.settings = bank, adapter, examples, settings
        self.shuffle, self.budget_tokens = shuffle, budget
        per_epoch = steps_per_epoch(len(examples), settings.batch_size)
        total = total_steps_of(per_epoch, settings.epochs, settings.steps)
        learning_rate = settings.learning_rate or adapter.settings.usual_learning_rate
        self.schedule = Schedule(
            kind=settings.lr_scheduler_type,
            learning_rate=learning_rate,
            total_steps=total,
            warmup_steps=warmup_of(total, settings.warmup_steps, settings.warmup_ratio),
            step_size=settings.lr_step_size or 0,
            step_gamma=settings.lr_step_gamma,
        )
        self.parameters = [parameter for _, parameter in adapter.parameters()]
        self.optimizer = torch.optim.AdamW(
            parameter_groups(adapter.settings, adapter.parameters(), learning_rate),
            betas=(settings.adam_beta1, settings.adam_beta2),
            eps=settings.adam_epsilon,
            weight_decay=settings.weight_decay,
            fused=bank.base.device.type in ("cpu", "cuda", "mps"),
        )
        self.books = Books()
        self.best: dict[str, Tensor] | None = None
        self._initial = {name: tensor.clone() for name, tensor in adapter.state.items()}

    @property
    def finished(self) -> bool:
        """Whether all steps are done."""
        return self.books.step >= self.schedule.total_steps

    def run_step(self) -> StepRecord:
        """Do the next optimiser step and return what came of it.

        Raises:
            TrainingError: a loss or gradient is not finite; the adapter is then as it was before the step.
        """
        began = time.perf_counter()
        step, settings = self.books.step, self.settings
        with part_range(BATCHING):
            numbers = batch_of_step(len(self.examples), step, settings.batch_size, settings.seed, self.shuffle).tolist()
            batches = list(batches_of(self.bank, self.adapter.name, self.examples, numbers, self.budget_tokens))
        labels = sum(batch.label_count for batch in batches)
        loss_sum = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            with part_range(HEAD):
                total, rows = forward_loss(self.bank, batch, 1 / labels, dropout_step=step, objective=settings.loss)
                checks.check_losses(rows, batch, self.examples, step + 1)
            total.backward()  # type: ignore[no-untyped-call]
            loss_sum += float(rows.loss.double().sum())
        if step == 0:
            checks.check_gradients(self.adapter)
        norm = self._clip()
        checks.check_grad_norm(norm, step + 1)
        rate = self.schedule.at(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["ratio"]
        self.optimizer.step()
        record = StepRecord(
            step=step + 1,
            loss=loss_sum / labels,
            learning_rate=rate,
            grad_norm=norm,
            examples=len(numbers),
            tokens=int(self.examples.lengths[numbers].sum()),
            labelled_tokens=labels,
            seconds=time.perf_counter() - began,
        )
        self._enter(record, loss_sum)
        return record

    def check_moved(self) -> None:
        """Raise if, after the third step, a tensor is still what it was before the first.

        Raises:
            TrainingError: the tensors that did not move.
        """
        if self.books.step == _MOVED_BY:
            checks.check_moved(self.adapter, self._initial)

    def _clip(self) -> float:
        """Clip the gradients to max_grad_norm and return their norm before."""
        limit = self.settings.max_grad_norm or float("inf")
        return float(torch.nn.utils.clip_grad_norm_(self.parameters, limit))

    def _enter(self, record: StepRecord, loss_sum: float) -> None:
        books = self.books
        books.step = record.step
        books.examples += record.examples
        books.tokens += record.tokens
        books.labels += record.labelled_tokens
        books.loss_sum += loss_sum
        books.seconds += record.seconds

    def note_validation(self, loss: float, scores: Mapping[str, float]) -> None:
        """Enter a validation's loss and other scores; keep the tensors if the loss is the lowest so far and they are to be."""
        books = self.books
        books.last_valid_loss, books.last_scores = loss, dict(scores)
        if books.best_loss is None or loss < books.best_loss:
            books.best_loss, books.best_step, books.evaluations_without_gain = loss, books.step, 0
            books.best_scores = dict(scores)
            if self.settings.keep_best:
                self.best = {name: tensor.clone() for name, tensor in self.adapter.state.items()}
        else:
            books.evaluations_without_gain += 1

    def optimizer_state(self) -> dict[str, Tensor]:
        """Return the optimiser's tensors by the name of what they belong to."""
        state = {}
        for name, parameter in self.adapter.parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                state[f"{name}/{key}"] = value
        return state

    @property
    def kept_scores(self) -> tuple[float | None, Mapping[str, float]]:
        """The validation loss and the other scores of the tensors that the run keeps: the best ones, or the last."""
        books = self.books
        best = self.best is not None
        return (books.best_loss, books.best_scores) if best else (books.last_valid_loss, books.last_scores)

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of the optimiser's state: AdamW keeps two numbers a trained number, and a count a tensor."""
        held = self.optimizer_state().values()
        return sum(t.numel() * t.element_size() for t in held) or 8 * self.adapter.parameter_count

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors (the adapter's, and the optimiser's under NAME/KEY) and the books of a checkpoint."""
        return {**self.adapter.state, **self.optimizer_state()}, asdict(self.books)

    def load_state(
        self, tensors: Mapping[str, Tensor], books: Mapping[str, Any], best: Mapping[str, Tensor] | None
    ) -> None:
        """Go on from a checkpoint's tensors and books."""
        self.adapter.load_state_({name: tensor for name, tensor in tensors.items() if "/" not in name})
        for name, parameter in self.adapter.parameters():
            keys = {key.rpartition("/")[2]: key for key in tensors if key.startswith(f"{name}/")}
            if keys:
                self.optimizer.state[parameter] = {short: _laid_as(parameter, tensors[k]) for short, k in keys.items()}
        self.books = Books(**books)
        self.best = None if best is None else dict(best)


def _laid_as(parameter: Tensor, tensor: Tensor) -> Tensor:
    """Return a tensor of the optimiser on the parameter's device, laid out in memory as the parameter is.

    The fused AdamW goes through both as they lie, whatever their strides say; a file has everything row by row.
    """
    if tensor.shape != parameter.shape:  # the count of steps
        return tensor.to(parameter.device)
    return torch.empty_like(parameter, dtype=tensor.dtype).copy_(tensor)
