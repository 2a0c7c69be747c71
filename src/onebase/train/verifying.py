"""Proof that an adapter is what it says, on its own base and on real rows: seven checks, each with the difference found.

    loaded = saved               what is in the bank, written again, is the file, tensor by tensor and byte by byte
    merged = unmerged            a plain model with the adapter in its weights, written and opened again (merging.py)
    flat = padded                the path that trains, against the model's own padded forward (measure/padded.py)
    resumed = uninterrupted      a few steps, stopped and gone on with (replaying.py)
    chat = transformers          the token ids of rendered rows, against the saved tokenizer's own chat template
    adapter has an effect        results differ from the base's by more than the format can tell apart
    base unchanged               every byte of its weights, before all of the above and after

Called by `onebase verify`. A check that cannot be made says why; one that fails says where. Nothing stays on the
disk: what a killed one left is deleted by the next.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from onebase.adapters.bank import Bank
from onebase.adapters.merging import plain_state
from onebase.base.fingerprint import tensor_sha256
from onebase.base.pretrained import stored_tokenizer
from onebase.config.settings import DataSettings, TrainSettings
from onebase.data.chat import Renderer
from onebase.data.examples import Examples
from onebase.data.rows import BadRow, Row
from onebase.data.templates import differing_chats
from onebase.errors import ConfigError, DataError, OnebaseError, VerificationError
from onebase.files.atomic import scratch_folder
from onebase.files.peft_format import TENSORS_NAME, read_adapter
from onebase.files.tensor_file import read_tensors
from onebase.measure.padded import flat_and_padded
from onebase.train import saving
from onebase.train.comparing import BOUNDS, numbers_of
from onebase.train.merging import merge, rows_for
from onebase.train.replaying import STEPS, STOPPED_AFTER, differing, largest_distance, replay
from onebase.train.stop import Stopped

State = Literal["ok", "failed", "not applicable"]
_SHOWN = 3
_ELSEWHERE = 1e-4
"""How far a resumed training may be from an uninterrupted one where no bits are promised (GPUs)."""


@dataclass(frozen=True)
class Subject:
    """What is verified: an adapter in a bank, the folder that it came from, and real rows.

    `rows` are those that `examples` were made of; `template` is the chat template of training as text, None: the base's
    own; `train` and `reading` are the run's settings, or the defaults of an adapter without one.
    """

    bank: Bank
    name: str
    folder: Path
    task: str
    rows: Sequence[Row]
    examples: Examples
    train: TrainSettings
    reading: DataSettings
    template: str | None = None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Check:
    """What one check found. `found` may be at most `bound`, or must be above it where `above` is set."""

    name: str
    state: State
    found: float | None
    bound: float | None
    said: str
    above: bool = False
    seconds: float = 0.0


class _NotApplicableError(Exception):
    """The check has no meaning for this adapter; the message says why."""


def verify(subject: Subject, note: Callable[[str], None] = lambda text: None) -> list[Check]:
    """Return what every check found; `note` is told the name of each before it begins.

    Raises:
        Stopped: somebody asked to stop.
    """
    before = _fingerprints(subject.bank)
    done = []
    for name, check in _CHECKS.items():
        note(name)
        began = time.perf_counter()
        done.append(replace(_made(name, check, subject), seconds=time.perf_counter() - began))
    note("base unchanged")
    after = _fingerprints(subject.bank)
    changed = [key for key in before if after.get(key) != before[key]]
    return [*done, _exactly("base unchanged", changed, len(before), "tensors")]


def _made(name: str, check: Callable[[str, Subject], Check], subject: Subject) -> Check:
    """Return what a check found; one that cannot be carried out has failed, unless it has no meaning here."""
    try:
        return check(name, subject)
    except _NotApplicableError as error:
        return Check(name, "not applicable", None, None, str(error))
    except Stopped:
        raise
    except OnebaseError as error:
        return Check(name, "failed", None, None, f"{type(error).__name__}: {error}")


def _loaded_is_saved(name: str, subject: Subject) -> Check:
    saved = read_tensors(subject.folder / TENSORS_NAME, todo="Get it again.")
    bank, copies = subject.bank, read_adapter(subject.folder).base_copies
    with scratch_folder("verify") as place:
        again = place / "adapter"
        saving.write(again, bank.base, bank.adapters[subject.name], task=subject.task)
        loaded = read_tensors(again / TENSORS_NAME, todo="Free some space.")
    saved = {key: tensor for key, tensor in saved.items() if not any(key.endswith(copy) for copy in copies)}
    wide = {key: _widened(tensor, loaded[key].dtype) if key in loaded else tensor for key, tensor in saved.items()}
    return _exactly(name, differing(wide, loaded), len(saved), "tensors")


def _widened(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor in the format that it is held in, where that holds each of its numbers; else as it is."""
    return tensor.to(dtype) if torch.promote_types(tensor.dtype, dtype) == dtype else tensor


def _merged_is_unmerged(name: str, subject: Subject) -> Check:
    if subject.bank.base.quantize == "int8":
        raise _NotApplicableError(
            "layers in 8 bits round what goes into them, so no weights do the same. onebase merge writes into those of "
            "the base's files, and verifies that"
        )
    with scratch_folder("verify") as place:
        inputs = rows_for(subject.bank, _sequences(subject.examples))
        try:
            found = merge(
                subject.bank, subject.name, place / "merged", inputs, trust_remote_code=subject.trust_remote_code
            ).differences
        except VerificationError as error:
            return Check(name, "failed", error.found, error.bound, str(error))
        except ConfigError as error:
            raise _NotApplicableError(str(error)) from error
    path, worst = found.worst
    return Check(name, "ok", found.results, found.results_bound, f"worst layer {path}: {worst.value:.1e}")


def _flat_is_padded(name: str, subject: Subject) -> Check:
    base = subject.bank.base
    if base.layout_kind == "native":
        raise _NotApplicableError(f"{base.name} runs as it is: {base.why_native}")
    if base.head is None and base.labels is None:
        raise _NotApplicableError(f"{base.name} predicts nothing")
    found, bound = flat_and_padded(subject.bank, subject.name, subject.examples), BOUNDS[base.dtype].results
    said = f"{len(subject.examples)} rows, {subject.examples.label_count} predictions"
    return _within(name, found, bound, said if base.layout_kind == "flat" else f"{said}; this base runs padded anyway")


def _resumed_is_uninterrupted(name: str, subject: Subject) -> Check:
    bank, adapter = subject.bank, subject.bank.adapters[subject.name]
    if bank.base.layout_kind == "native":
        raise _NotApplicableError(f"{bank.base.name} is not trained here: {bank.base.why_native}")
    whole, resumed = replay(bank, adapter.settings, adapter.seed, subject.examples, subject.train)
    said = f"{STEPS} steps, stopped after {STOPPED_AFTER}"
    if bank.base.device.type == "cpu":
        check = _exactly(name, differing(whole, resumed), len(whole), "tensors")
        return replace(check, said=f"{said}: {check.said}")
    return _within(name, largest_distance(whole, resumed), _ELSEWHERE, said)


def _chat_is_transformers(name: str, subject: Subject) -> Check:
    if subject.task != "chat":
        raise _NotApplicableError(f"the task is {subject.task}, which renders no chats")
    base, trusted = subject.bank.base, subject.trust_remote_code
    own = base.tokenizer if base.folder is None else stored_tokenizer(base.folder, trust_remote_code=trusted)
    theirs = stored_tokenizer(subject.folder, trust_remote_code=trusted) or own
    renderer = Renderer(own, subject.template)
    try:
        wrong = differing_chats(subject.rows, renderer, theirs, subject.reading.labels, subject.reading.system)
    except BadRow as bad:
        raise DataError(bad.fault.told) from bad
    return _exactly(name, wrong, len(subject.rows), "rows")


@torch.no_grad()
def _has_an_effect(name: str, subject: Subject) -> Check:
    bank, distances, largest = subject.bank, [0.0], [1e-6]
    for given in rows_for(bank, _sequences(subject.examples)):
        results = []
        for owner in (subject.name, None):
            virtual = list(bank.virtual_ids(owner))
            ids = torch.cat([torch.tensor([virtual], dtype=torch.int64), given["input_ids"]], 1) if virtual else None
            more = {} if ids is None else {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            inputs = {key: value.to(bank.base.device) for key, value in {**given, **more}.items()}
            with bank.base.native(bank.sole_route(owner, [0] if virtual else None)) as model:
                numbers = numbers_of(model(**inputs))
            results.append((numbers[:, len(virtual) :] if virtual else numbers).double())
        largest.append(float(results[1].abs().max()))
        distances.append(float((results[0] - results[1]).abs().max()))
    found = float(torch.tensor(distances, dtype=torch.float64).max()) / max(largest)
    bound = torch.finfo(bank.base.dtype).eps
    said = "of the largest result"
    if not found > bound:
        nothing = "it changes nothing: was it trained, and is it the right file?"
        said = nothing if found <= bound else "its results, or the base's, are no numbers"
    return Check(name, "ok" if found > bound else "failed", found, bound, said, above=True)


_CHECKS: dict[str, Callable[[str, Subject], Check]] = {
    "loaded = saved": _loaded_is_saved,
    "merged = unmerged": _merged_is_unmerged,
    "flat = padded": _flat_is_padded,
    "resumed = uninterrupted": _resumed_is_uninterrupted,
    "chat = transformers": _chat_is_transformers,
    "adapter has an effect": _has_an_effect,
}


def _exactly(name: str, wrong: Sequence[str], count: int, what: str) -> Check:
    """Return a check in which none of `count` things may differ."""
    shown = ", ".join(wrong[:_SHOWN]) + (f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else "")
    said = f"{len(wrong)} of {count} {what} differ" + (f": {shown}" if wrong else "")
    return Check(name, "failed" if wrong else "ok", float(len(wrong)), 0.0, said)


def _within(name: str, found: float, bound: float, said: str) -> Check:
    return Check(name, "ok" if found <= bound else "failed", found, bound, said)


def _sequences(examples: Examples) -> list[list[int]]:
    return [examples[i].token_ids.tolist() for i in range(len(examples))]


def _fingerprints(bank: Bank) -> dict[str, str]:
    """Return the SHA-256 of every tensor of the base, as it lies in memory."""
    return {key: tensor_sha256(tensor) for key, tensor in plain_state(bank.base.model).items()}
