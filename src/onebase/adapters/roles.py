"""What a layer is for inside its block: an attention's keys, values and output, an MLP's output.

Methods choose their default targets by these, from the tree alone; no model is known by name. Candidates come in the
model's order, in which the layer that ends an attention or an MLP is the last one of it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from onebase.adapters.matching import LINEAR_KINDS, Candidate

NO_MLP = "no MLP of this base ends in a linear layer (experts are none), so that only attention is adapted"
_KEY_OR_VALUE = re.compile(r"(^|_)(k|v|kv|qkv|wqkv|keys?|values?)(_|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def keys_and_values(candidates: Iterable[Candidate]) -> list[str]:
    """Return the paths of every attention's key and value layers; of a fused one where nothing is called a key."""
    paths = []
    for group in _groups(candidates, "attention", _attention_of).values():
        named = [c.path for c in group if _KEY_OR_VALUE.search(c.path.rpartition(".")[2])]
        paths += named or [c.path for c in group[:-1]]
    return paths


def attention_outputs(candidates: Iterable[Candidate]) -> list[str]:
    """Return the path of the last linear layer of every attention."""
    return [group[-1].path for group in _groups(candidates, "attention", _attention_of).values()]


def mlp_outputs(candidates: Iterable[Candidate]) -> list[str]:
    """Return the path of the last linear layer of every MLP, each expert that is an MLP of its own included."""
    return [group[-1].path for group in _groups(candidates, "mlp", _entry_of).values()]


def _groups(candidates: Iterable[Candidate], role: str, group_of: Callable[[str], str]) -> dict[str, list[Candidate]]:
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        if candidate.role == role and candidate.kind in LINEAR_KINDS:
            groups.setdefault(group_of(candidate.path), []).append(candidate)
    return groups


def _attention_of(path: str) -> str:
    """Return the path of the attention that a layer lies in: up to the first name after the block that says so."""
    parts = path.split(".")
    start = next((i for i, part in enumerate(parts) if part.isdecimal()), -1) + 1
    end = next((i for i, part in enumerate(parts) if i >= start and _ATTENTION.search(part)), len(parts) - 2)
    return ".".join(parts[: end + 1])


def _entry_of(path: str) -> str:
    """Return the path of the innermost list entry that a layer lies in: a block, or an expert of one."""
    parts = path.split(".")
    end = max((i for i, part in enumerate(parts) if part.isdecimal()), default=-1)
    return ".".join(parts[: end + 1])
