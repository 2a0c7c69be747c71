"""A merged model as a GGUF file: `export_merged`, with all that is no weight taken from the base's own GGUF file.

Sizes, vocabulary and chat template are copied field by field, so that nothing of them is guessed; the file must be the
base's: the same tensors, and vectors (which no type rounds) with the same numbers. Weights are merged in fp32. The file gets
its name only after every tensor was read again and found within the rounding of its type.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from onebase.adapters.bank import Bank
from onebase.adapters.merging import merged_state, plain_state
from onebase.base.gguf_file import BLOCK, MODEL_TYPES, Family, family_of, read_gguf, rounding, write_model_like
from onebase.errors import ConfigError, VerificationError, list_problems
from onebase.files.atomic import new_file
from onebase.train.merging import is_tied

Tensors = dict[str, NDArray[np.float32]]
_AS_THEY_ARE = ("llama", "qwen2", "qwen3")  # Gemma's norms are stored with 1 added


@dataclass(frozen=True)
class ModelExport:
    """What became of a merged model as GGUF."""

    path: Path
    size_bytes: int
    architecture: str
    tensors: int
    kind: str
    largest_rounding: float
    """The largest difference that the type made, of a number as read again."""


def export_merged(bank: Bank, name: str, like: Path, out: Path, kind: str = "F32") -> ModelExport:
    """Write base and adapter `name` as one model to the file `out`, with the fields of the base's own GGUF file `like`.

    Raises:
        ConfigError: `out` is there, `like` is another model's, or the adapter cannot be merged.
        VerificationError: the file does not hold what was written; nothing is left of it.
    """
    if kind not in MODEL_TYPES:
        raise ConfigError(f"--type: a model's must be one of {', '.join(MODEL_TYPES)}, got {kind}.")
    if out.exists():
        raise ConfigError(f"{out}: is there already. Choose another --out.")
    family = family_of(getattr(bank.base.model, "config", None))
    if family.architecture not in _AS_THEY_ARE:
        raise ConfigError(
            f"{family.architecture}: onebase writes whole models for {', '.join(_AS_THEY_ARE)} only. Merge the adapter "
            "(onebase merge) and convert the folder with llama.cpp's convert_hf_to_gguf.py."
        )
    tied = is_tied(bank.base.model)
    _check_like(like, family, _named(family, plain_state(bank.base.model), tied=tied))
    tensors = _named(family, merged_state(bank, name, dtype=torch.float32), tied=tied)
    odd = [key for key, tensor in tensors.items() if tensor.ndim > 1 and tensor.shape[-1] % BLOCK]
    if kind == "Q8_0" and odd:
        raise ConfigError(f"{odd[0]}: Q8_0 needs rows of a multiple of {BLOCK} numbers. Take --type F16.")
    with new_file(out, writing="the merged model") as hidden:
        write_model_like(hidden, like, tensors, kind)
        difference = _check(hidden, tensors, kind)
    return ModelExport(out, out.stat().st_size, family.architecture, len(tensors), kind, difference)


def _named(family: Family, state: dict[str, Tensor], *, tied: bool) -> Tensors:
    """Return a state dict under llama.cpp's names, in its order of rows; of a tied head and embedding the embedding."""
    tensors: Tensors = {}
    for key, tensor in state.items():
        path, _, leaf = key.rpartition(".")
        name = family.tensor_name(path)
        if name is None or leaf not in ("weight", "bias"):
            raise ConfigError(f"{key}: llama.cpp's {family.architecture} has no such weight.")
        name = name.removesuffix("weight") + leaf
        if not (tied and name == "output.weight"):
            tensors[name] = family.file_rows(name, tensor.detach().to("cpu", torch.float32).numpy())
    return tensors


def _check_like(like: Path, family: Family, base: Tensors) -> None:
    """Raise unless a GGUF file is the base's own.

    Raises:
        ConfigError: where it differs.
    """
    if not like.is_file():
        raise ConfigError(f"{like}: there is no such file. Give the base's own GGUF file: --base-gguf FILE")
    fields, tensors = read_gguf(like)
    problems = []
    if fields.get("general.architecture") != family.architecture:
        problems.append(f"general.architecture is {fields.get('general.architecture')!r}, not {family.architecture!r}.")
    problems += [f"{name} is in one of both only." for name in sorted(tensors.keys() ^ base.keys())]
    for name in sorted(tensors.keys() & base.keys()):
        if tensors[name].shape != base[name].shape:
            problems.append(f"{name} has shape {tensors[name].shape}, in the base {base[name].shape}.")
        elif base[name].ndim == 1 and not np.array_equal(tensors[name], base[name]):
            problems.append(f"{name} has other numbers than the base's.")
    if problems:
        raise ConfigError(list_problems(f"{like}, which is not the base's GGUF file", problems, shown=5))


def _check(path: Path, tensors: Tensors, kind: str) -> float:
    """Return the largest difference between what was to be written and what is read again.

    Raises:
        VerificationError: it is more than the type's rounding.
    """
    _, found = read_gguf(path)
    problems = [f"{name} is in one of both only." for name in sorted(found.keys() ^ tensors.keys())]
    furthest = 0.0
    for name in sorted(found.keys() & tensors.keys()):
        if found[name].shape != tensors[name].shape:
            problems.append(f"{name} has shape {found[name].shape}, not {tensors[name].shape}.")
            continue
        apart = np.abs(found[name] - tensors[name])
        furthest = max(furthest, float(apart.max()))
        if not (apart <= rounding("F32" if apart.ndim == 1 else kind, tensors[name])).all():
            problems.append(f"{name} differs by up to {float(apart.max()):.1e}, more than {kind} rounds.")
    if problems:
        raise VerificationError(list_problems("the GGUF file, written and read again", problems, shown=5))
    return furthest
