"""Opening an adapter with the base it belongs to: by its own record, checked against the base's fingerprint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from onebase.adapters.bank import Adapter, Bank
from onebase.adapters.layer import frozen_module
from onebase.base import pretrained
from onebase.base.model import Base, load
from onebase.errors import FileFormatError, ModelError
from onebase.files.peft_format import StoredAdapter, read_adapter

ADAPTER = "adapter"


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
        device=device,
        trust_remote_code=trust_remote_code,
    )
    return OpenedAdapter(*put_on(base, stored, allow_base_mismatch=allow_base_mismatch), stored)


def put_on(base: Base, stored: StoredAdapter, *, allow_base_mismatch: bool = False) -> tuple[Bank, Adapter]:
    """Put a stored adapter on a base, in a bank of its own.

    Raises:
        FileFormatError: it was trained on another base, unless `allow_base_mismatch`; or its tensors do not fit.
    """
    check_base(base, stored, allow_base_mismatch=allow_base_mismatch)
    stored = with_present_paths(base, stored)
    bank = Bank(base)
    seed = None if stored.record is None else stored.record.seed
    return bank, bank.add(ADAPTER, stored.settings, seed=seed or 0, tensors=stored.tensors)


def with_present_paths(base: Base, stored: StoredAdapter) -> StoredAdapter:
    """Return an adapter with its modules under the paths that they have in this base.

    transformers 5 renamed parts of some models; an adapter from before names them as they were called then.
    """
    there = {name.replace(".base_layer", "") for name, _ in base.model.named_modules()}
    kept = tuple(getattr(stored.settings, "modules_to_save", None) or ())
    moved = {path: pretrained.renamed_path(base.model, path) for path in (*stored.module_paths, *kept)}
    moved = {old: new for old, new in moved.items() if old not in there and new in there and new != old}
    if not moved:
        return stored
    own = {name: getattr(stored.settings, name, None) for name in ("target_modules", "modules_to_save")}
    update = {name: [moved.get(path, path) for path in paths] for name, paths in own.items() if isinstance(paths, list)}
    return replace(
        stored,
        settings=stored.settings.model_copy(update=update),
        tensors={_moved(name, moved): tensor for name, tensor in stored.tensors.items()},
        module_paths=tuple(moved.get(path, path) for path in stored.module_paths),
    )


def _moved(name: str, moved: Mapping[str, str]) -> str:
    """Return a tensor's name with the path that it begins with replaced."""
    old = next((path for path in moved if name.startswith(f"{path}.")), None)
    return name if old is None else moved[old] + name.removeprefix(old)


def check_base(base: Base, stored: StoredAdapter, *, allow_base_mismatch: bool) -> None:
    """Raise if an adapter was trained on other weights than the base's; one that does not say fits any.

    Raises:
        FileFormatError: the fingerprints differ, unless `allow_base_mismatch`.
    """
    _check_copies(base, stored)
    record = stored.record
    if record is None or record.base_fingerprint in (None, base.fingerprint) or allow_base_mismatch:
        return
    raise FileFormatError(
        f"{stored.folder}: the adapter was trained on {record.base} with weights {str(record.base_fingerprint)[:12]}, "
        f"but {base.name} has weights {base.fingerprint[:12]}. Open it on its own base (--model), or pass "
        "--allow-base-mismatch if the difference is meant."
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
