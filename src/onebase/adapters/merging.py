"""Merged weights: the plain model's state with one adapter written into it, the base itself untouched.

Each module that has parts is copied, turned to fp32 if it is stored in less, and changed by its parts in order
(`MergeablePart.merge_`); what comes out is cast back to the base's dtype at the very end, once. Everything else of the
state is the base's own tensors, not copied. Cost: one copy of each adapted module, and the product B A for each.

A weight that modules share (an embedding tied to the head) is changed for one of them only where the adapter is on one
of them only: that no plain model with shared weights can hold, so it is an error unless the caller unties them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from onebase.adapters.bank import Adapter, Bank
from onebase.adapters.layer import AdaptedLayer
from onebase.adapters.part import MergeablePart, Part
from onebase.errors import ConfigError, list_problems

_WHY_NOT = {
    "bottleneck": "it puts a nonlinear function after a module, which no weight of that module can express",
    "prompt-tuning": "its virtual tokens stand before the sequence; they are in no weight of the model",
    "prefix-tuning": "its keys and values stand before the sequence; they are in no weight of the model",
}


def merged_state(bank: Bank, name: str, *, untie: bool = False) -> dict[str, Tensor]:
    """Return the state dict of the plain model that does what the base and adapter `name` do together.

    Args:
        untie: let a weight that the base shares between modules become two that differ; the model that loads the state
            must not tie them (`tie_word_embeddings: false` in its configuration).

    Raises:
        ConfigError: a part cannot be written into its module, or a shared weight would have to differ.
    """
    adapter = bank.adapters.get(name)
    if adapter is None:
        raise ConfigError(f"no adapter {name!r} in the bank; it has {', '.join(bank.adapters) or 'none'}.")
    merged = _merged_modules(bank, adapter)
    state = plain_state(bank.base.model)
    changed: dict[str, Tensor] = {}
    for path, module in merged.items():
        for key, tensor in plain_state(module).items():
            own = state.get(f"{path}.{key}")
            if own is None:
                raise ConfigError(
                    f"adapter {name!r} cannot be merged: {path} would need a {key}, which the base's "
                    f"{type(bank.places.module(path)).__name__} does not have. Ship it as an adapter instead."
                )
            if not torch.equal(own.to(tensor.dtype), tensor):
                changed[f"{path}.{key}"] = tensor.to(own.dtype)
    if not untie:
        _check_ties(bank, name, state, changed)
    return state | changed


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict under the names that it has without wrappers."""
    wrapped = {path for path, module in model.named_modules() if isinstance(module, AdaptedLayer)}
    return {_plain_key(key, wrapped): tensor for key, tensor in model.state_dict().items()}


def plain_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a frozen module without the wrappers that may lie in it."""
    memo: dict[int, Any] = {}
    for inner in reversed(list(module.modules())):  # the innermost first
        if isinstance(inner, AdaptedLayer):
            memo[id(inner)] = copy.deepcopy(inner.base_layer, memo)
    return copy.deepcopy(module, memo)


def _merged_modules(bank: Bank, adapter: Adapter) -> dict[str, nn.Module]:
    """Return a changed copy, in fp32 at least, of every module that the adapter has parts on."""
    _check_mergeable(adapter)
    merged: dict[str, nn.Module] = {}
    for part in adapter.parts:
        if part.path not in merged:
            module = plain_copy(bank.places.module(part.path))
            merged[part.path] = module.float() if _is_half(module) else module
        assert isinstance(part, MergeablePart), "checked above"
        with torch.no_grad():
            part.merge_(merged[part.path])
    return merged


def _check_mergeable(adapter: Adapter) -> None:
    rest = [part for part in adapter.parts if not isinstance(part, MergeablePart)]
    if rest:
        method = adapter.settings.method
        why = _WHY_NOT.get(method, f"a {type(rest[0]).__name__} cannot be written into {_where(rest)}")
        raise ConfigError(
            f"adapter {adapter.name!r} ({method}) cannot be merged: {why}. Ship it as an adapter instead."
        )


def _where(parts: list[Part]) -> str:
    return parts[0].path + (f" (nor into {len(parts) - 1} more)" if len(parts) > 1 else "")


def _is_half(module: nn.Module) -> bool:
    return any(p.dtype in (torch.bfloat16, torch.float16) for p in module.parameters())


def _check_ties(bank: Bank, name: str, state: Mapping[str, Tensor], changed: Mapping[str, Tensor]) -> None:
    """Raise where a weight that the base shares would be one thing in one module and another elsewhere."""
    names: dict[tuple[int, tuple[int, ...]], list[str]] = {}
    for key, tensor in state.items():
        if tensor.numel():
            names.setdefault((tensor.data_ptr(), tuple(tensor.shape)), []).append(key)
    problems = []
    for key, tensor in changed.items():
        twins = [twin for twin in names[state[key].data_ptr(), tuple(state[key].shape)] if twin != key]
        problems += [
            f"{key} and {twin} are one weight in the base, and would become two that differ."
            for twin in twins
            if twin not in changed or (key < twin and not torch.equal(changed[twin], tensor))
        ]
    if problems:
        what = "Merge with the weights untied, or train with ensure_weight_tying: true."
        raise ConfigError(list_problems(f"merging adapter {name!r}", [*problems, what], shown=4))


def _plain_key(key: str, wrapped: set[str]) -> str:
    """Return a key without the names of wrappers: what follows a wrapper's own path is `base_layer`."""
    plain: list[str] = []
    seen: list[str] = []
    for part in key.split("."):
        if not (part == "base_layer" and ".".join(seen) in wrapped):
            plain.append(part)
        seen.append(part)
    return ".".join(plain)
