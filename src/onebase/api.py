"""The Python front door: what `import onebase as ob` offers, small and typed. Nothing here computes.

base = ob.load("smollm2-135m-instruct")
bank = ob.Bank(base)
bank.add("math", ob.Lora(r=16, lora_alpha=32))
result = ob.train(bank, {"math": ob.Job(data=rows, learning_rate=2e-4, epochs=1)})
print(ob.evaluate(bank, "math", test_rows))
bank.save("math", "adapters/math")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from onebase.adapters.bank import Adapter
from onebase.adapters.bank import Bank as RoutedBank
from onebase.base import pretrained
from onebase.base.device import use_threads
from onebase.base.model import Base, load
from onebase.config.labels import Labels
from onebase.config.methods import (
    METHODS,
    AdapterSettings,
    BitFit,
    Bottleneck,
    Full,
    Ia3,
    LnTuning,
    Lora,
    PrefixTuning,
    PromptTuning,
)
from onebase.config.paths import checked_path
from onebase.config.settings import DataSettings, TrainSettings
from onebase.errors import ConfigError
from onebase.files.peft_format import read_adapter
from onebase.files.result import Result
from onebase.measure.evaluate import Scores
from onebase.measure.judge import TaskScores, score
from onebase.train import job as jobs
from onebase.train import opening, saving
from onebase.train.data import TrainingData, load_rows
from onebase.train.progress import Progress, Quiet
from onebase.train.stop import StopRequest

__all__ = [
    "Adapter", "AdapterSettings", "Bank", "Base", "BitFit", "Bottleneck", "Full", "Ia3", "Job", "Labels", "LnTuning",
    "Lora", "PrefixTuning", "PromptTuning", "Result", "Scores", "TaskScores", "evaluate", "load", "model_path", "train",
]  # fmt: skip

Rows = str | Path | Sequence[Mapping[str, Any]]
_EVALUATE = ("eval_every", "early_stopping_patience", "keep_best")


class Bank:
    """Adapters on one base, by name. `routed` is the bank of the adapters room, which forwards go through."""

    def __init__(self, base: Base) -> None:
        self.base = base
        self.routed = RoutedBank(base)
        self._readings: dict[str, tuple[DataSettings, str]] = {}
        self._learned: dict[str, saving.Learned] = {}

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters by name."""
        return self.routed.adapters

    def add(self, name: str, settings: AdapterSettings | None = None, *, seed: int = 0) -> Adapter:
        """Put a new adapter on the base; without settings it is LoRA with its defaults.

        Raises:
            ConfigError: the name is taken, or settings or seed are none.
            TargetError: the settings name a module that is not there.
        """
        chosen: Any = Lora() if settings is None else settings  # callers need not heed types
        number: Any = seed
        if not isinstance(chosen, AdapterSettings):
            kinds = ", ".join(f"ob.{kind.__name__}(...)" for kind in METHODS.values())
            raise ConfigError(f"adapter {name!r}: the settings must be one of {kinds}, got {chosen!r}.")
        if not isinstance(number, int) or isinstance(number, bool):
            raise ConfigError(f"adapter {name!r}: the seed must be a whole number, got {seed!r}.")
        return self.routed.add(name, chosen, seed=number)

    def load(self, name: str, folder: str | Path, *, allow_base_mismatch: bool = False) -> Adapter:
        """Put the adapter in a folder (ours or PEFT's) on the base; its rows are read as they were in training.

        Raises:
            ConfigError: the name is taken, or `folder` is no path.
            FileFormatError: it is damaged, or was trained on another base.
        """
        stored = opening.fitted(
            self.routed, read_adapter(checked_path(folder)), allow_base_mismatch=allow_base_mismatch
        )
        record = stored.record
        seed = 0 if record is None else record.seed or 0
        adapter = self.routed.add(name, stored.settings, seed=seed, tensors=stored.tensors)
        if record is not None:
            template = saving.own_template(self.base, stored.folder)
            self.remember(name, _reading(template=template, **record.extras.get("data", {})), record.task)
        return adapter

    def save(self, name: str, folder: str | Path) -> Path:
        """Write an adapter in PEFT's format, with the tokenizer and a model card, and return its folder.

        Raises:
            ConfigError: no such adapter, or the place cannot be written to.
        """
        if name not in self.adapters:
            raise ConfigError(f"no adapter {name!r} in the bank; it has {', '.join(self.adapters) or 'none'}.")
        path = checked_path(folder)
        settings, task = self.reading_of(name)
        saving.save_whole(path, self.adapters[name], self.base, settings, task, self._learned.get(name))
        return path

    def remove(self, name: str) -> None:
        """Take an adapter off the base."""
        self.routed.remove(name)
        self._readings.pop(name, None)
        self._learned.pop(name, None)

    def remember(self, name: str, reading: DataSettings, task: str, learned: saving.Learned | None = None) -> None:
        """Keep how an adapter's rows are read, so that `evaluate` and `save` treat them alike; and what it learned."""
        self._readings[name] = reading, task
        if learned is not None:
            self._learned[name] = learned

    def reading_of(self, name: str | None) -> tuple[DataSettings, str]:
        """Return (how rows are read, task) of the adapter's job or file; the defaults where it has none."""
        return self._readings.get(name or "") or (_reading(), "chat")


def _reading(**settings: Any) -> DataSettings:
    """Return how rows become examples; where the rows come from is not its business."""
    return DataSettings(**{"train": "rows", **settings})


class Job:
    """What one adapter learns from and how: rows or a path, and the settings of `train:` and `data:` in a file.

    Args:
        data, valid: a path, or rows as mappings.
        task: "chat", "text", "classify" or "regress"; the last two need a base that was loaded with `labels`.
        reading: how rows become examples: max_length, columns, labels, system, template, on_bad_row, shuffle.
        settings: what stands under `train:`, without checkpoints: learning_rate, epochs, batch_size, ...

    Raises:
        ConfigError: a setting is wrong.
    """

    def __init__(
        self,
        data: Rows,
        *,
        valid: Rows | None = None,
        task: str = "chat",
        reading: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        reading = reading or {}
        for given, names, why in (
            (reading, ("train", "valid", "test"), "a job's rows are data=ROWS and valid=ROWS. Remove it from reading."),
            (settings, ("save_every", "keep_checkpoints"), "a job has no run's folder for checkpoints. Remove it."),
            ({} if valid is not None else settings, _EVALUATE, "rows to evaluate on are needed. Give valid=ROWS."),
        ):
            found = [name for name in names if given.get(name)]
            if found:
                raise ConfigError(f"{' and '.join(found)}: {why}")
        self.data, self.valid, self.task = data, valid, task
        self.reading = _reading(**reading)
        self.settings = TrainSettings(**settings)


def train(bank: Bank, jobs: Mapping[str, Job], *, progress: Progress | None = None) -> Result | dict[str, Result]:
    """Train adapters of the bank, one after the other, and return the result of the one job, or those of all by name.

    Raises:
        ConfigError: a job names no adapter of the bank.
        DataError: rows that cannot be used.
        TrainingError: a loss or gradient that is not finite.
    """
    unknown = [name for name in jobs if name not in bank.adapters]
    if unknown or not jobs:
        raise ConfigError(
            f"jobs must name adapters of the bank ({', '.join(bank.adapters) or 'it has none'}), got {list(jobs)}."
        )
    results = {name: _train_one(bank, name, job, progress or Quiet()) for name, job in jobs.items()}
    return next(iter(results.values())) if len(results) == 1 else results


def _train_one(bank: Bank, name: str, job: Job, progress: Progress) -> Result:
    base = bank.base
    use_threads(job.settings.threads)
    virtual = bank.adapters[name].virtual_tokens
    rows = load_rows(job.data, job.reading, job.task, base, virtual)
    valid = None if job.valid is None else load_rows(job.valid, job.reading, job.task, base, virtual)
    bank.remember(name, job.reading, job.task)
    held_out = None if valid is None else valid.examples
    whole = jobs.Job(bank.routed, bank.adapters[name], rows.examples, held_out, job.settings, job.reading.shuffle)
    member = jobs.start(whole, None, None, progress)
    jobs.train_member(whole, member, None, progress, StopRequest())
    bank.remember(name, job.reading, job.task, saving.learned_by(member, TrainingData(rows, valid)))
    return jobs.result_of(whole, member, adapter_bytes=4 * member.adapter.parameter_count)


def evaluate(bank: Bank, name: str | None, rows: Rows) -> Scores | TaskScores:
    """Return the scores of an adapter (None: of the base alone) on rows or a file: of tokens, or of whole examples.

    Raises:
        DataError: rows that cannot be used.
    """
    reading, task = bank.reading_of(name)
    examples = load_rows(rows, reading, task, bank.base, len(bank.routed.virtual_ids(name))).examples
    return score(bank.routed, name, examples)


def model_path(name: str, *, revision: str | None = None) -> Path:
    """Return the folder of a model that transformers can open, after fetching it if need be.

    Raises:
        ModelError: there is no such model.
    """
    return pretrained.locate(name, revision=revision).folder
