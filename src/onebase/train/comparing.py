"""An adapter on its base against what should do the same: a plain model as a whole, and merged modules one by one.

Each time the base calls a module that the adapter is on, the merged module of the same path is called with the very
same arguments: so an error is measured where it is made, not where it has been carried to, and the module that is wrong
is named. Differences are relative: of results to the largest number of theirs, of a module's outputs to their norm over
all inputs. One table of bounds, by number format. On a base in half precision an adapted module is called once more in
fp32, adapter and all: what a half rounds away of its outputs is as large as many a layer's whole update (0.2 % of them).

Called by merging.py and verifying.py. Cost: a forward each, and each adapted module once more, of a half twice and with a
copy of it in fp32.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from onebase.adapters.bank import Bank
from onebase.adapters.layer import AdaptedLayer
from onebase.adapters.merging import plain_copy
from onebase.adapters.part import ModulePart
from onebase.errors import ConfigError

Inputs = Mapping[str, Tensor]


@dataclass(frozen=True)
class Bounds:
    """The largest relative difference that rounding makes: of a model's results, and of one module's outputs."""

    results: float
    module: float


# fp64: models take softmax, norms and rotary angles in fp32. A half rounds a module's output and the update beside it to
# 2^-11 or 2^-8 of themselves, where it cannot be computed in fp32; through all layers that grows.
BOUNDS = {
    torch.float64: Bounds(1e-6, 1e-6),
    torch.float32: Bounds(1e-4, 1e-4),
    torch.float16: Bounds(2e-2, 2e-3),
    torch.bfloat16: Bounds(5e-2, 1e-2),
}
_HALVES = (torch.bfloat16, torch.float16)
_SHOWN = 3


def bounds_of(*dtypes: torch.dtype) -> Bounds:
    """Return the bounds for a comparison between models of these formats: the widest."""
    return max((BOUNDS[dtype] for dtype in dtypes), key=lambda bounds: bounds.results)


@dataclass(frozen=True)
class Apart:
    """How far a merged module's outputs are from what they should be, of their norm, and how far rounding explains."""

    value: float
    bound: float


@dataclass(frozen=True)
class Differences:
    """What comparisons found: `results` of the largest result, `modules` by path, the worst for its bound first."""

    results: float
    results_bound: float
    modules: Mapping[str, Apart]

    @property
    def worst(self) -> tuple[str, Apart]:
        """The module that differs most, and by how much."""
        return worst_of(self.modules)


@torch.no_grad()
def compare_results(bank: Bank, name: str, other: Any, inputs: Sequence[Inputs]) -> tuple[float, float]:
    """Return how far a plain model's results are from those of the base with adapter `name`, and the bound for it."""
    base, dtype = bank.base, dtype_of(other)
    largest, distances = [0.0], [0.0]
    for given in inputs:
        given = {key: value.to(base.device) for key, value in given.items()}
        with base.native(bank.sole_route(name)) as model:
            own = numbers_of(model(**_floats_as(given, base.dtype)))
        with _computing_in(dtype, base.device):
            theirs = numbers_of(other(**_floats_as(given, dtype)))
        wide = torch.promote_types(torch.promote_types(own.dtype, theirs.dtype), torch.float32)
        largest.append(float(own.abs().max()))
        distances.append(float((theirs.to(wide) - own.to(wide)).abs().max()))
    furthest = float(torch.tensor(distances, dtype=torch.float64).max())  # unlike Python's max, NaN if any is
    return furthest / max(*largest, 1e-6), bounds_of(base.dtype, dtype).results


@torch.no_grad()
def gives_numbers(bank: Bank, name: str, inputs: Sequence[Inputs]) -> bool:
    """Return whether all results of the base with adapter `name` are finite."""
    base = bank.base
    for given in inputs:
        given = {key: value.to(base.device) for key, value in given.items()}
        with base.native(bank.sole_route(name)) as model:
            if not bool(numbers_of(model(**_floats_as(given, base.dtype))).isfinite().all()):
                return False
    return True


@torch.no_grad()
def compare_modules(
    bank: Bank, name: str, modules: Mapping[str, nn.Module], inputs: Sequence[Inputs]
) -> dict[str, Apart]:
    """Return how far merged modules are from those of the base with adapter `name`, by path, the worst first."""
    base, tally = bank.base, _Tally()
    widened = _widened(bank, name, modules)
    for given in inputs:
        given = {key: value.to(base.device) for key, value in given.items()}
        with base.native(bank.sole_route(name)) as model, _beside(model, modules, widened, tally):
            model(**_floats_as(given, base.dtype))
    bounds = {path: BOUNDS[torch.float32 if path in widened else base.dtype].module for path in modules}
    found = {path: Apart(value, bounds[path]) for path, value in tally.relative().items()}
    return dict(sorted(found.items(), key=lambda one: -one[1].value / one[1].bound))


def _widened(bank: Bank, name: str, modules: Iterable[str]) -> set[str]:
    """Return the modules of a base in half precision that can be computed in fp32 with what adapter `name` has on them.

    A copy that stands in for its module computes in the module's format, and a module with others in it with theirs.
    """
    if bank.base.dtype not in _HALVES:
        return set()
    copies = {part.path for part in bank.adapters[name].parts if isinstance(part, ModulePart)}
    return {path for path in modules if path not in copies and not any(bank.places.module(path).children())}


def worst_of(modules: Mapping[str, Apart]) -> tuple[str, Apart]:
    """Return the first of some modules, the worst first."""
    return next(iter(modules.items()), ("no module", Apart(0.0, BOUNDS[torch.float32].module)))


def listed(modules: Mapping[str, Apart]) -> str:
    """Return the modules that differ most, in words."""
    return ", ".join(f"{path} by {apart.value:.1e}" for path, apart in list(modules.items())[:_SHOWN]) or "none"


def dtype_of(module: nn.Module) -> torch.dtype:
    """Return the format of a module's first weight."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def numbers_of(out: Any) -> Tensor:
    """Return what a model gives as one tensor: logits where it has them, hidden states where it has none."""
    found = out if isinstance(out, Tensor) else getattr(out, "logits", None)
    found = getattr(out, "last_hidden_state", None) if found is None else found
    if not isinstance(found, Tensor):
        raise ConfigError(
            f"a model that returns a {type(out).__name__} without logits cannot be compared with another."
        )
    return found


def inputs_for(bank: Bank, sequences: Sequence[Sequence[int]]) -> list[Inputs]:
    """Return inputs of one entry each for the base: the sequences of token ids, or noise for a model of images.

    Raises:
        ConfigError: the base takes something else.
    """
    base = bank.base
    config, takes = getattr(base.model, "config", None), getattr(base.model, "main_input_name", "input_ids")
    if takes == "pixel_values":
        size = getattr(config, "image_size", 224)
        sides = tuple(size) if isinstance(size, tuple | list) else (size, size)
        draws = torch.Generator().manual_seed(0)
        shape = (1, getattr(config, "num_channels", 3), *sides)
        return [{takes: torch.randn(shape, generator=draws)} for _ in range(2)]
    if takes != "input_ids" or base.embedding_rows is None:
        raise ConfigError(f"{base.name} takes {takes}, and what to compare two such models on is not known here.")
    made: list[Inputs] = []
    for sequence in sequences:
        ids = torch.tensor([list(sequence)])
        more = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
        made.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), **more})
    return made


@dataclass
class _Tally:
    """Squared distances and squared norms of modules' outputs, by path, added up over all calls."""

    sums: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, path: str, own: Tensor, theirs: Tensor) -> None:
        wide = own.double()
        apart, norm = self.sums.get(path, (0.0, 0.0))
        apart += float((theirs.double() - wide).square().sum())
        self.sums[path] = apart, norm + float(wide.square().sum())

    def relative(self) -> dict[str, float]:
        """Return the relative difference of every module; one that is not a number is infinite."""
        found = {path: (apart / max(norm, 1e-12)) ** 0.5 for path, (apart, norm) in self.sums.items()}
        return {path: value if value >= 0 else float("inf") for path, value in found.items()}


@contextmanager
def _beside(model: nn.Module, modules: Mapping[str, nn.Module], widened: Set[str], tally: _Tally) -> Iterator[None]:
    """Call the merged modules with what the adapted ones are called with, for as long as this is open."""
    device = next(model.parameters()).device

    def watch(layer: Any, args: tuple[Any, ...], named: dict[str, Any], own: Any) -> None:
        twin = modules[layer.path]
        dtype = dtype_of(twin)
        with _computing_in(dtype, device):
            theirs = twin(*_floats_as(args, dtype), **_floats_as(named, dtype))
        if layer.path in widened:
            own = _in_fp32(layer, args, named, device)
        tally.add(layer.path, _first_tensor(own), _first_tensor(theirs))

    hooks = [
        layer.register_forward_hook(watch, with_kwargs=True)
        for layer in model.modules()
        if isinstance(layer, AdaptedLayer) and layer.path in modules
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _in_fp32(layer: AdaptedLayer, args: tuple[Any, ...], named: dict[str, Any], device: torch.device) -> Any:
    """Return what an adapted module gives on a copy of the frozen one in fp32."""
    frozen = layer.base_layer
    layer.base_layer = plain_copy(frozen).float()
    try:
        with _computing_in(torch.float32, device):  # forward: calling it would call the hook
            return layer.forward(*_floats_as(args, torch.float32), **_floats_as(named, torch.float32))
    finally:
        layer.base_layer = frozen


def _computing_in(dtype: torch.dtype, device: torch.device) -> AbstractContextManager[Any]:
    """Return the mixed precision that a base of a format computes in; none, where it is no half."""
    return torch.autocast(device.type, dtype if dtype in _HALVES else None, enabled=dtype in _HALVES)


def _floats_as(given: Any, dtype: torch.dtype) -> Any:
    """Return arguments with their floating tensors in a format; a mixed precision takes them as they are."""
    if isinstance(given, Tensor):
        return given.to(dtype) if given.is_floating_point() and dtype not in _HALVES else given
    if isinstance(given, tuple | list):
        return type(given)(_floats_as(one, dtype) for one in given)
    return {key: _floats_as(one, dtype) for key, one in given.items()} if isinstance(given, dict) else given


def _first_tensor(out: Any) -> Tensor:
    while isinstance(out, tuple | list):
        out = out[0]
    return out if isinstance(out, Tensor) else numbers_of(out)
