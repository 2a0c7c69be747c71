"""Places: the modules of one base as they were before any adapter, and which of them settings name.

A bank makes one when it is made. Wrappers take the modules' places in the model later; the modules themselves stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from onebase.adapters.dense import dense_weight, row_squares
from onebase.adapters.layer import AdaptedLayer
from onebase.adapters.matching import ON_LINEAR, Candidate, Match, Reach, choose_targets, lies_in
from onebase.adapters.part import Part
from onebase.base.model import Base
from onebase.base.route import Route, RowSpace
from onebase.base.targets import is_norm, lenders, list_targets
from onebase.config.targeting import Targeted
from onebase.errors import TargetError
from onebase.ops.segments import NO_OWNER

NORM = "norm"


class Places:
    """The frozen modules by path, and those that an adapter can be put on.

    `candidates` are the layers that `onebase targets` lists, `owners` all modules that have parameters of their own,
    `lenders` embeddings that are never called (base/targets.py).
    """

    def __init__(self, base: Base) -> None:
        self.base = base
        self.modules: dict[str, nn.Module] = dict(base.model.named_modules())
        self._children: dict[tuple[int, str], nn.Module] = {}
        self._parents: dict[int, list[tuple[nn.Module, str]]] = {}
        for parent in self.modules.values():
            for name, child in parent._modules.items():
                if child is not None:
                    self._children[id(parent), name] = child
                    self._parents.setdefault(id(child), []).append((parent, name))
        order = {path: place for place, path in enumerate(self.modules)}
        with base.native(Route(batch_owners=(NO_OWNER,))):
            self.lenders = lenders(base.model)
            targets = list_targets(base.model)
        candidates = [
            Candidate(
                path, t.kind if t.available or path in self.lenders else _unavailable(t.kind), self._role(path, t.role)
            )
            for t in targets
            for path in t.paths
        ]
        self.candidates = tuple(sorted(candidates, key=lambda c: order[c.path]))
        self._poolers = {path for t in targets if t.role == "pooler" for path in t.paths}
        self.head_path = self.path_of(base.head_module)
        self.embedding_path = self.path_of(base.input_embedding)
        self._kinds = {c.path: c.kind for c in candidates}
        self._wrappers: dict[int, AdaptedLayer] = {}
        self._squares: dict[str, Tensor] = {}
        self.owners = tuple(self._owners())

    def kind(self, path: str) -> str:
        """Return what kind of layer is at a path, for one that adapters go on."""
        return self._kinds[path]

    def _role(self, path: str, role: str) -> str:
        """Return a module's role: one that every adapter brings whole is a head, whatever it is called."""
        return "head" if self.in_own_head(path) else role

    def in_own_head(self, path: str) -> bool:
        """Return whether a module is one that every adapter brings whole, or a part of one."""
        return any(lies_in(path, own) for own in self.base.own_heads)

    def space(self, path: str) -> RowSpace:
        """Return what the rows are that a module sees."""
        if path == self.head_path:
            return RowSpace.LABEL
        head = self.base.task_head
        in_head = not isinstance(head, str) and any(lies_in(path, own) for own in head.paths)
        return RowSpace.EXAMPLE if in_head or path in self._poolers else RowSpace.TOKEN

    def reads_tokens(self, path: str) -> bool:
        """Return whether a module is fed with a batch's own entries: no embedding of positions beside that of tokens."""
        module, tokens = self.module(path), self.base.input_embedding
        return not isinstance(module, nn.Embedding) or tokens is None or module.weight is tokens.weight

    def squares(self, path: str) -> Tensor:
        """Return ||w||^2 of what each output of a module reads, computed once."""
        if path not in self._squares:
            self._squares[path] = row_squares(dense_weight(self.module(path), path))
        return self._squares[path]

    def _owners(self) -> Iterator[Candidate]:
        """Yield every module that has parameters of its own: the layers that are listed, norms, and whatever else."""
        listed = {c.path: c for c in self.candidates}
        for path, module in self.modules.items():
            if path and any(True for _ in module.parameters(recurse=False)):
                name = type(module).__name__
                yield listed.get(path) or Candidate(path, NORM if is_norm(module) else name, "other")

    def in_model_order(self, parts: Iterable[Part]) -> tuple[Part, ...]:
        """Return parts by their module's place in the model; those of one module stay as they are."""
        order = {path: place for place, path in enumerate(self.modules)}
        return tuple(sorted(parts, key=lambda part: order.get(part.path, len(order))))

    def module(self, path: str) -> Any:
        """Return the frozen module at a path."""
        return self.modules[path]

    def put(self, path: str, module: nn.Module) -> None:
        """Put a wrapper, or the frozen module itself, wherever the frozen module at `path` stands in the model.

        Its parents are the frozen ones, whatever wraps them; a module that several parents share is replaced in all.
        """
        own = self.modules[path]
        if isinstance(module, AdaptedLayer):
            self._wrappers[id(own)] = module
        else:
            self._wrappers.pop(id(own), None)
        for parent, name in self._parents[id(own)]:
            setattr(parent, name, module)
            if (around := self._wrappers.get(id(parent))) is not None:
                around.show(name, module)

    def copy_of(self, path: str, tensors: Mapping[int, Tensor]) -> nn.Module:
        """Return a copy of the structure of a frozen module, without any wrapper inside.

        Its parameters and buffers are those of `tensors`, by the identity of the frozen one; others stay the frozen ones.
        """
        return self._copy(self.modules[path], tensors, {})

    def _copy(self, module: nn.Module, tensors: Mapping[int, Tensor], made: dict[int, nn.Module]) -> nn.Module:
        if id(module) not in made:
            twin = made[id(module)] = bare_copy(module, tensors)
            for name in module._modules:
                child = self._children.get((id(module), name))
                twin._modules[name] = None if child is None else self._copy(child, tensors, made)
        return made[id(module)]

    @property
    def tied_with_embedding(self) -> list[str]:
        """The input embedding and the modules that read the same weight, in model order; nothing where none does."""
        weight = getattr(self.modules.get(self.embedding_path or ""), "weight", None)
        paths = [c.path for c in self.owners if weight is not None and _owns(self.modules[c.path], weight)]
        return paths if len(paths) > 1 else []

    def untied_by(self, targets: Sequence[str]) -> tuple[str, ...]:
        """Return the warning about modules that share one weight in the base, of which only some are targets."""
        tied = self.tied_with_embedding
        kept = [path for path in tied if path not in targets]
        if not kept or len(kept) == len(tied):
            return ()
        own = " and ".join(path for path in tied if path in targets)
        return (f"{own} shares its weight with {' and '.join(kept)} in the base, which keeps the base's",)

    def path_of(self, module: nn.Module | None) -> str | None:
        """Return where a frozen module is, None if it is nowhere."""
        return next((path for path, found in self.modules.items() if found is module and module is not None), None)

    def check_called(self, parts: Iterable[Part]) -> None:
        """Raise if a module that is never called is the only one to read something that an adapter trains.

        Raises:
            TargetError: which, and those that are called in its place.
        """
        parts = list(parts)
        read = {id(p) for part in parts if part.path not in self.lenders for _, p in part.parameters()}
        for part in parts:
            if any(id(p) not in read for _, p in part.parameters()):
                raise TargetError(
                    f"adapter: {part.path} only lends its weight to {' and '.join(self.lenders[part.path])} in "
                    f"{self.base.name} and is never called: what is trained on it alone would change nothing. Name those."
                )

    def choose_named(
        self, names: str | Sequence[str], setting: str, reach: Reach, candidates: Sequence[Candidate] | None = None
    ) -> tuple[str, ...]:
        """Return the modules that another setting than target_modules names.

        Raises:
            TargetError: as in `choose`, under that setting's name.
        """
        candidates = self.candidates if candidates is None else candidates
        try:
            return choose_targets(candidates, names, model_name=self.base.name, reach=reach).paths
        except TargetError as error:
            raise TargetError(str(error).replace("adapter.target_modules", f"adapter.{setting}")) from None

    def choose(
        self,
        settings: Targeted,
        reach: Reach = ON_LINEAR,
        *,
        default: Sequence[str] = (),
        candidates: Sequence[Candidate] | None = None,
    ) -> Match:
        """Return the modules that an adapter's target settings name.

        Args:
            reach: what the method goes on.
            default: the paths that it chooses where the settings name none.
            candidates: what is chosen from. Default: the layers that `onebase targets` lists.

        Raises:
            TargetError: they name a module that is not there, or that the method does not go on, or none.
        """
        named = list(default) if settings.target_modules is None else settings.target_modules
        return choose_targets(
            self.candidates if candidates is None else candidates,
            named,
            exclude_modules=settings.exclude_modules,
            layers_to_transform=settings.layers_to_transform,
            layers_pattern=settings.layers_pattern,
            model_name=self.base.name,
            reach=reach,
        )


def bare_copy(module: nn.Module, tensors: Mapping[int, Tensor]) -> nn.Module:
    """Return a module like `module` with tensors exchanged by identity; its children are the same, in a list of its own."""
    twin = module.__class__.__new__(module.__class__)
    twin.__dict__ = dict(module.__dict__)
    for kind in ("_parameters", "_buffers"):
        own = {name: t if t is None else tensors.get(id(t), t) for name, t in module.__dict__[kind].items()}
        twin.__dict__[kind] = own
    twin.__dict__["_modules"] = dict(module._modules)
    if isinstance(module, nn.RNNBase):  # it holds its weights a second time
        twin.__dict__["_flat_weights"] = [getattr(twin, name) for name in module._flat_weights_names]
    return twin


def _owns(module: nn.Module, weight: Tensor) -> bool:
    return getattr(module, "weight", None) is weight


def _unavailable(kind: str) -> str:
    """Return what to call a module that no adapter goes on now: some look like those it goes on."""
    reasons = {"linear": "linear, but never called", "embedding": "embedding of something other than tokens' ids"}
    return reasons.get(kind, kind)
