"""Checkpoints: everything a run needs to go on exactly, as safetensors and JSON in one folder for each.

    checkpoints/step-00000100/
        tensors.safetensors    the trained tensors and the optimiser's
        best.safetensors       those of the best step so far, where a run keeps them
        state.json             everything that is no tensor
        manifest.json          the step, and size and SHA-256 of the files above

A checkpoint appears whole or not at all, and every byte is checked when it is read. What the names and the state mean
is the business of `train`. Costs a hash of every file, about 1 s a GB.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.errors import FileFormatError
from onebase.files.atomic import new_folder, remove_folder, write_synced
from onebase.files.json_file import check_fields, check_schema, is_int, read_json, to_json
from onebase.files.tensor_file import parse_tensors, write_tensors

if TYPE_CHECKING:
    from torch import Tensor

TENSORS_NAME = "tensors.safetensors"
BEST_NAME = "best.safetensors"
STATE_NAME = "state.json"
MANIFEST_NAME = "manifest.json"
_SCHEMA_VERSION = 1
_FOLDER = re.compile(r"step-(\d{8,})")
_RULES = {
    "files": (lambda value: isinstance(value, dict) and TENSORS_NAME in value and STATE_NAME in value, "the files"),
    "step": (lambda value: is_int(value) and value >= 0, "a whole number from 0"),
}


@dataclass(frozen=True)
class Checkpoint:
    """What was saved after `step` optimiser steps. `best` is None where the run keeps no best tensors."""

    path: Path
    step: int
    tensors: dict[str, Tensor]
    state: dict[str, Any]
    best: dict[str, Tensor] | None


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    best: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write the checkpoint of `step` into the folder of checkpoints and return its own folder.

    `state` must be JSON; its numbers come back exactly. Nothing older is deleted here: see `prune_checkpoints`.

    Raises:
        CapacityError, ConfigError: the disk is full, the place cannot be written to; older checkpoints are untouched.
    """
    target = folder / f"step-{step:08d}"
    older = list_checkpoints(folder)
    kept = f"The run can go on from {older[-1]}." if older else "There is no earlier checkpoint."
    with new_folder(target, writing=f"the checkpoint of step {step}", kept=kept) as new:
        files = {TENSORS_NAME: write_tensors(new / TENSORS_NAME, tensors)}
        if best is not None:
            files[BEST_NAME] = write_tensors(new / BEST_NAME, best)
        text = to_json(state).encode()
        write_synced(new / STATE_NAME, text)
        files[STATE_NAME] = (len(text), hashlib.sha256(text).hexdigest())
        sums = {name: {"bytes": size, "sha256": digest} for name, (size, digest) in files.items()}
        write_synced(new / MANIFEST_NAME, to_json({"schema_version": _SCHEMA_VERSION, "step": step, "files": sums}))
    return target


def load_checkpoint(path: Path) -> Checkpoint:
    """Return the checkpoint in a folder; every file is compared with the manifest first.

    Raises:
        FileFormatError: a file is missing or differs from what was written; the message says how to go on.
    """
    todo = _way_on(path)
    manifest = read_json(path / MANIFEST_NAME, todo=todo)
    check_schema(path / MANIFEST_NAME, manifest, known=_SCHEMA_VERSION, todo=todo)
    check_fields(path / MANIFEST_NAME, manifest, _RULES, todo=todo)
    if step_of(path) != manifest["step"]:
        raise FileFormatError(f"{path}: the manifest is that of step {manifest['step']}. {todo}")
    data = {name: _checked(path / name, sums, todo) for name, sums in manifest["files"].items()}
    return Checkpoint(
        path=path,
        step=manifest["step"],
        tensors=parse_tensors(path / TENSORS_NAME, data[TENSORS_NAME], todo=todo),
        state=read_json(path / STATE_NAME, todo=todo),
        best=parse_tensors(path / BEST_NAME, data[BEST_NAME], todo=todo) if BEST_NAME in data else None,
    )


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints' folders, oldest first; none if there is no such folder."""
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=step_of)


def prune_checkpoints(folder: Path, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints; call it when the newest is complete."""
    assert keep >= 1, "the newest checkpoint is what a run goes on from"
    for path in list_checkpoints(folder)[:-keep]:
        remove_folder(path)


def step_of(path: Path) -> int:
    """Return the step in the name of a checkpoint's folder."""
    found = _FOLDER.fullmatch(path.name)
    assert found is not None, f"{path} is no checkpoint's folder"
    return int(found[1])


def _checked(path: Path, sums: Any, todo: str) -> bytes:
    """Return the bytes of a file that are those the manifest tells of."""
    try:
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise FileFormatError(f"{path}: the file is missing. {todo}") from error
    if not isinstance(sums, dict) or (len(data), hashlib.sha256(data).hexdigest()) != (
        sums.get("bytes"),
        sums.get("sha256"),
    ):
        raise FileFormatError(f"{path}: damaged: its {len(data)} bytes are not those that were written. {todo}")
    return data


def _way_on(path: Path) -> str:
    """Return how a run goes on without this checkpoint."""
    older = [other for other in list_checkpoints(path.parent) if step_of(other) < step_of(path)]
    goes_on = f"from step {step_of(older[-1])}" if older else "from the start"
    return f"To go on {goes_on} delete the folder {path} and resume again."
