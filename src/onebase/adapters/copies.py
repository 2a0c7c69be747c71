"""Copies of the base's own modules that an adapter trains: full fine-tuning, LayerNorm tuning, modules_to_save.

A copy holds the trained tensors, in fp32 at least, and stands in for the frozen module for the rows of its adapter; in
a half-precision base it computes with them rounded to the base's dtype, so that a fresh copy changes no bit. Full and
LayerNorm tuning copy what a module owns itself, and leave its children to their own parts; modules_to_save copies the
whole of a module, whatever kind it is. Trained: as many numbers as are copied; kept beside the base, which stays.

A weight that several modules share (a tied head) is copied once by `full`, with the gradient of all its uses, as in
training the model itself. modules_to_save gives each module its own, as PEFT does.

Source: LayerNorm tuning, arXiv:2312.11420 sec. 3; modules_to_save and the names in files are PEFT's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from onebase.adapters.matching import LINEAR_KINDS, Candidate, Reach, lies_in
from onebase.adapters.part import Built, Part, RowCall
from onebase.adapters.places import NORM, Places, bare_copy
from onebase.base import memory, pretrained
from onebase.config.methods import Full, LnTuning
from onebase.config.targeting import PRESETS, in_preset
from onebase.errors import TargetError, list_problems
from onebase.ops.keyed import mix

_WHOLE = "module"
NORMS = Reach("LayerNorm tuning", "norms", frozenset({NORM}))
_PRESET = Reach(
    "full", "linear layers, convolutions and experts", LINEAR_KINDS | {"conv1d", "conv2d", "conv3d", "experts"}
)
_MODULES = Reach("full", "modules with parameters", frozenset({_WHOLE}))
_SAVED = Reach("modules_to_save", "modules with parameters", frozenset({_WHOLE}))


@dataclass(frozen=True, eq=False)
class CopyPart:
    """One adapter's copy of one module: the trained tensors by their name inside it, and what computes with them.

    `dtypes` are the frozen tensors', `prefix` what stands before the names in files, `buffers` what else a file holds,
    `repeated` the names of tied tensors that it holds once more.
    """

    path: str
    prefix: str
    own: Mapping[str, nn.Parameter]
    dtypes: Mapping[str, torch.dtype]
    twin: nn.Module
    buffers: Mapping[str, Tensor]
    repeated: tuple[str, ...] = ()

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained tensors under the names of PEFT's format."""
        for name, parameter in self.own.items():
            yield f"{self.prefix}.{name}", parameter

    def constants(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what a file holds of the module beside its parameters (a batch norm's means)."""
        for name, buffer in self.buffers.items():
            yield f"{self.prefix}.{name}", buffer
        for name in self.repeated:
            yield f"{self.prefix}.{name}", self.own[name].detach()

    def instead(self, call: RowCall) -> Any:
        """Return what the copy makes of the rows."""
        rounded = {name: p.to(self.dtypes[name]) for name, p in self.own.items() if p.dtype != self.dtypes[name]}
        return call.run(WithTensors(self.twin, rounded) if rounded else self.twin)

    @torch.no_grad()
    def merge_(self, module: nn.Module) -> None:
        """Write the trained tensors over the module's own."""
        for name, tensor in (*self.own.items(), *self.buffers.items()):
            _tensor_of(module, name).copy_(tensor)


class WithTensors(nn.Module):
    """A module that computes with other tensors in the place of some of its own, for one call."""

    def __init__(self, module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._call = (module, dict(tensors))

    def forward(self, *args: Any, **named: Any) -> Any:
        """Return what the module makes of its arguments."""
        return functional_call(*self._call, args, named)


def build_full(places: Places, settings: Full, seed: int) -> Built:
    """Return copies of what the targets own, and of what is inside them; of the whole model where none is named.

    Raises:
        TargetError: the settings name a module that is not there, none, or one that cannot be trained.
        CapacityError: there is no memory for the copies.
    """
    if settings.target_modules in PRESETS:
        match = places.choose(settings, _PRESET)
        owners = match.paths
    else:
        everything = [c.path for c in places.owners]
        modules = _modules(places)
        out = _excluded(places, settings, modules)
        named = settings.model_copy(update={"exclude_modules": None})
        match = places.choose(named, _MODULES, default=everything, candidates=modules)
        inside = (path for path in everything if any(lies_in(path, target) for target in match.paths))
        owners = tuple(path for path in inside if not any(lies_in(path, gone) for gone in out))
        if not owners:
            raise TargetError("adapter.exclude_modules: leaves nothing of the targets to train. Exclude fewer modules.")
    _check_room(places, [p for path in owners for p in places.module(path).parameters(recurse=False)])
    made: dict[int, nn.Parameter] = {}
    parts = tuple(_own_part(places, path, path, made) for path in owners)
    warnings = (*match.warnings, *_of_the_root(places, settings), *places.untied_by(owners))
    return Built(parts, owners, warnings)


def _excluded(places: Places, settings: Full, modules: Sequence[Candidate]) -> tuple[str, ...]:
    """Return the modules that full fine-tuning leaves out, with all that is in them."""
    names = settings.exclude_modules
    if names is None:
        return ()
    if isinstance(names, str) and names in PRESETS:
        return tuple(c.path for c in places.candidates if _PRESET.holds(c) and in_preset(c.role, names))
    anything = Reach("full", "modules with parameters", frozenset(c.kind for c in modules))
    return places.choose_named(names, "exclude_modules", anything, modules)


def build_norms(places: Places, settings: LnTuning, seed: int) -> Built:
    """Return copies of the norms that the settings name, or of all.

    Raises:
        TargetError: the settings name a module that is not there or is no norm, or the base has none that is trained.
    """
    default = [c.path for c in places.owners if c.kind == NORM and not places.in_own_head(c.path)]
    if not default:
        raise TargetError(
            f"{places.base.name}: there is no norm with parameters to train. Use another method, such as lora."
        )
    match = places.choose(settings, NORMS, default=default, candidates=places.owners)
    parts = tuple(_own_part(places, path, f"{path}.ln_tuning_layers", {}) for path in match.paths)
    return Built(parts, match.paths, match.warnings)


def beside(
    places: Places, names: Sequence[str], targets: Iterable[str], *, tie: bool
) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """Return whole copies of the modules that modules_to_save names, beside an adapter on `targets`, and what to say.

    Args:
        tie: copy what shares the embedding's weight along with it, once.

    Raises:
        TargetError: a name matches nothing, or a module that cannot be copied, or one that is adapted too.
        CapacityError: there is no memory for them.
    """
    found: Sequence[str] = places.choose_named(names, "modules_to_save", _SAVED, _modules(places))
    tied = places.tied_with_embedding
    among = [path for path in tied if path in found]
    if among and tie:
        found = list(dict.fromkeys([*found, *tied]))
    problems = [
        f"adapter.modules_to_save: {path!r} is trained whole, so {target!r} cannot be a target too. Exclude it "
        "(adapter.exclude_modules), or remove it here."
        for path in found
        for target in targets
        if lies_in(target, path)
    ]
    problems += [
        f"adapter.modules_to_save: {inner!r} lies in {outer!r}, which is trained whole already. Remove one."
        for outer in found
        for inner in found
        if inner != outer and lies_in(inner, outer)
    ]
    if problems:
        raise TargetError(list_problems("adapter", problems, shown=10))
    _check_room(places, [p for path in found for p in places.module(path).parameters()])
    made: dict[int, nn.Parameter] = {}
    parts = [_whole_part(places, path, made if tie and path in tied else {}) for path in found if path not in tied[1:]]
    parts += [_whole_part(places, path, made if tie else {}, again=tie) for path in found if path in tied[1:]]
    note = f"{' and '.join(tied)} share one weight in the base; the copy of {' and '.join(among)} is apart"
    return tuple(parts), () if tie or not among else (f"{note} (ensure_weight_tying: true keeps them one)",)


def lacking_heads(places: Places, parts: Sequence[Part]) -> tuple[str, ...]:
    """Return the task's own modules, or what is in them, that no part copies: they are saved whole with every adapter."""
    copied = [part.path for part in parts if isinstance(part, CopyPart)]
    lacking: list[str] = []
    for head in places.base.own_heads:
        inside = [c.path for c in places.owners if lies_in(c.path, head)]
        left = [path for path in inside if not any(lies_in(path, whole) for whole in copied)]
        lacking += [head] if left == inside else left
    return tuple(lacking)


def draw_heads_(places: Places, parts: Sequence[Part], seed: int) -> None:
    """Give the copies of heads that no file held weights for first values of their own."""
    head = places.base.task_head
    fresh = () if isinstance(head, str) else head.fresh
    for part in (part for part in parts if isinstance(part, CopyPart)):
        for path in fresh:
            if lies_in(path, part.path):
                inside = path.removeprefix(part.path).removeprefix(".")
                pretrained.draw_weights_(places.base.model, part.twin.get_submodule(inside), mix(seed, path) >> 1)


def _modules(places: Places) -> list[Candidate]:
    """Return every module that has parameters in it, containers apart, which have no forward."""
    containers = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
    roles = {c.path: c.role for c in places.candidates}
    return [
        Candidate(
            path, f"{type(m).__name__}, never called" if isinstance(m, containers) else _WHOLE, roles.get(path, "other")
        )
        for path, m in places.modules.items()
        if path and any(True for _ in m.parameters())
    ]


def _of_the_root(places: Places, settings: Full) -> tuple[str, ...]:
    """Return the warning about what a model owns outside of any module."""
    names = [name for name, _ in places.modules[""].named_parameters(recurse=False)]
    if settings.target_modules is not None or not names:
        return ()
    return (f"not trained, because it belongs to no module inside the model: {', '.join(names)}",)


def _check_room(places: Places, tensors: Iterable[Tensor]) -> None:
    """Raise unless there is memory for fp32 copies."""
    numbers = sum(t.numel() for t in {id(t): t for t in tensors}.values())
    memory.check_room_for("the adapter", 4 * numbers, "Copy fewer modules, or use a method such as lora.")


def _own_part(places: Places, path: str, prefix: str, made: dict[int, nn.Parameter]) -> CopyPart:
    """Return a copy of what the module at `path` owns itself; `made` holds the copies of tensors that others share."""
    module = places.module(path)
    own = {name: _copied(p, path, name, made) for name, p in module.named_parameters(recurse=False)}
    buffers = _saved_buffers([("", module)])
    tensors = _exchanged(module, own, buffers)
    twin = bare_copy(module, tensors)
    twin.__dict__["_modules"] = module._modules  # the frozen module's own: wrappers that come later are there too
    return CopyPart(path, prefix, own, _dtypes(module, own), twin, buffers)


def _whole_part(places: Places, path: str, made: dict[int, nn.Parameter], *, again: bool = False) -> CopyPart:
    """Return a copy of a module with all that is in it; `again`: its weight is a copy that another module brought."""
    module = places.copy_of(path, {})
    own = {name: _copied(p, path, name, made) for name, p in module.named_parameters()}
    buffers = _saved_buffers(module.named_modules())
    twin = places.copy_of(path, _exchanged(module, own, buffers))
    return CopyPart(path, path, own, _dtypes(module, own), twin, buffers, ("weight",) if again else ())


def _copied(parameter: nn.Parameter, path: str, name: str, made: dict[int, nn.Parameter]) -> nn.Parameter:
    if not parameter.is_floating_point():
        raise TargetError(
            f"{path}: its weight is held in fewer bits ({name} is {str(parameter.dtype).removeprefix('torch.')}), so that "
            "the layer cannot be trained whole. Leave quantize out, or use a method that leaves it frozen, such as lora."
        )
    if id(parameter) not in made:
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        made[id(parameter)] = nn.Parameter(parameter.detach().to(dtype, copy=True))
    return made[id(parameter)]


def _saved_buffers(modules: Iterable[tuple[str, nn.Module]]) -> dict[str, Tensor]:
    """Return copies of the buffers that the modules' own file holds, by the modules' paths."""
    return {
        f"{path}.{name}".removeprefix("."): buffer.clone()
        for path, module in modules
        for name, buffer in module._buffers.items()
        if buffer is not None and name not in module._non_persistent_buffers_set
    }


def _exchanged(module: nn.Module, own: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[int, Tensor]:
    """Return the copy of each of the module's tensors, by the identity of the frozen one."""
    return {id(_tensor_of(module, name)): tensor for name, tensor in (*own.items(), *buffers.items())}


def _dtypes(module: nn.Module, names: Iterable[str]) -> dict[str, torch.dtype]:
    return {name: _tensor_of(module, name).dtype for name in names}


def _tensor_of(module: nn.Module, name: str) -> Tensor:
    parent, _, last = name.rpartition(".")
    tensor: Tensor = getattr(module.get_submodule(parent), last)
    return tensor
