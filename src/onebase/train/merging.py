"""One adapter merged into a plain model folder that is known to do what adapter and base do together.

    plan    whether it can be merged, whether memory and disk hold it
    merge   every adapted module in fp32; each must do, on real rows, what it does beside the base
    write   the weights, rounded once to the format they are stored in, to a hidden name
    verify  the folder is opened by transformers as anybody would: every tensor is, bit for bit, that of the compared
            module, or of the base, rounded once; and the results on real rows are the unmerged ones, within what the
            format can hold
    name    only then is the folder there

The modules are compared before they are rounded: so a small adapter that is merged wrongly is found in any format, where
after rounding to bfloat16 the error would be lost in that of the format. Called by `onebase merge` and verifying.py.
The modules in fp32 are not kept so long: hashes of what they round to are. Cost: the base, the merged tensors and the
reloaded model in memory at once; in time, reading, writing and twice hashing the weights, and four forwards of some rows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from onebase.adapters.bank import Adapter, Bank
from onebase.adapters.merging import check_mergeable, merged_modules, merged_state, plain_state, stored_as
from onebase.base import memory
from onebase.base.fingerprint import tensor_sha256
from onebase.base.nf4 import weight_count
from onebase.base.place import ModelPlace
from onebase.base.pretrained import open_pretrained
from onebase.base.writing import plain_model, sentence_files, write_model
from onebase.errors import ConfigError, VerificationError, list_problems
from onebase.files.atomic import ensure_writable, new_folder
from onebase.files.peft_format import read_adapter
from onebase.train.comparing import (
    Apart,
    Differences,
    Inputs,
    compare_modules,
    compare_results,
    gives_numbers,
    inputs_for,
    listed,
    worst_of,
)
from onebase.train.opening import fitted

TEXTS = (
    "The quick brown fox jumps over the lazy dog.",
    "In 1687 Newton published three laws of motion, and 3.14159 is not quite pi.",
    "Question: what is a noun?\nAnswer: a word that names a person, a place, a thing or an idea.",
    "def add(a, b):\n    return a + b\n",
)
"""What is compared on where there are no rows."""

MOST_TOKENS = 256
"""Tokens of a row that are compared on: the logits of so many take 50 MB, for a vocabulary of 50,000."""

_AGAIN = "loaded-again"
_OTHER_FILES_BYTES = 64 * 2**20  # a tokenizer and its vocabulary, generously


@dataclass(frozen=True)
class Merge:
    """What became of a merge."""

    folder: Path
    dtype: str
    size_bytes: int
    modules: int
    """Modules that the adapter is on."""
    untied: bool
    """Whether the base's tied embedding and head have become two weights."""
    differences: Differences
    rows: int
    merge_seconds: float
    """Computing and writing the weights."""
    load_seconds: float
    """Opening the written folder."""


def merge(
    bank: Bank,
    name: str,
    out: Path,
    inputs: Sequence[Inputs],
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> Merge:
    """Write the model that base and adapter `name` are together to `out`, after verifying it, and return what was found.

    Args:
        inputs: what the verification compares on: see `comparing.inputs_for`.
        dtype: the number format to store in; None: each tensor's own.
        note: takes a line for each thing that takes long.

    Raises:
        ConfigError: `out` is there already, or the adapter cannot be merged; the message says what can be done instead.
        CapacityError: memory or disk do not suffice.
        VerificationError: the written model is not the one it was made from; nothing is left of it.
    """
    check_out(out)
    adapter = bank.adapters[name]
    check_mergeable(adapter)
    _check_room(bank, adapter, out, dtype)
    note("merging in fp32")
    began = time.perf_counter()
    modules = merged_modules(bank, name)
    merge_seconds = time.perf_counter() - began
    note(f"verifying modules on {len(inputs)} rows")
    compared = _modules_verified(bank, name, modules, inputs)
    expected = _rounded(bank, modules, dtype)
    said = sentence_files(bank.base).said
    note(f"writing, {said}" if said else "writing")
    began = time.perf_counter()
    state = merged_state(bank, name, untie=True, dtype=dtype, modules=modules)
    del modules
    twin = plain_model(bank.base.model, state)
    with new_folder(out, writing="the merged model") as folder:
        write_model(twin, folder, bank.base)
        merge_seconds += time.perf_counter() - began
        note(f"verifying the folder on {len(inputs)} rows")
        began = time.perf_counter()
        place = ModelPlace("the merged model", folder, "folder")
        reloaded, *_ = open_pretrained(place, device=str(bank.base.device), trust_remote_code=trust_remote_code)
        load_seconds = time.perf_counter() - began
        _check_tensors(reloaded.state_dict(), state, expected)
        differences = _results_verified(bank, name, reloaded, inputs, compared)
    return Merge(
        folder=out,
        dtype=str(reloaded.dtype).removeprefix("torch."),
        size_bytes=sum(path.stat().st_size for path in out.rglob("*") if path.is_file()),
        modules=len({part.path for part in adapter.parts}),
        untied=is_tied(bank.base.model) and not is_tied(twin),
        differences=differences,
        rows=len(inputs),
        merge_seconds=merge_seconds,
        load_seconds=load_seconds,
    )


def check_out(out: Path) -> None:
    """Raise if a merged model cannot go to `out`, because something is there.

    Raises:
        ConfigError: what to do.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: is there already. Choose another --out.")


def adapter_load_seconds(bank: Bank, folder: Path) -> float:
    """Return how long it takes to read an adapter of the bank's base and put it there, beside what is there already."""
    began = time.perf_counter()
    stored = fitted(bank, read_adapter(folder), allow_base_mismatch=True)
    bank.add(_AGAIN, stored.settings, tensors=stored.tensors)
    seconds = time.perf_counter() - began
    bank.remove(_AGAIN)
    return seconds


def rows_for(bank: Bank, sequences: Sequence[Sequence[int]]) -> list[Inputs]:
    """Return what a merge is verified on: the first tokens of each row, or of a few texts where there are none.

    Raises:
        ConfigError: there are neither rows nor a tokenizer, or the base takes something else than tokens.
    """
    tokenizer = bank.base.tokenizer
    if not sequences and tokenizer is not None:
        sequences = [tokenizer(text)["input_ids"] for text in TEXTS]
    made = inputs_for(bank, [list(sequence)[:MOST_TOKENS] for sequence in sequences])
    if not made:
        raise ConfigError(
            f"{bank.base.name} has no tokenizer to make rows for the verification with. Give some: --rows"
        )
    return made


def _check_room(bank: Bank, adapter: Adapter, out: Path, dtype: torch.dtype | None) -> None:
    """Raise unless the disk holds the model, and memory the adapted modules in fp32, or the model once more."""
    model, own = bank.base.model, bank.base.dtype
    item = (dtype or own).itemsize
    adapted = sum(weight_count(bank.places.module(path)) for path in {part.path for part in adapter.parts})
    written = item * weight_count(model)
    ensure_writable(out, written + item * adapted + _OTHER_FILES_BYTES, writing="the merged model")
    needed = (
        max(max(4, own.itemsize) * adapted, written) + item * adapted
    )  # fp32 modules first, the reloaded model then
    needed += written if bank.base.quantize == "nf4" else 0  # of which there are no plain weights yet
    memory.check_room_for("merging", needed, "Free some, or merge on a machine with more.")


def _rounded(bank: Bank, modules: Mapping[str, nn.Module], dtype: torch.dtype | None) -> dict[str, str]:
    """Return the hash of every tensor that the merged model is to hold: a module's, or the base's own, rounded once."""
    own = plain_state(bank.base.model)
    merged: dict[str, Tensor] = {}
    for path, module in modules.items():
        for name, tensor in plain_state(module).items():
            key = f"{path}.{name}"
            if key in own and (key not in merged or not torch.equal(own[key].to(tensor.dtype), tensor)):
                merged[key] = tensor
    return {
        key: tensor_sha256(merged.get(key, tensor).to(stored_as(tensor, bank.base.dtype, dtype)))
        for key, tensor in own.items()
    }


def _check_tensors(found: Mapping[str, Tensor], state: Mapping[str, Tensor], expected: Mapping[str, str]) -> None:
    """Raise unless every tensor of the reloaded model has the bits expected; `state` is what was given to be written."""
    problems, damaged = [], False
    for key, hashed in expected.items():
        if key not in found:
            problems.append(f"{key} is missing.")
        elif tensor_sha256(found[key].to(state[key].dtype)) != hashed:
            same = tensor_sha256(state[key]) != hashed  # so it was wrong before it was written
            what = "it was changed after its module was compared" if same else _distance(found[key], state[key])
            problems.append(f"{key} does not hold what was computed: {what}.")
            damaged = damaged or same
    if problems:
        todo = (
            "Ship the adapter as it is, and report this: it is a bug in onebase."
            if damaged
            else "The disk or the file system gave back other bytes, or transformers reads the format differently. Try again."
        )
        raise VerificationError(list_problems("the merged model, written and read again", [*problems, todo], shown=5))


def _distance(one: Tensor, other: Tensor) -> str:
    if one.shape != other.shape:
        return f"shape {tuple(one.shape)}, not {tuple(other.shape)}"
    return f"its numbers differ by up to {float((one.double() - other.double()).abs().max()):.1e}"


def _modules_verified(
    bank: Bank, name: str, modules: Mapping[str, nn.Module], inputs: Sequence[Inputs]
) -> Mapping[str, Apart]:
    """Return how far merged modules are from what they were made from.

    Raises:
        VerificationError: further than rounding explains.
    """
    found = compare_modules(bank, name, modules, inputs)
    path, worst = worst_of(found)
    if worst.value <= worst.bound:
        return found
    if not math.isfinite(worst.value) and not gives_numbers(bank, name, inputs):
        raise VerificationError(
            "merging failed: base and adapter give results that are no numbers (NaN or infinite) on these rows, so a merged "
            "model cannot be compared with them. Nothing was written. The adapter's weights are too large for its base: "
            "train it again with a lower train.learning_rate.",
            found=worst.value,
            bound=worst.bound,
        )
    raise VerificationError(
        f"merging failed: {path} does not do merged what it does beside the base. Most of all modules differ "
        f"{listed(found)} of their output (bound {worst.bound:.0e}). Nothing was written. Ship the adapter as it is, and "
        "report this: it is a bug in onebase.",
        found=worst.value,
        bound=worst.bound,
    )


def _results_verified(
    bank: Bank, name: str, reloaded: Any, inputs: Sequence[Inputs], modules: Mapping[str, Apart]
) -> Differences:
    """Return how far the reloaded model is from what it was made from, with what its modules' comparison found.

    Raises:
        VerificationError: further than the format explains; the modules that differ most, as they were stored.
    """
    found, bound = compare_results(bank, name, reloaded, inputs)
    if found <= bound:
        return Differences(found, bound, modules)
    stored = compare_modules(bank, name, {path: reloaded.get_submodule(path) for path in modules}, inputs)
    raise VerificationError(
        f"the merged model, read again, does not do what base and adapter do: the results differ by {found:.1e} of the "
        f"largest (bound {bound:.0e}); most of all modules differ {listed(stored)} of their output. Nothing was written. "
        "Ship the adapter as it is, or merge into a wider format: --dtype float32",
        found=found,
        bound=bound,
    )


def is_tied(model: Any) -> bool:
    """Return whether a model of transformers has its head tied to its embedding."""
    return bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
