"""Merged weights: the plain model's state with one adapter written into it, the base itself untouched.

`merged_state` returns that state for a model of its own. `Merged` puts it into the live base instead, for as long as
it is open, and the base's own tensors back afterwards: those themselves, kept meanwhile, never W - s B A.

Each module that has parts is copied, turned to fp32 if it is stored in less, and changed by its parts in order
(`MergeablePart.merge_`); what comes out is cast back to the base's dtype at the very end, once. Everything else of the
state is the base's own tensors, not copied. Cost: one copy of each adapted module, and the product B A for each.

A weight that modules share (an embedding tied to the head) is changed for one of them only where the adapter is on one
of them only: that no plain model with shared weights can hold, so it is an error unless the caller unties them.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from onebase.adapters.bank import Adapter, Bank
from onebase.adapters.copies import CopyPart
from onebase.adapters.dora import MagnitudePart
from onebase.adapters.layer import AdaptedLayer
from onebase.adapters.part import MergeablePart, Part
from onebase.adapters.tokens import EmbeddingRows, HeadRows
from onebase.base.nf4 import Nf4Linear
from onebase.errors import ConfigError, list_problems

_WHY_NOT = {
    "bottleneck": "it puts a nonlinear function after a module, which no weight of that module can express",
    "prompt-tuning": "its virtual tokens stand before the sequence; they are in no weight of the model",
    "prefix-tuning": "its keys and values stand before the sequence; they are in no weight of the model",
}


def merged_state(
    bank: Bank,
    name: str,
    *,
    untie: bool = False,
    dtype: torch.dtype | None = None,
    modules: Mapping[str, nn.Module] | None = None,
) -> dict[str, Tensor]:
    """Return the state dict of the plain model that does what the base and adapter `name` do together.

    Args:
        modules: what `merged_modules` returned; None: it is asked.
        dtype: what takes the place of the base's dtype; None: every tensor keeps its own.
        untie: let a weight that the base shares between modules become two that differ; the model that loads the state
            must not tie them (`tie_word_embeddings: false` in its configuration).

    Raises:
        ConfigError: a part cannot be written into its module, or a shared weight would have to differ.
    """
    state = plain_state(bank.base.model)
    formats = {key: stored_as(tensor, bank.base.dtype, dtype) for key, tensor in state.items()}
    merged = merged_modules(bank, name) if modules is None else modules
    changed = _changed(bank, name, merged, state, formats)
    if not untie:
        _check_ties(bank, name, state, changed)
    return {key: changed[key] if key in changed else tensor.to(formats[key]) for key, tensor in state.items()}


def stored_as(tensor: Tensor, own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Return a tensor's format in a plain model; one that is not in the base's own (numbers kept in fp32) stays so."""
    return wanted if wanted is not None and tensor.dtype == own else tensor.dtype


class Merged:
    """Adapters written into the live base, one after the other, until `unmerge` puts back what was there, to the byte.

    Made, it has merged: a forward of the base alone (`bank.sole_route(None)`) then does what base and adapters do
    together. One through an adapter would apply it a second time, and its base is not the frozen one; nothing may be
    trained, added or removed meanwhile. Use it in a `with` block, or call `unmerge`. Cost: the changed tensors twice.

    Args:
        names: the adapters; of several, none with magnitudes (DoRA) or whole modules.

    Raises:
        ConfigError: no such adapter, a part that cannot be written into its module, or a shared weight that would have
            to differ; the base is then as it was.
    """

    def __init__(self, bank: Bank, names: str | Sequence[str]) -> None:
        self.names = (names,) if isinstance(names, str) else tuple(names)
        self._kept: dict[int, _Kept] = {}
        alone = [name for name in self.names if not _adds_up(_adapter(bank, name))]
        if len(self.names) > 1 and alone:
            raise ConfigError(
                f"adapter {alone[0]!r} has parts that do not add to the base but take its place or are relative to it "
                f"(magnitudes, whole modules), so it cannot be merged together with others ({', '.join(self.names)}). "
                "Merge it alone."
            )
        try:
            for name in self.names:
                self._merge(bank, name)
        except BaseException:
            self.unmerge()
            raise

    def _merge(self, bank: Bank, name: str) -> None:
        if bank.base.quantize != "none":
            raise ConfigError(
                f"the base's linear layers are held in {bank.base.quantize}, and nothing is written into those. Open it "
                "with quantize: none, or write a merged model: onebase merge"
            )
        state = plain_state(bank.base.model)
        formats = {key: own.dtype for key, own in state.items()}
        changed = _changed(bank, name, merged_modules(bank, name), state, formats)
        _check_ties(bank, name, state, changed)
        live = _live_tensors(bank.base.model)
        one_of = {(state[key].data_ptr(), state[key].shape): tensor for key, tensor in changed.items()}  # tied: one
        for key in changed:
            tensor = live[key]
            kept = self._kept.setdefault(id(tensor), _Kept(key, tensor, tensor.data))
            kept.merged = tensor.data = one_of[state[key].data_ptr(), state[key].shape]

    @property
    def changed(self) -> dict[str, Tensor]:
        """The tensors of the base that hold merged numbers now, by name."""
        return {kept.key: kept.merged for kept in self._kept.values()}

    def unmerge(self) -> None:
        """Put the base's own tensors back; a second call does nothing.

        Raises:
            ConfigError: something else was put into the base since: what came last has to go first.
        """
        for kept in self._kept.values():
            if kept.tensor.data_ptr() != kept.merged.data_ptr():
                raise ConfigError(
                    f"{kept.key} is not what merging {', '.join(self.names)} made of it: something was merged after it. "
                    "Unmerge that first."
                )
        for kept in self._kept.values():
            kept.tensor.data = kept.own
        self._kept.clear()

    def __enter__(self) -> Merged:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.unmerge()


@dataclass
class _Kept:
    """A tensor of the live base, its own numbers, and those that lie in it now."""

    key: str
    tensor: Tensor
    own: Tensor
    merged: Tensor = field(init=False)


def _adds_up(adapter: Adapter) -> bool:
    """Return whether an adapter does the same to a base that others have been merged into."""
    return not any(isinstance(part, MagnitudePart | CopyPart | EmbeddingRows | HeadRows) for part in adapter.parts)


def _live_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return the tensors themselves that `plain_state` shows, under the same names."""
    wrapped = {path for path, module in model.named_modules() if isinstance(module, AdaptedLayer)}
    pairs = (*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False))
    return {_plain_key(key, wrapped): tensor for key, tensor in pairs}


def _adapter(bank: Bank, name: str) -> Adapter:
    adapter = bank.adapters.get(name)
    if adapter is None:
        raise ConfigError(f"no adapter {name!r} in the bank; it has {', '.join(bank.adapters) or 'none'}.")
    return adapter


def _changed(
    bank: Bank,
    name: str,
    merged: Mapping[str, nn.Module],
    state: Mapping[str, Tensor],
    formats: Mapping[str, torch.dtype],
) -> dict[str, Tensor]:
    """Return the tensors of the plain state that merged modules change, rounded once, to the given formats."""
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
                changed[f"{path}.{key}"] = tensor.to(formats[f"{path}.{key}"])
    return changed


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a model's state dict under the names that it has without wrappers."""
    wrapped = {path for path, module in model.named_modules() if isinstance(module, AdaptedLayer)}
    return {_plain_key(key, wrapped): tensor for key, tensor in model.state_dict().items()}


def plain_copy(module: nn.Module) -> nn.Module:
    """Return a copy of a frozen module without the wrappers that may lie in it; of 4-bit layers the plain ones."""
    memo: dict[int, Any] = {}
    for inner in reversed(list(module.modules())):  # the innermost first
        if isinstance(inner, Nf4Linear):
            memo[id(inner)] = inner.plain()
        elif isinstance(inner, AdaptedLayer):
            memo[id(inner)] = copy.deepcopy(inner.base_layer, memo)
    return copy.deepcopy(module, memo)


def merged_modules(bank: Bank, name: str) -> dict[str, nn.Module]:
    """Return a changed copy, in fp32 at least, of every module that an adapter has parts on, by path.

    Raises:
        ConfigError: a part cannot be written into its module.
    """
    adapter = _adapter(bank, name)
    check_mergeable(adapter)
    merged: dict[str, nn.Module] = {}
    for part in adapter.parts:
        if part.path not in merged:
            module = plain_copy(bank.places.module(part.path))
            merged[part.path] = module.float() if _is_half(module) else module
        assert isinstance(part, MergeablePart), "checked above"
        with torch.no_grad():
            part.merge_(merged[part.path])
    return merged


def check_mergeable(adapter: Adapter) -> None:
    """Raise unless every part of an adapter can be written into its module.

    Raises:
        ConfigError: why not, and what can be done instead.
    """
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
