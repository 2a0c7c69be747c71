"""Parts: what one adapter has on one module, and where in that module's forward it acts.

There are four places, in this order, and a part has one method for each place that it uses:

    x  = on_input(x)            before the module        IA3 on a feed-forward layer, virtual tokens
    y  = instead(module, x)     in place of it           copies (full, LayerNorm tuning, modules_to_save), experts
    y += scaling B A x          beside it                LoRA: `LowRankPart`, all adapters in one routed operation
    y  = on_output(y, call)     after it                 DoRA, IA3, biases, bottlenecks, embeddings, token rows

Each gets the rows of its own adapter and no others. A part never writes to the base. Called by layer.py; a new method
is one file with its part and the function that builds it, and one line in build.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, runtime_checkable

from torch import Tensor, nn

from onebase.errors import ConfigError
from onebase.ops.memory import Memory


@dataclass(frozen=True)
class RowCall:
    """One call of a module for the rows of one adapter: the frozen module, its input rows, and what keys their dropout.

    `others` and `named` are the call's further arguments; `keyword` is the name under which `x` came, where it came
    under one; `row_keys` is None where dropout is off.
    """

    module: nn.Module
    x: Tensor
    others: tuple[object, ...] = ()
    row_keys: Tensor | None = None
    named: Mapping[str, object] = field(default_factory=dict)
    keyword: str | None = None

    def run(self, module: nn.Module) -> Any:
        """Return what `module` makes of the call's arguments."""
        if self.keyword is not None:
            return module(**{self.keyword: self.x}, **self.named)
        return module(self.x, *self.others, **self.named)

    def part(self, start: int, end: int, x: Tensor) -> RowCall:
        """Return the call for the rows from `start` to `end` alone, with `x` as their input."""
        count = self.x.shape[0]
        if (start, end) == (0, count):
            return replace(self, x=x)
        others = tuple(_rows_of(other, count, start, end) for other in self.others)
        named = {name: _rows_of(other, count, start, end) for name, other in self.named.items()}
        keys = None if self.row_keys is None else self.row_keys[start:end]
        return replace(self, x=x, others=others, named=named, row_keys=keys)


def _rows_of(other: object, count: int, start: int, end: int) -> object:
    """Return a further argument for some rows: its own rows where it has one for each, itself otherwise.

    Raises:
        ConfigError: it is something that has rows in a way unknown here.
    """
    if isinstance(other, Tensor):
        return other[start:end] if other.dim() > 0 and other.shape[0] == count else other
    if isinstance(other, tuple | list):
        return type(other)(_rows_of(item, count, start, end) for item in other)
    if isinstance(other, Mapping):
        return {name: _rows_of(item, count, start, end) for name, item in other.items()}
    if other is None or isinstance(other, bool | int | float | str):
        return other
    raise ConfigError(
        f"a batch of several adapters gives a module a {type(other).__name__}, which cannot be split between them. Run "
        "one adapter at a time."
    )


@runtime_checkable
class Part(Protocol):
    """What every part says of itself."""

    @property
    def path(self) -> str:
        """The path of its module in the model."""

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the trained tensors under the names of PEFT's format, without its "base_model.model." in front."""


@runtime_checkable
class InputPart(Part, Protocol):
    """A part that changes what its module gets."""

    def on_input(self, x: Tensor) -> Tensor:
        """Return the rows that the module gets instead of `x`."""


@runtime_checkable
class ModulePart(Part, Protocol):
    """A part that stands in for its module."""

    def instead(self, call: RowCall) -> Any:
        """Return what the module would return if it were this adapter's own."""


@runtime_checkable
class LowRankPart(Part, Protocol):
    """A part whose update all adapters compute in one operation (ops/low_rank.py)."""

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    scaling: float
    dropout: float
    start: tuple[Tensor, Tensor] | None
    """A and B whose product is taken off again (PiSSA, OLoRA)."""


@runtime_checkable
class OutputPart(Part, Protocol):
    """A part that changes what its module returned, updates beside it included."""

    def on_output(self, y: Tensor, call: RowCall) -> Tensor:
        """Return the rows that take the place of `y`."""


@runtime_checkable
class MergeablePart(Part, Protocol):
    """A part that can be written into a plain copy of its module."""

    def merge_(self, module: nn.Module) -> None:
        """Change `module`, a copy of the frozen one, so that alone it does what both do together."""


@runtime_checkable
class PartWithConstants(Part, Protocol):
    """A part that has tensors which belong to the adapter and are not trained."""

    def constants(self) -> Iterator[tuple[str, Tensor]]:
        """Yield them by name."""


@runtime_checkable
class DropoutPart(Part, Protocol):
    """A part that sees only a share of its input in training."""

    @property
    def dropout(self) -> float:
        """The share that it does not see, from 0."""


@runtime_checkable
class MemoryPart(Part, Protocol):
    """A part that gives attention learned keys and values at the rows of the adapter's virtual tokens."""

    def memory(self, places: tuple[tuple[int, int], ...] | None) -> Memory:
        """Return them for the rows at `places`: see `Memory`. Called once a forward."""


@runtime_checkable
class FilePart(Part, Protocol):
    """A part whose file holds other tensors than it trains: a checkpoint has the trained ones."""

    def file_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the file's tensors by name, detached."""


@dataclass(frozen=True)
class Built:
    """A new adapter's parts in model order, which of their modules are its targets, and what a user should be told."""

    parts: tuple[Part, ...]
    target_paths: tuple[str, ...]
    warnings: tuple[str, ...] = ()
    virtual_tokens: int = 0
    heads: tuple[str, ...] = ()
    """The task's own modules that are saved whole, because every adapter brings them."""
    refusals: tuple[str, ...] = ()
    """Why a new adapter must not be so; one that was trained so is taken."""
