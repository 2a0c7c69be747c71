"""Opening an adapter with the base it belongs to: by its own record, checked against the base's fingerprint."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from onebase.adapters.bank import Adapter, Bank
from onebase.adapters.layer import frozen_module
from onebase.adapters.matching import for_path, lies_in, matches
from onebase.base import pretrained
from onebase.base.model import Base, load
from onebase.base.quantise import Quantize
from onebase.config.labels import Labels
from onebase.config.methods import AdapterSettings, Lora
from onebase.errors import FileFormatError, ModelError
from onebase.files.peft_format import StoredAdapter, read_adapter
from onebase.train.completeness import check_complete

ADAPTER = "adapter"
_SHOWN_NAMES = 5


@dataclass(frozen=True)
class OpenedAdapter:
    """An adapter in a bank of its own, and the files it came from."""

    bank: Bank
    adapter: Adapter
    stored: StoredAdapter


def open_adapter(
    path: Path,
    *,
    model: str | None = None,
    dtype: str = "auto",
    quantize: Quantize = "none",
    device: str = "auto",
    trust_remote_code: bool = False,
    allow_base_mismatch: bool = False,
    note: Callable[[str], None] = lambda text: None,
) -> OpenedAdapter:
    """Open the adapter in a folder, or in the run folder given, on its base, or on `model`.

    Python code that comes with the base runs only where the caller trusts it: an adapter's files never decide that.

    Raises:
        FileFormatError: the files are not those of an adapter, or of one for another base.
        ModelError: the base cannot be found.
    """
    stored = read_adapter(path)
    for text in stored.notes:
        note(text)
    base = load(
        model or base_name(stored),
        revision=_revision(stored, model),
        dtype=dtype,
        quantize=quantize,
        device=device,
        trust_remote_code=trust_remote_code,
        labels=labels_of(stored),
    )
    return OpenedAdapter(*put_on(base, stored, allow_base_mismatch=allow_base_mismatch), stored)


def labels_of(stored: StoredAdapter) -> Labels | None:
    """Return what an adapter's own head predicts; None without one.

    PEFT's files hold the head and no names: they are then those that transformers gives.
    """
    if stored.record is not None:
        return stored.record.what_is_predicted
    if stored.config.get("task_type") != "SEQ_CLS":
        return None
    heads = [
        tensor
        for name, tensor in stored.tensors.items()
        if re.search(r"(^|\.)(classifier|score)\.(.*\.)?weight$", name)
    ]
    if not heads:
        return None
    count = int(heads[-1].shape[0])
    if count == 1:
        return Labels("regression")
    return Labels("single_label_classification", tuple(f"LABEL_{number}" for number in range(count)))


def put_on(base: Base, stored: StoredAdapter, *, allow_base_mismatch: bool = False) -> tuple[Bank, Adapter]:
    """Put a stored adapter on a base, in a bank of its own.

    Raises:
        FileFormatError: it was trained on another base, unless `allow_base_mismatch`; or its tensors do not fit.
    """
    bank = Bank(base)
    stored = fitted(bank, stored, allow_base_mismatch=allow_base_mismatch)
    seed = None if stored.record is None else stored.record.seed
    return bank, bank.add(ADAPTER, stored.settings, seed=seed or 0, tensors=stored.tensors)


def fitted(bank: Bank, stored: StoredAdapter, *, allow_base_mismatch: bool) -> StoredAdapter:
    """Return a stored adapter as a bank's base names its modules, with everything checked that its files say of the base.

    Raises:
        FileFormatError: it was trained on another base, unless `allow_base_mismatch`; or it lacks tensors.
    """
    stored = with_present_paths(bank.base, stored)
    check_base(bank.base, stored, allow_base_mismatch=allow_base_mismatch)
    check_complete(bank.places, stored)
    return stored


def with_present_paths(base: Base, stored: StoredAdapter) -> StoredAdapter:
    """Return an adapter with its modules under the paths that they have in this base, wherever it names them.

    transformers 5 renamed parts of some models; an adapter from before names them as they were called then.
    """
    there = {name.replace(".base_layer", "") for name, _ in base.model.named_modules()}
    tensors = {**stored.tensors, **stored.base_copies}
    kept = stored.settings.modules_to_save or ()
    named = (*stored.module_paths, *kept, *(name.rpartition(".")[0] for name in tensors))
    gone = dict.fromkeys(plain for path in named if (plain := path.replace(".base_layer", "")) not in there)
    moved = {old: new for old in gone if (new := pretrained.renamed_path(base.model, old)) in there}
    if not moved:
        return stored
    paths = tuple(_moved(path, moved) for path in stored.module_paths)
    return replace(
        stored,
        settings=_present_settings(stored.settings, stored.module_paths, moved),
        tensors={_moved(name, moved): tensor for name, tensor in stored.tensors.items()},
        module_paths=paths,
        base_copies={_moved(name, moved): tensor for name, tensor in stored.base_copies.items()},
    )


def _moved(name: str, moved: Mapping[str, str]) -> str:
    """Return a tensor's or a module's name with the path that it is, or begins with, replaced."""
    old = max((path for path in moved if lies_in(name, path)), key=len, default=None)
    return name if old is None else moved[old] + name.removeprefix(old)


def _present_settings(settings: AdapterSettings, paths: Iterable[str], moved: Mapping[str, str]) -> AdapterSettings:
    """Return settings as they were read from a file, of an adapter on `paths`, with the present names of moved modules."""
    lists = {
        name: getattr(settings, name, None) for name in ("target_modules", "feedforward_modules", "modules_to_save")
    }
    update: dict[str, Any] = {
        name: _present_names(names, moved) for name, names in lists.items() if isinstance(names, list)
    }
    if isinstance(settings, Lora):
        parameters = settings.target_parameters or []
        leaves = {name.rpartition(".")[2] for name in parameters}
        plain = dict.fromkeys(path.replace(".base_layer", "") for path in paths)
        inside = [f"{path}.{leaf}" for path in plain for leaf in leaves]
        every = {path: _moved(path, moved) for path in (*plain, *inside)}
        update |= {
            name: _present_patterns(getattr(settings, name), every) for name in ("rank_pattern", "alpha_pattern")
        }
        if parameters:
            update["target_parameters"] = _present_names(parameters, every)
        if isinstance(rows := settings.trainable_token_indices, dict):
            update["trainable_token_indices"] = {
                new: ids for name, ids in rows.items() for new in _present_names([name], moved)
            }
    return settings.model_copy(update=update)


def _present_names(names: Iterable[str], moved: Mapping[str, str]) -> list[str]:
    """Return names and path ends; those that do not mean a moved module any more become its present path."""
    found: list[str] = []
    for name in names:
        new = [path for old, path in moved.items() if matches(name, old)]
        found += [name] if all(matches(name, path) for path in new) else new
    return [*dict.fromkeys(found)]


def _present_patterns(patterns: Mapping[str, Any], moved: Mapping[str, str]) -> dict[str, Any]:
    """Return patterns that mean for each present path what the given ones mean for the old one, expressions included."""
    keys = {key: key for key in patterns}
    first = {new: for_path(keys, old, None) for old, new in moved.items()}
    if all(for_path(keys, path, None) == key for path, key in first.items()):
        return dict(patterns)
    # whole paths, the longest first: a pattern means what ends like it, too
    return {re.escape(path): patterns[key] for path in sorted(first, key=len, reverse=True) if (key := first[path])}


def check_base(base: Base, stored: StoredAdapter, *, allow_base_mismatch: bool) -> None:
    """Raise if an adapter was trained on other weights than the base's; one that does not say fits any.

    Raises:
        FileFormatError: the fingerprints differ, unless `allow_base_mismatch`.
    """
    _check_labels(base, stored)
    _check_copies(base, stored)
    record = stored.record
    if record is None or record.base_fingerprint in (None, base.fingerprint) or allow_base_mismatch:
        return
    raise FileFormatError(
        f"{stored.folder}: the adapter was trained on {record.base} with weights {str(record.base_fingerprint)[:12]}, "
        f"but {base.name} has weights {base.fingerprint[:12]}. Open it on its own base (--model), or pass "
        "--allow-base-mismatch if the difference is meant."
    )


def _check_labels(base: Base, stored: StoredAdapter) -> None:
    """Raise if an adapter brings a head for other labels than the base is open for.

    Raises:
        FileFormatError: what it predicts, and how to open the base for it.
    """
    if base.layout_kind == "native":
        return  # it is called as it is, with the head that it has
    own = labels_of(stored)
    if stored.record is None and own is not None and base.labels is not None and own.outputs == base.labels.outputs:
        return  # PEFT's files have no names
    if own is not None and own != base.labels:
        setting = f"data.label_names: [{', '.join(own.names)}]" if own.names else "task: regress"
        raise FileFormatError(
            f"{stored.folder}: the adapter brings a head for {_said(own)}, and {base.name} is open for "
            f"{_said(base.labels) if base.labels else 'no labels'}. Open it with the adapter's own, load(name, labels=...) or "
            f"in a settings file {setting}; or start without that adapter (adapter.init_from)."
        )


def _said(labels: Labels) -> str:
    """Return what a head predicts, in words."""
    if not labels.names:
        return "a number"
    names = ", ".join(labels.names[:_SHOWN_NAMES]) + (", ..." if len(labels.names) > _SHOWN_NAMES else "")
    return (
        f"{'any' if labels.problem == 'multi_label_classification' else 'one'} of {len(labels.names)} classes ({names})"
    )


def _check_copies(base: Base, stored: StoredAdapter) -> None:
    """Raise if a weight of the base that PEFT saved with the adapter is not the base's: a part of what was learned.

    Raises:
        FileFormatError: a copy that differs.
    """
    for name, copy in stored.base_copies.items():
        path, _, leaf = name.rpartition(".")
        try:
            own = getattr(frozen_module(base.model, path), leaf)
        except AttributeError:
            own = None
        if own is not None and own.shape == copy.shape and torch.equal(own.detach().cpu(), copy.to(own.dtype)):
            continue
        there = "has none" if own is None else f"has other numbers, {tuple(own.shape)}"
        raise FileFormatError(
            f"{stored.folder}: the file holds {name} {tuple(copy.shape)} beside the adapter, as peft saves an "
            f"embedding that was resized or trained; the base {there}. Open the adapter on the model with that "
            "embedding, or train it with modules_to_save or trainable_token_indices."
        )


def base_name(stored: StoredAdapter) -> str:
    """Return the name of the base an adapter says it was trained on.

    Raises:
        ModelError: it does not say.
    """
    if stored.record is not None:
        folder = stored.config.get("base_model_name_or_path")
        return folder if stored.record.base == "in-memory" and folder else stored.record.base
    name = stored.config.get("base_model_name_or_path")
    if not name:
        raise ModelError(f"{stored.folder}: adapter_config.json names no base_model_name_or_path. Name it: --model")
    return str(name)


def _revision(stored: StoredAdapter, model: str | None) -> str | None:
    if model is not None:
        return None
    return stored.record.base_revision if stored.record is not None else stored.config.get("revision")
