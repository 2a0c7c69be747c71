"""A LoRA adapter as a GGUF file for llama.cpp: `export_gguf`.

llama.cpp computes (lora_alpha / rank of the pair) * lora_b @ lora_a beside a weight of the same name, with one lora_alpha
for all: so that is the largest rank, and what is left of each pair's scale is folded into its lora_b. Queries and keys are
reordered as the base's are in its own file. The file gets its name only after it was read again and found to hold this.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from onebase.adapters.bank import Bank
from onebase.adapters.ingredients import StoredPair
from onebase.base.gguf_file import TYPES, Family, family_of, read_gguf, rounding, write_adapter
from onebase.errors import ConfigError, VerificationError, list_problems
from onebase.files.atomic import new_file
from onebase.train.merging import is_tied
from onebase.train.portable import plain_pairs

Tensors = dict[str, NDArray[np.float32]]
_EMBEDDING, _HEAD = "token_embd.weight", "output.weight"


@dataclass(frozen=True)
class GgufExport:
    """What became of an export to GGUF."""

    path: Path
    size_bytes: int
    architecture: str
    lora_alpha: float
    pairs: int
    kind: str
    largest_rounding: float
    """The largest difference that the format made, of a number as read again."""


def export_gguf(bank: Bank, name: str, folder: Path, out: Path, kind: str = "F32") -> GgufExport:
    """Write adapter `name` of a bank, which lies in `folder`, to the file `out` and return what was found.

    Args:
        kind: one of gguf_file.TYPES, the format of the numbers.

    Raises:
        ConfigError: `out` is there, or llama.cpp has no place for the adapter; the message says what can hold it.
        VerificationError: the file does not hold what was written; nothing is left of it.
    """
    if kind not in TYPES:
        raise ConfigError(f"--type: an adapter's must be one of {', '.join(TYPES)}, got {kind}.")
    if out.exists():
        raise ConfigError(f"{out}: is there already. Choose another --out.")
    family = family_of(getattr(bank.base.model, "config", None))
    pairs = plain_pairs(bank.adapters[name], folder)
    lora_alpha = float(max(pair.r for pair in pairs.values()))
    tensors = gguf_tensors(family, pairs, lora_alpha, tied=is_tied(bank.base.model))
    if kind == "F16" and (
        large := [key for key, tensor in tensors.items() if np.abs(tensor).max() > np.finfo(np.float16).max]
    ):
        raise ConfigError(f"{large[0]}: holds numbers that F16 cannot. Take --type F32.")
    with new_file(out, writing="the adapter") as hidden:
        write_adapter(hidden, family.architecture, lora_alpha, tensors, kind)
        difference = _check(hidden, family.architecture, lora_alpha, tensors, kind)
    return GgufExport(out, out.stat().st_size, family.architecture, lora_alpha, len(pairs), kind, difference)


def gguf_tensors(family: Family, pairs: Mapping[str, StoredPair], lora_alpha: float, *, tied: bool) -> Tensors:
    """Return the tensors of the file by name.

    Raises:
        ConfigError: every pair that llama.cpp has no place for.
    """
    tensors: Tensors = {}
    problems = []
    for path, pair in pairs.items():
        name = family.tensor_name(path)
        if name is None or len(pair.inputs) != 1:
            problems.append(f"{path}: llama.cpp's {family.architecture} has no weight for its pair.")
        elif tied and name in (_EMBEDDING, _HEAD):
            problems.append(f"{path}: the head is tied to the embedding, and llama.cpp would change both, or crash.")
        else:
            scale = pair.scaling * pair.r / lora_alpha
            A, B = pair.A.float().numpy(), (pair.B.double() * scale).float().numpy()
            tensors[f"{name}.lora_a"] = A.T.copy() if name == _EMBEDDING else A
            tensors[f"{name}.lora_b"] = family.file_rows(name, B)
    if problems:
        what = "A merged model can hold it: onebase merge, then llama.cpp's convert_hf_to_gguf.py on that folder."
        raise ConfigError(list_problems("the adapter as GGUF", [*problems, what], shown=6))
    return tensors


def _check(path: Path, architecture: str, lora_alpha: float, tensors: Tensors, kind: str) -> float:
    """Return the largest difference between what was to be written and what is read again.

    Raises:
        VerificationError: it is more than the format's rounding, or a field is not what the loader asks for.
    """
    fields, found = read_gguf(path)
    wanted: dict[str, Any] = {
        "general.type": "adapter",
        "general.architecture": architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": lora_alpha,
    }
    problems = [
        f"{key} is {fields.get(key)!r}, not {value!r}." for key, value in wanted.items() if fields.get(key) != value
    ]
    problems += [f"{name} is missing." for name in tensors if name not in found]
    problems += [f"{name} was not to be there." for name in found if name not in tensors]
    furthest = 0.0
    for name in tensors.keys() & found.keys():
        if found[name].shape != tensors[name].shape:
            problems.append(f"{name} has shape {found[name].shape}, not {tensors[name].shape}.")
            continue
        apart = np.abs(found[name] - tensors[name])
        furthest = max(furthest, float(apart.max()))
        if not (apart <= rounding(kind, tensors[name])).all():
            problems.append(f"{name} differs by up to {float(apart.max()):.1e}, more than {kind} rounds.")
    if problems:
        raise VerificationError(list_problems("the GGUF file, written and read again", problems, shown=5))
    return furthest
