"""A run: settings, base, data, adapter and folder brought together, trained, and written down.

`train_run` is what `onebase train` does. Everything that can be wrong is checked before the first step, in the order
of its cost: the folder, the settings of a resumed run, the model, the targets, the rows, memory and disk.
"""

from __future__ import annotations

import hashlib
from contextlib import AbstractContextManager
from pathlib import Path

from onebase.adapters.bank import Adapter, Bank
from onebase.adapters.experts import ExpertsPart
from onebase.adapters.lora import rank_and_alpha
from onebase.adapters.pair import Pair, scaling_of
from onebase.base.device import use_threads
from onebase.base.model import Base, load
from onebase.config.labels import Labels
from onebase.config.methods import Bottleneck, Lora
from onebase.config.reading import read_settings
from onebase.config.settings import Settings
from onebase.config.writing import diff_settings, dump_settings
from onebase.errors import ConfigError, FileFormatError, ResumeError, list_problems
from onebase.files.checkpoint import Checkpoint
from onebase.files.peft_format import read_adapter
from onebase.files.result import Result, read_result
from onebase.files.run_folder import RunFolder
from onebase.train.data import TrainingData, labels_in, load_data
from onebase.train.job import Job, learning, loop_of, result_of, start
from onebase.train.loop import restore_best_
from onebase.train.opening import ADAPTER, fitted
from onebase.train.progress import Progress, Quiet
from onebase.train.saving import save_run_adapter
from onebase.train.stop import StopRequest


def train_run(
    settings: Settings,
    out: Path,
    *,
    resume: bool = False,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
) -> Result:
    """Train the adapter that the settings describe into the run folder `out`, and return the run's numbers.

    With `resume` the run goes on from its newest checkpoint, starts if there is none, and returns the result there is
    if it has finished.

    Raises:
        OnebaseError: whatever is wrong, before the first step where that can be told; see errors.py.
        Stopped: `stop` was asked for; a checkpoint was written.
    """
    progress = progress or Quiet()
    settings = settings.resolved()
    opened = RunFolder.open_for_resume(out) if resume else RunFolder.create(out)
    with opened as folder:
        if resume:
            check_same_settings(folder, settings)
            done = read_result(out)
            if done is not None:
                progress.note(f"{out}: the run has finished already; nothing was done.")
                return done
        use_threads(settings.train.threads)
        checkpoint = folder.load_checkpoint() if resume else None
        job, data = prepare(settings, progress)
        run = Run(settings, folder, job, data, checkpoint, progress)
        try:
            run.train(stop or StopRequest())
        finally:
            run.forget_if_nothing_came_of_it()
        return run.finish()


class Run:
    """A run that was checked and can do its next step; `finish` writes down what came of it."""

    def __init__(
        self, settings: Settings, folder: RunFolder, job: Job, data: TrainingData, checkpoint: Checkpoint | None,
        progress: Progress,
    ) -> None:  # fmt: skip
        self.settings, self.folder, self.job, self.data, self.progress = settings, folder, job, data, progress
        self.member = start(job, folder, checkpoint, progress)
        folder.rewind(self.member.books.step if checkpoint else None)
        folder.write_config(dump_settings(settings))
        self.loop = loop_of(job, self.member, folder, progress)

    def train(self, stop: StopRequest) -> None:
        """Do all steps; the errors are those of `Loop.run`."""
        with stop.listening(), self.learning():
            self.loop.run(stop)

    def learning(self) -> AbstractContextManager[None]:
        """Let the run's adapter alone learn: around every step, and around nothing of another run."""
        return learning(self.job)

    def forget_if_nothing_came_of_it(self) -> None:
        """Free the folder for a second try where no step was done and no checkpoint written."""
        if self.member.books.step == 0 and not self.folder.checkpoints:
            self.folder.config_path.unlink(missing_ok=True)

    def finish(self) -> Result:
        """Leave the tensors that are to be kept in the adapter, write it and the result, and return that."""
        restore_best_(self.member)
        adapter_bytes = 0
        try:
            adapter_bytes = save_run_adapter(self.folder.adapter_path, self.member, self.settings, self.data)
        finally:
            if not adapter_bytes:  # it could not be written: the last steps must not be lost with it
                self.loop.save()
        result = result_of(self.job, self.member, adapter_bytes=adapter_bytes)
        self.folder.finish(result, keep=self.settings.train.keep_checkpoints)
        self.progress.saved(self.folder.adapter_path)
        return result


def prepare(settings: Settings, progress: Progress) -> tuple[Job, TrainingData]:
    """Return what the settings describe: the adapter on its base, and the rows as examples."""
    bank = Bank(open_base(settings, labels_in(settings.data, settings.task)))
    adapter = add_adapter(bank, settings)
    data = load_data(settings.data, settings.task, bank.base, adapter.virtual_tokens, settings.eval.slices)
    progress.loaded(data)
    return job_of(settings, bank, adapter, data), data


def open_base(settings: Settings, labels: Labels | None) -> Base:
    """Open the base that settings name, with a head for the labels."""
    return load(
        settings.model,
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        labels=labels,
        quantize=settings.quantize,
    )


def job_of(settings: Settings, bank: Bank, adapter: Adapter, data: TrainingData) -> Job:
    """Return the training of an adapter that settings describe, on rows that were read."""
    return Job(
        bank,
        adapter,
        data.train.examples,
        data.valid.examples if data.valid else None,
        settings.train,
        shuffle=settings.data.shuffle,
        evaluation_tokens=settings.eval.batch_tokens,
        settings_sha256=hashlib.sha256(dump_settings(settings).encode()).hexdigest(),
    )


def add_adapter(bank: Bank, settings: Settings, name: str = ADAPTER) -> Adapter:
    """Put the adapter that the settings describe on the bank, with the weights of `adapter.init_from` if that is set."""
    source, tensors = settings.adapter.init_from, None
    if source is not None:
        stored = read_adapter(source)
        if stored.record is not None and stored.record.base_fingerprint not in (None, bank.base.fingerprint):
            raise FileFormatError(
                f"adapter.init_from: {source} was trained on {stored.record.base} with weights "
                f"{stored.record.base_fingerprint[:12]}, but {bank.base.name} has weights {bank.base.fingerprint[:12]}. "
                "Set model to its own base, or start without it."
            )
        if type(stored.settings) is not type(settings.adapter):
            raise ConfigError(
                f"adapter.init_from: {source} is an adapter of {stored.settings.method}, these settings are of "
                f"{settings.adapter.method}. Set adapter.method: {stored.settings.method}, or start without it."
            )
        if getattr(settings.adapter, "prefix_projection", False):
            raise ConfigError(
                f"adapter.init_from: {source} holds the keys and values that a projection made, not the projection. "
                "Set adapter.prefix_projection: false to train them further."
            )
        if isinstance(settings.adapter, Bottleneck) and isinstance(stored.settings, Bottleneck):
            own, theirs = settings.adapter.non_linearity, stored.settings.non_linearity
            if own != theirs:
                raise ConfigError(
                    f"adapter.init_from: the weights in {source} were trained with non_linearity {theirs}, these settings "
                    f"have {own}. Set adapter.non_linearity: {theirs}"
                )
        stored = fitted(bank, stored, allow_base_mismatch=True)
        tensors = stored.tensors
    adapter = bank.add(name, settings.adapter, seed=settings.train.seed, tensors=tensors)
    if source is not None and isinstance(stored.settings, Lora):
        _check_same_scaling(adapter, stored.settings, source)
    return adapter


def _check_same_scaling(adapter: Adapter, stored: Lora, source: Path) -> None:
    """Raise if the weights of a warm start were trained under another scaling: they would be another function here."""
    for part in adapter.parts:
        pairs = {part.path: part.scaling} if isinstance(part, Pair) else {}
        if isinstance(part, ExpertsPart):
            pairs = {f"{part.path}.{pair.name}": pair.scaling for pair in part.pairs}
        for path, scaling in pairs.items():
            trained_under = scaling_of(*rank_and_alpha(stored, path), stored.use_rslora)
            if scaling == trained_under:
                continue
            raise ConfigError(
                f"adapter.init_from: the weights in {source} were trained with scaling {trained_under:g} on {path}, these "
                f"settings give {scaling:g}. Set adapter.lora_alpha and use_rslora as they were there "
                f"(lora_alpha: {stored.lora_alpha:g}, use_rslora: {str(stored.use_rslora).lower()})."
            )


def check_same_settings(folder: RunFolder, settings: Settings) -> None:
    """Raise if a run is to be resumed with other settings than it was started with."""
    if folder.config_text() is None:
        return
    changed = diff_settings(read_settings(folder.config_path), settings)
    if changed:
        problems = [f"{name}: was {_given(old)}, is {_given(new)}." for name, old, new in changed]
        text = list_problems(f"resuming {folder.path}: settings differ from those it was started with", problems)
        raise ResumeError(f"{text}\nResume with the run's own file: onebase train {folder.config_path} --out "
                          f"{folder.path} --resume, or start a new run with another --out.")  # fmt: skip


def _given(value: object) -> str:
    return "not set" if value is None else repr(value)
