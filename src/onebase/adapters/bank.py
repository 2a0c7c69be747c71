"""The bank: the adapters on one base, and the route of a batch to them.

A bank puts wrappers around the base's target modules, once each, and numbers its adapters. One adapter is a bank of
one: there is no other way to run one. The base's weights are never written; removing the last adapter of a layer puts
the frozen module itself back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor, nn

from onebase.adapters.build import build
from onebase.adapters.layer import AdaptedLayer, path_key
from onebase.adapters.part import DropoutPart, FilePart, MemoryPart, Part, PartWithConstants
from onebase.adapters.places import Places
from onebase.adapters.tokens import EmbeddingRows
from onebase.base.model import Base, padded_rows, padded_segments
from onebase.base.route import Route, RowSpace
from onebase.config.methods import AdapterSettings
from onebase.errors import ConfigError, FileFormatError, TargetError, list_problems
from onebase.ops.keyed import mix_rows
from onebase.ops.layout import NO_PARENT, Layout
from onebase.ops.loss import HeadRecord
from onebase.ops.memory import Memory
from onebase.ops.segments import NO_OWNER, Segments


@dataclass(frozen=True, eq=False)
class Adapter:
    """What one fine-tune learns: its settings and its parts, in model order.

    `seed` gave the first values and keys its dropout. `target_paths` are the modules that its target settings name.
    `warnings` are what those settings leave to be said. `virtual_tokens` of its own stand before every sequence.
    """

    name: str
    settings: AdapterSettings
    seed: int
    parts: tuple[Part, ...]
    target_paths: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    virtual_tokens: int = 0

    def __repr__(self) -> str:
        """Return what it is on one line, without its tensors and the names of its targets."""
        return (
            f"Adapter({self.name!r}, method={self.settings.method!r}, {self.parameter_count:,} parameters in "
            f"{len(self.parts):,} parts)"
        )

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield every trained tensor with its name, in model order; one that several parts share, once."""
        seen: set[int] = set()
        for part in self.parts:
            for name, parameter in part.parameters():
                if id(parameter) not in seen:
                    seen.add(id(parameter))
                    yield name, parameter

    @property
    def parameter_count(self) -> int:
        """Number of trained numbers."""
        return sum(p.numel() for _, p in self.parameters())

    @property
    def state(self) -> dict[str, Tensor]:
        """The tensors by name, detached: what is trained, and what belongs to it untrained."""
        trained = {name: p.detach() for name, p in self.parameters()}
        return trained | {
            name: tensor
            for part in self.parts
            if isinstance(part, PartWithConstants)
            for name, tensor in part.constants()
        }

    @property
    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors that a file of this adapter holds, by name: its state, or what a part says instead."""
        files = [part for part in self.parts if isinstance(part, FilePart)]
        inside = {name for part in files for name, _ in part.parameters()}
        inside |= {n for part in files if isinstance(part, PartWithConstants) for n, _ in part.constants()}
        rest = {name: tensor for name, tensor in self.state.items() if name not in inside}
        return rest | {name: tensor for part in files for name, tensor in part.file_tensors()}

    @torch.no_grad()
    def load_state_(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy tensors into the adapter's own.

        Raises:
            FileFormatError: missing or unexpected names, or shapes that differ; nothing is copied then.
        """
        own = self.state
        problems = [f"{name} is missing." for name in own if name not in tensors]
        problems += [
            f"{name} belongs to no target of this adapter on this base." for name in tensors if name not in own
        ]
        problems += [
            f"{name} must have shape {tuple(own[name].shape)}, got {tuple(tensor.shape)}."
            for name, tensor in tensors.items()
            if name in own and own[name].shape != tensor.shape
        ]
        if problems:
            raise FileFormatError(list_problems(f"the tensors of adapter {self.name!r}", problems, shown=10))
        for name, tensor in own.items():
            tensor.copy_(tensors[name])

    @property
    def may_rest(self) -> frozenset[str]:
        """The names of trained tensors that a batch may leave alone: rows of tokens that it has none of, experts."""
        rests = {id(p) for part in self.parts for _, p in part.parameters() if _may_rest(part)}
        rests -= {id(p) for part in self.parts for _, p in part.parameters() if not _may_rest(part)}
        return frozenset(name for name, p in self.parameters() if id(p) in rests)

    @cached_property
    def drops_out(self) -> bool:
        """Whether any of its parts has dropout."""
        return any(part.dropout > 0 for part in self.parts if isinstance(part, DropoutPart))


class Bank:
    """Adapters on one base. At most one bank is on a base at a time.

    `keys_dropout` says that whoever runs the base natively keys the dropout of its forwards (`Route.dropout_key`).
    """

    def __init__(self, base: Base, *, keys_dropout: bool = False) -> None:
        if any(isinstance(module, AdaptedLayer) for module in base.model.modules()):
            raise ConfigError(f"{base.name} already has a bank: add the adapter to that one.")
        self.base, self._keys_dropout = base, keys_dropout
        self._adapters: dict[str, Adapter] = {}
        self._numbers: dict[str, int] = {}
        self._layers: dict[str, AdaptedLayer] = {}
        self.places = Places(base)

    @property
    def adapters(self) -> Mapping[str, Adapter]:
        """The adapters by name, in the order of their adding."""
        return dict(self._adapters)

    def add(
        self, name: str, settings: AdapterSettings, *, seed: int = 0, tensors: Mapping[str, Tensor] | None = None
    ) -> Adapter:
        """Put a new adapter on the base and return it; with `tensors`, one that was trained before.

        Raises:
            ConfigError: the name is taken, or is none that a folder may have.
            TargetError: the settings name a module that is not there, or none.
            FileFormatError: `tensors` are not those of this adapter on this base.
        """
        _check_name(name)
        if name in self._adapters:
            raise ConfigError(f"adapter {name!r} is in the bank already: choose another name, or remove it first.")
        built = build(self.places, settings, seed)
        self.places.check_called(built.parts)
        if built.refusals and tensors is None:
            raise TargetError(list_problems("adapter", built.refusals))
        if built.heads:
            saved = [*(settings.modules_to_save or ()), *built.heads]
            settings = settings.model_copy(update={"modules_to_save": saved})
        begins_with_its_head = bool(self.base.head_note) and tensors is None  # what is trained already has its own
        warnings = (*([self.base.head_note] if begins_with_its_head else []), *built.warnings)
        adapter = Adapter(name, settings, seed, built.parts, built.target_paths, warnings, built.virtual_tokens)
        native = self.base.layout_kind == "native" and not self._keys_dropout
        if adapter.drops_out and tensors is None and native:
            raise ConfigError(
                f"adapter.lora_dropout: {self.base.name} runs as it is ({self.base.why_native}), where no dropout is "
                "computed. Set it to 0."
            )
        if tensors is not None:
            adapter.load_state_(tensors)
        number = self._free_number()
        for part in adapter.parts:
            self._wrap(part.path).put(number, part)
        self._adapters[name], self._numbers[name] = adapter, number
        return adapter

    def remove(self, name: str) -> None:
        """Take an adapter off the base; layers without any adapter become the frozen modules again."""
        self._adapter(name)
        number = self._numbers.pop(name)
        for path in dict.fromkeys(part.path for part in self._adapters.pop(name).parts):
            layer = self._layers[path]
            layer.take_off(number)
            if layer.is_bare:
                self.places.put(path, self._layers.pop(path).base_layer)

    @contextmanager
    def learning(self, name: str) -> Iterator[None]:
        """Let one adapter's tensors alone require gradients, so that a backward makes and keeps none for the others."""
        others = [p for other, adapter in self._adapters.items() if other != name for _, p in adapter.parameters()]
        before = [p.requires_grad for p in others]
        for parameter in others:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter, required in zip(others, before, strict=True):
                parameter.requires_grad_(required)

    def route(self, layout: Layout, *, label_rows: Tensor | None = None, dropout_step: int | None = None) -> Route:
        """Return the route of a flat batch: each node's rows go to the adapter that owns it.

        Args:
            label_rows: the labelled rows, for dropout on an adapted head.
            dropout_step: the step that keys dropout; None switches dropout off.
        """
        owners = [NO_OWNER if node.owner is None else self._number(node.owner) for node in layout.nodes]
        lengths = [node.length for node in layout.nodes]
        if self.base.layout_kind == "padded":
            lengths, nodes = padded_segments(layout)
            token = Segments.of(lengths, [owners[i] for i in nodes])
        else:
            token = Segments.of(lengths, owners)
        label = Segments.of([node.labels for node in layout.nodes], owners)
        examples = [owners[i] for i in padded_segments(layout)[1]]
        example = Segments.of([1] * len(examples), examples)
        keys: dict[RowSpace, Tensor] = {}
        if dropout_step is not None and any(a.drops_out for a in self._adapters.values()):
            seeds = [0 if node.owner is None else self._adapters[node.owner].seed for node in layout.nodes]
            token_keys = layout.row_keys(seeds, dropout_step)
            if label_rows is not None:
                head_key = path_key(self.places.head_path or "")
                keys[RowSpace.LABEL] = mix_rows(token_keys[label_rows], head_key).to(self.base.device)
            ends = [layout.starts[i] + layout.nodes[i].length - 1 for i in layout.leaves]
            keys[RowSpace.EXAMPLE] = token_keys[ends].to(self.base.device)
            if self.base.layout_kind == "padded":
                token_keys = token_keys[padded_rows(layout)[0].flatten()]
            keys[RowSpace.TOKEN] = token_keys.to(self.base.device)
        rows = {
            RowSpace.TOKEN: token,
            RowSpace.LABEL: label,
            RowSpace.EXAMPLE: example,
            RowSpace.BATCH: example,
        }
        return Route(layout=layout, rows=rows, row_keys=keys, memories=self._memories(layout))

    def _memories(self, layout: Layout) -> tuple[Memory, ...]:
        """Return the learned keys and values of the adapters in a layout, for the rows of their virtual tokens.

        Raises:
            ValueError: a sequence does not begin with the virtual tokens of its adapter.
        """
        places: dict[str, list[tuple[int, int]]] = {}
        for start, node in zip(layout.starts, layout.nodes, strict=True):
            if node.owner is None or node.parent != NO_PARENT:
                continue
            count = self._adapter(node.owner).virtual_tokens
            if node.virtual != count:
                raise ValueError(f"a sequence of {node.owner!r} begins with {node.virtual} virtual tokens, not {count}")
            places.setdefault(node.owner, []).append((0, start))
        return self._memories_at({owner: tuple(starts) for owner, starts in places.items()})

    def _memories_at(self, places: Mapping[str, tuple[tuple[int, int], ...] | None]) -> tuple[Memory, ...]:
        return tuple(
            part.memory(starts)
            for owner, starts in places.items()
            if self._adapters[owner].virtual_tokens  # asking 210 parts for their kind takes 6 ms
            for part in self._adapters[owner].parts
            if isinstance(part, MemoryPart)
        )

    def virtual_ids(self, name: str | None) -> tuple[int, ...]:
        """Return the placeholder ids that stand before every sequence of an adapter: the first ones past the vocabulary.

        A part on the input embedding knows them by that; no other module ever sees an id.
        """
        count = 0 if name is None else self._adapter(name).virtual_tokens
        return tuple(range(self.base.embedding_rows or 0, (self.base.embedding_rows or 0) + count))

    def max_length(self, name: str | None) -> int | None:
        """Return the most tokens that a sequence of an adapter may have beside its virtual ones, where the base says."""
        limit = self.base.max_length
        return None if limit is None else limit - len(self.virtual_ids(name))

    def sole_route(self, name: str | None, virtual_starts: Sequence[int] | None = None) -> Route:
        """Return the route that gives every row to one adapter (None: to the base alone), whatever the batch."""
        return self.batch_route([name], virtual_starts)

    def batch_route(self, names: Sequence[str | None], virtual_starts: Sequence[int] | None = None) -> Route:
        """Return the route of a batch whose first dimension is its entries: entry i goes to adapter `names[i]`.

        None is the base alone. For images, encoder-decoders, padded batches and any other module that takes entries
        first; `Base.native` runs the model under it. An entry of an adapter with virtual tokens holds `virtual_ids`
        before its own.

        Args:
            virtual_starts: the column of each entry's first virtual token, behind its padding; None: all begin with it.
        """
        owners = tuple(NO_OWNER if name is None else self._number(name) for name in names)
        places: dict[str, tuple[tuple[int, int], ...] | None] = {}
        for name in dict.fromkeys(name for name in names if name is not None):
            if len(names) == 1:
                places[name] = None if virtual_starts is None else tuple(enumerate(virtual_starts))
            else:
                starts = virtual_starts or [0] * len(names)
                places[name] = tuple((i, starts[i]) for i, other in enumerate(names) if other == name)
        return Route(batch_owners=owners, memories=self._memories_at(places))

    @property
    def head(self) -> HeadRecord:
        """The output head as the loss takes it, with the low-rank pairs on it, or whatever else adapters have there.

        Raises:
            ConfigError: the base has no output head.
        """
        head = self.base.head
        if head is None:
            raise ConfigError(
                f"{self.base.name}: a {type(self.base.model).__name__} predicts no tokens, so the tasks chat and text "
                "cannot be learned or measured on it. Choose a causal language model."
            )
        layer = self._layers.get(self.places.head_path or "")
        if layer is None:
            return head
        if layer.is_low_rank:
            return replace(head, update=layer.low_rank)
        learned = {id(p): p for part in layer.parts for _, p in part.parameters()}
        return replace(head, linear=layer.forward_rows, learned=tuple(learned.values()))

    def _number(self, name: str) -> int:
        self._adapter(name)
        return self._numbers[name]

    def _adapter(self, name: str) -> Adapter:
        if name not in self._adapters:
            raise ConfigError(f"no adapter {name!r} in the bank; it has {', '.join(self._adapters) or 'none'}.")
        return self._adapters[name]

    def _free_number(self) -> int:
        used = set(self._numbers.values())
        return next(n for n in range(len(used) + 1) if n not in used)

    def _wrap(self, path: str) -> AdaptedLayer:
        if path not in self._layers:
            module = self.places.module(path)
            layer = AdaptedLayer(
                module,
                path,
                self.places.space(path),
                self.base.slot,
                reads_tokens=self.places.reads_tokens(path),
                tokens_at=self.base.token_axes.get(path),
            )
            layer.train(module.training)
            self.places.put(path, layer)
            self._layers[path] = layer
        return self._layers[path]


def _may_rest(part: Part) -> bool:
    """Return whether a part learns only where its module or its rows are visited."""
    return isinstance(part, EmbeddingRows) or re.search(r"(^|\.)experts\.\d+(\.|$)", part.path) is not None


def _check_name(name: object) -> None:
    """Raise if a name could not be a folder's: an adapter's name becomes one, and must lead nowhere else."""
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.@+-]{0,99}", name):
        raise ConfigError(
            "an adapter's name must begin with a letter, digit or underscore and hold nothing but those and '.', '-', "
            f"'+', '@', at most 100 of them, got {name!r}."
        )
