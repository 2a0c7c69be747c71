"""A run: settings, base, data, adapter and folder brought together, trained, and written down.

`train_run` is what `onebase train` does. Everything that can be wrong is checked before the first step, in the order
of its cost: the folder, the settings of a resumed run, the model, the targets, the rows, memory and disk.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import onebase
from onebase.adapters.bank import Adapter, Bank
from onebase.adapters.experts import ExpertsPart
from onebase.adapters.lora import rank_and_alpha
from onebase.adapters.pair import Pair, scaling_of
from onebase.base import memory
from onebase.base.device import use_threads
from onebase.base.model import load
from onebase.config.methods import Bottleneck, Lora
from onebase.config.reading import read_settings
from onebase.config.settings import Settings, TrainSettings
from onebase.config.writing import diff_settings, dump_settings
from onebase.data.examples import Examples
from onebase.errors import CapacityError, ConfigError, FileFormatError, ResumeError, list_problems
from onebase.files.atomic import ensure_writable
from onebase.files.checkpoint import Checkpoint
from onebase.files.peft_format import read_adapter
from onebase.files.result import Result, read_result
from onebase.files.run_folder import RunFolder, run_bytes
from onebase.measure.evaluate import EVALUATION_TOKENS
from onebase.ops import bits, native
from onebase.ops.objective import objectives_of
from onebase.train.capacity import fit_budget
from onebase.train.centring import centre_regression_
from onebase.train.data import TrainingData, labels_in, load_data
from onebase.train.loop import Loop, restore_best_
from onebase.train.member import Member
from onebase.train.opening import ADAPTER, fitted
from onebase.train.progress import Plan, Progress, Quiet
from onebase.train.saving import save_run_adapter
from onebase.train.schedule import never_due
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
            _check_same_settings(folder, settings)
            done = read_result(out)
            if done is not None:
                progress.note(f"{out}: the run has finished already; nothing was done.")
                return done
        use_threads(settings.train.threads)
        checkpoint = folder.load_checkpoint() if resume else None
        job, data = prepare(settings, progress)
        member = start(job, folder, checkpoint, progress)
        folder.rewind(member.books.step if checkpoint else None)
        folder.write_config(dump_settings(settings))
        try:
            loop = train_member(job, member, folder, progress, stop or StopRequest())
        finally:
            if member.books.step == 0 and not folder.checkpoints:  # nothing to keep: free for a second try
                folder.config_path.unlink(missing_ok=True)
        adapter_bytes = 0
        try:
            adapter_bytes = save_run_adapter(folder.adapter_path, member, settings, data)
        finally:
            if not adapter_bytes:  # it could not be written: the last steps must not be lost with it
                loop.save()
        result = result_of(job, member, adapter_bytes=adapter_bytes)
        folder.finish(result, keep=settings.train.keep_checkpoints)
        progress.saved(folder.adapter_path)
    return result


def prepare(settings: Settings, progress: Progress) -> tuple[Job, TrainingData]:
    """Return what the settings describe: the adapter on its base, and the rows as examples."""
    base = load(
        settings.model,
        revision=settings.revision,
        dtype=settings.dtype,
        device=settings.device,
        trust_remote_code=settings.trust_remote_code,
        labels=labels_in(settings.data, settings.task),
        quantize=settings.quantize,
    )
    bank = Bank(base)
    adapter = add_adapter(bank, settings)
    data = load_data(settings.data, settings.task, base, adapter.virtual_tokens, settings.eval.slices)
    progress.loaded(data)
    job = Job(
        bank,
        adapter,
        data.train.examples,
        data.valid.examples if data.valid else None,
        settings.train,
        shuffle=settings.data.shuffle,
        evaluation_tokens=settings.eval.batch_tokens,
        settings_sha256=hashlib.sha256(dump_settings(settings).encode()).hexdigest(),
    )
    return job, data


@dataclass(frozen=True)
class Job:
    """What `start` and `train_member` need: one adapter of a bank, its examples and its training settings."""

    bank: Bank
    adapter: Adapter
    train: Examples
    valid: Examples | None
    settings: TrainSettings
    shuffle: bool = True
    evaluation_tokens: int | str = "auto"
    settings_sha256: str = ""
    """Of the whole settings file of a run: a checkpoint goes on under the settings that it was made with."""


def add_adapter(bank: Bank, settings: Settings) -> Adapter:
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
    adapter = bank.add(ADAPTER, settings.adapter, seed=settings.train.seed, tensors=tensors)
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


def _remark_on_loss(job: Job) -> tuple[str, ...]:
    """Return what a user should know of the loss that a job's settings ask for.

    Raises:
        ConfigError: the labels have no such loss.
    """
    asked, labels = job.settings.loss, job.bank.base.labels
    if asked is None or labels is None or job.train.targets is None:
        return ()
    known = objectives_of(labels.problem)
    if asked not in known:
        raise ConfigError(
            f"train.loss: {asked} is no loss for these labels ({labels.problem.replace('_', ' ')}). Write {' or '.join(known)}."
        )
    if asked == known[0]:
        return ()
    return (
        f"train.loss: with {asked} the gradient vanishes where the model is sure and wrong (it has the factor p (1 - p)); "
        f"{known[0]} has p - y there",
    )


def start(job: Job, folder: RunFolder | None, checkpoint: Checkpoint | None, progress: Progress) -> Member:
    """Return the member, restored from the checkpoint if there is one, with memory and disk tried; announce the plan."""
    identity = identity_of(job)
    _remark_on_loss(job)  # a loss that these labels cannot have is told before anything is tried
    if checkpoint is None:
        budget = _fit(job, job.settings.micro_batch_tokens)
    else:
        _check_identity(checkpoint, identity, progress)
        budget = _budget_of_before(job, int(checkpoint.state["micro_batch_tokens"]))
    if checkpoint is None:
        centre_regression_(job.bank.base, job.adapter, job.train)
    member = Member(job.bank, job.adapter, job.train, job.settings, shuffle=job.shuffle, budget=budget)
    if checkpoint is not None:
        member.load_state(checkpoint.tensors, checkpoint.state["books"], checkpoint.best)
    if folder is not None:
        parameter_bytes = 4 * job.adapter.parameter_count
        keep_best = job.settings.keep_best and job.valid is not None
        needed = run_bytes(
            parameter_bytes, 2 * parameter_bytes, keep=job.settings.keep_checkpoints, keep_best=keep_best
        )
        ensure_writable(folder.path, needed, writing="the run")
    progress.started(_plan(job, member))
    return member


def _fit(job: Job, wanted: int | str) -> int:
    """Return the tokens of a micro-batch that memory holds; the largest one has then been tried."""
    recompute = job.settings.activation_checkpointing
    with job.bank.learning(job.adapter.name):
        return fit_budget(job.bank, job.adapter.name, job.train, job.settings.batch_size, wanted, recompute=recompute)


def _budget_of_before(job: Job, budget: int) -> int:
    """Return a resumed run's own micro-batch, which decides its bits, if it fits here too.

    Raises:
        CapacityError: less memory is free than where the run was started.
    """
    try:
        return _fit(job, budget)
    except CapacityError as error:
        raise CapacityError(
            f"{error} A resumed run keeps the micro-batches of its start ({budget} tokens): free memory, or start a new "
            "run with another --out."
        ) from error


def train_member(job: Job, member: Member, folder: RunFolder | None, progress: Progress, stop: StopRequest) -> Loop:
    """Train a started member to its end, leave the tensors that are to be kept in its adapter, and return the loop."""
    base = job.bank.base
    tokens = EVALUATION_TOKENS if job.evaluation_tokens == "auto" else int(job.evaluation_tokens)
    state = {"identity": identity_of(job), "micro_batch_tokens": member.budget_tokens}
    loop = Loop(member, valid=job.valid, folder=folder, state=state, progress=progress, evaluation_tokens=tokens)
    learning = job.bank.learning(job.adapter.name)
    with stop.listening(), learning, base.activation_checkpointing(job.settings.activation_checkpointing):
        loop.run(stop)
    restore_best_(member)
    return loop


def identity_of(job: Job) -> dict[str, Any]:
    """Return what must be the same for a resumed run (base, data), and what decides its bits (torch, threads, ...)."""
    return {
        "base_fingerprint": job.bank.base.fingerprint,
        "train_fingerprint": job.train.fingerprint,
        "valid_fingerprint": None if job.valid is None else job.valid.fingerprint,
        "classes": None if job.bank.base.labels is None else list(job.bank.base.labels.names),
        "settings_sha256": job.settings_sha256,
        "dtype": str(job.bank.base.dtype).removeprefix("torch."),
        "quantize": job.bank.base.quantize,
        **({"bitsandbytes": version("bitsandbytes")} if job.bank.base.quantize == "nf4" else {}),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "threads": torch.get_num_threads(),
        "instruction_set": bits.instruction_set(),
        "products": bits.products_mode(),
        "kernels": "compiled" if native.in_use() else "torch",
        "device": job.bank.base.device.type,
        "onebase": onebase.__version__,
    }


def result_of(job: Job, member: Member, *, adapter_bytes: int) -> Result:
    """Return the numbers of a finished member."""
    books = member.books
    valid_loss, scores = member.kept_scores
    measured = {f"valid_{name}_before": value for name, value in books.scores_before.items()}
    measured |= {f"valid_{name}": value for name, value in scores.items()}
    return Result(
        steps=books.step,
        examples=books.examples,
        tokens=books.tokens,
        seconds=books.seconds,
        compile_seconds=0.0,
        examples_per_s=books.examples / books.seconds,
        tokens_per_s=books.tokens / books.seconds,
        peak_rss_bytes=memory.peak_rss_bytes(),
        peak_device_bytes=memory.peak_device_bytes(job.bank.base.device),
        optimizer_state_bytes=member.optimizer_bytes,
        train_loss=books.loss_sum / books.labels,
        valid_loss_before=books.valid_loss_before,
        valid_loss=valid_loss,
        best_step=None if member.best is None else books.best_step,
        trainable_parameters=job.adapter.parameter_count,
        total_parameters=job.bank.base.parameter_count + job.adapter.parameter_count,
        adapter_bytes=adapter_bytes,
        base_fingerprint=job.bank.base.fingerprint,
        more=measured,
    )


def _plan(job: Job, member: Member) -> Plan:
    count = job.adapter.parameter_count
    return Plan(
        model=job.bank.base.name,
        dtype=job.bank.base.format,
        device=str(job.bank.base.device),
        steps=member.schedule.total_steps,
        first_step=member.books.step,
        examples=len(job.train),
        tokens=job.train.token_count,
        labelled_tokens=job.train.label_count,
        valid_examples=0 if job.valid is None else len(job.valid),
        batch_size=job.settings.batch_size,
        micro_batch_tokens=member.budget_tokens,
        learning_rate=member.schedule.learning_rate,
        warmup_steps=member.schedule.warmup_steps,
        threads=torch.get_num_threads(),
        trainable_parameters=count,
        total_parameters=job.bank.base.parameter_count,
        gradient_bytes=4 * count,
        optimizer_bytes=8 * count,
        adapter_bytes=4 * count,
        layout=job.bank.base.layout_kind,
        warnings=(
            *job.adapter.warnings,
            *_remark_on_speed(job),
            *_remark_on_loss(job),
            *never_due(
                member.schedule.total_steps,
                warmup_steps=member.schedule.warmup_steps,
                eval_every=job.settings.eval_every,
                save_every=job.settings.save_every,
            ),
        ),
    )


def _check_same_settings(folder: RunFolder, settings: Settings) -> None:
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


def _remark_on_speed(job: Job) -> tuple[str, ...]:
    why = job.bank.base.why_not_fused
    cost = "a third" if job.bank.base.quantize == "int8" else "a twentieth"
    return (f"steps take about {cost} longer than they need: {why}.",) if why else ()


_SAME = {
    "base_fingerprint": "the base",
    "train_fingerprint": "the training rows",
    "valid_fingerprint": "the validation rows",
    "classes": "the names of the classes",
    "dtype": "the base's number format",
    "quantize": "how the base's linear layers are held",
    "settings_sha256": "the settings (config.yaml in the run's folder)",
}


def _check_identity(checkpoint: Checkpoint, identity: Mapping[str, Any], progress: Progress) -> None:
    """Raise if base or data are not the run's own; note what may change the bits of the rest."""
    before = {
        "quantize": "none",
        "kernels": "torch",
        **checkpoint.state["identity"],
    }  # checkpoints of earlier versions do not say it
    changed = [words for key, words in _SAME.items() if before.get(key) != identity[key]]
    if changed:
        raise ResumeError(
            f"{checkpoint.path}: these have changed since the run was started: {', '.join(changed)}. Restore them, or "
            "start a new run with another --out."
        )
    differ = [f"{key} was {before.get(key)}, is {now}" for key, now in identity.items() if before.get(key) != now]
    if differ:
        progress.note(f"resumed elsewhere ({'; '.join(differ)}): the result may differ in its last bits.")
