"""A job: one adapter of a bank, its examples and its training settings; started, trained, and what came of it.

What a checkpoint must have been made of to go on from it is its identity. Settings files and run folders are run.py's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

import onebase
from onebase.adapters.bank import Adapter, Bank
from onebase.base import memory
from onebase.config.settings import TrainSettings
from onebase.data.examples import Examples
from onebase.errors import CapacityError, ConfigError, ResumeError
from onebase.files.atomic import ensure_writable
from onebase.files.checkpoint import Checkpoint
from onebase.files.result import Result
from onebase.files.run_folder import RunFolder, run_bytes
from onebase.measure.evaluate import EVALUATION_TOKENS
from onebase.ops import bits, native
from onebase.ops.objective import objectives_of
from onebase.train.capacity import fit_budget
from onebase.train.centring import centre_regression_
from onebase.train.loop import Loop, restore_best_
from onebase.train.member import Member
from onebase.train.progress import Plan, Progress
from onebase.train.schedule import never_due
from onebase.train.stop import StopRequest


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


def train_member(job: Job, member: Member, folder: RunFolder | None, progress: Progress, stop: StopRequest) -> None:
    """Train a started member to its end, and leave the tensors that are to be kept in its adapter."""
    with stop.listening(), learning(job):
        loop_of(job, member, folder, progress).run(stop)
    restore_best_(member)


def loop_of(job: Job, member: Member, folder: RunFolder | None, progress: Progress) -> Loop:
    """Return the loop that trains a started member."""
    tokens = EVALUATION_TOKENS if job.evaluation_tokens == "auto" else int(job.evaluation_tokens)
    state = {"identity": identity_of(job), "micro_batch_tokens": member.budget_tokens}
    return Loop(member, valid=job.valid, folder=folder, state=state, progress=progress, evaluation_tokens=tokens)


@contextmanager
def learning(job: Job) -> Iterator[None]:
    """Let a job's adapter alone learn, its activations recomputed if its settings say so."""
    recompute = job.bank.base.activation_checkpointing(job.settings.activation_checkpointing)
    with job.bank.learning(job.adapter.name), recompute:
        yield


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


def _remark_on_speed(job: Job) -> tuple[str, ...]:
    why = job.bank.base.why_not_fused
    cost = "a half" if job.bank.base.quantize == "int8" else "a fifth"
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
