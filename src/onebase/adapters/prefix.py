"""Prefix tuning: trained keys and values before every sequence, in every layer, [P_k; K] and [P_v; V].

Trained: num_virtual_tokens * layers * 2 * kv_heads * head_dim numbers. With prefix_projection they are made by a small
network from embeddings, P = W2 tanh(W1 E + b1) + b2, which trains more steadily and holds many more numbers; a file
holds P alone. Not a no-op at the start: it takes attention from the sequence. Without the network, values begin at zero and
keys at normal numbers; with normal values, as in PEFT, the loss begins far above the base's. Source: arXiv:2101.00190
sec. 4.2 and 4.3.

In a batch the virtual tokens are placeholder ids past the vocabulary, as in prompt tuning, so positions and windows
count them as PEFT's `past_key_values` do. At their rows the base computes something of no meaning, which no other row
sees: in each layer attention finds the learned keys and values there (`Route.memories`, base/flat.py). So only a base
that runs flat can have it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from onebase.adapters.part import Built
from onebase.adapters.prompt import NAME, as_known_ids, embedding_path
from onebase.base import memory
from onebase.base.check import probe_route
from onebase.base.flat import NotFlatError
from onebase.config.methods import PrefixTuning
from onebase.errors import TargetError
from onebase.ops.keyed import mix
from onebase.ops.layout import Layout, Node
from onebase.ops.memory import Memory

if TYPE_CHECKING:
    from onebase.adapters.places import Places
    from onebase.base.model import Base


@dataclass(frozen=True)
class KeyShape:
    """The keys of a base: so many layers, each with `kv_heads` of `width` numbers; values have the same."""

    layers: int
    kv_heads: int
    width: int

    @property
    def layer_numbers(self) -> int:
        """Numbers of one token's keys in one layer."""
        return self.kv_heads * self.width

    @property
    def token_numbers(self) -> int:
        """Numbers of one token's keys and values in all layers: layer by layer, keys before values."""
        return 2 * self.layers * self.layer_numbers


@dataclass(frozen=True, eq=False)
class PrefixPart:
    """One adapter's keys and values, or the network that makes them.

    `network` is empty where `embedding` (num_virtual_tokens, token_numbers) is what a file holds; otherwise it holds
    the weights and biases of two layers, and `embedding` is (num_virtual_tokens, layer_numbers).
    """

    path: str
    shape: KeyShape
    embedding: nn.Parameter
    network: Mapping[str, nn.Parameter]
    vocabulary: int

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield PEFT's one tensor, or what it is made from under the names that PEFT's module has."""
        yield ("prompt_encoder.embedding.weight" if self.network else NAME), self.embedding
        for name, parameter in self.network.items():
            yield f"prompt_encoder.transform.{name}", parameter

    def on_input(self, x: Tensor) -> Tensor:
        """Return ids that the frozen embedding knows."""
        return as_known_ids(x, self.vocabulary)

    def prompt_embeddings(self) -> Tensor:
        """Return (num_virtual_tokens, token_numbers): the learned keys and values."""
        if not self.network:
            return self.embedding
        w = self.network
        inner = torch.tanh(nn.functional.linear(self.embedding, w["0.weight"], w["0.bias"]))
        return nn.functional.linear(inner, w["2.weight"], w["2.bias"])

    def memory(self, places: tuple[tuple[int, int], ...] | None) -> Memory:
        """Return the keys and values for the rows where the virtual tokens stand."""
        return memory_of(self.prompt_embeddings(), self.shape, places)

    @torch.no_grad()
    def file_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield what PEFT's file holds: the keys and values, without the network."""
        yield NAME, self.prompt_embeddings().detach()


def memory_of(learned: Tensor, shape: KeyShape, places: tuple[tuple[int, int], ...] | None) -> Memory:
    """Return learned rows of token_numbers as the memory that attention reads."""
    split = learned.view(-1, shape.layers, 2, shape.kv_heads, shape.width).permute(2, 1, 3, 0, 4)
    return Memory(split[0], split[1], places)


def build(places: Places, settings: PrefixTuning, seed: int) -> Built:
    """Return a new adapter's keys and values.

    Raises:
        TargetError: the base does not run flat, or its attention cannot be given keys and values.
        ConfigError: virtual tokens leave no room for others.
        CapacityError: there is no memory for them.
    """
    base = places.base
    path = embedding_path(places, settings)
    shape = key_shape(base)
    width = shape.layer_numbers if settings.prefix_projection else shape.token_numbers
    hidden = (settings.encoder_hidden_size or shape.layer_numbers) if settings.prefix_projection else 0
    count = settings.num_virtual_tokens
    numbers = count * width + hidden * (width + 1 + shape.token_numbers) + (shape.token_numbers if hidden else 0)
    advice = "Set a smaller adapter.num_virtual_tokens" + (", or encoder_hidden_size." if hidden else ".")
    memory.check_room_for("the adapter", 4 * numbers, advice)
    draws = torch.Generator().manual_seed(mix(seed, NAME) >> 1)

    def linear(name: str, inputs: int, outputs: int) -> Iterator[tuple[str, nn.Parameter]]:
        for kind, size in (("weight", (outputs, inputs)), ("bias", (outputs,))):
            start = torch.empty(size).uniform_(-(inputs**-0.5), inputs**-0.5, generator=draws)
            yield f"{name}.{kind}", nn.Parameter(start.to(base.device))

    start = torch.empty(count, width).normal_(generator=draws)
    if not hidden:
        start.view(count, shape.layers, 2, shape.layer_numbers)[:, :, 1] = 0
    embedding = nn.Parameter(start.to(base.device))
    network = dict([*linear("0", width, hidden), *linear("2", hidden, shape.token_numbers)]) if hidden else {}
    part = PrefixPart(path, shape, embedding, network, base.embedding_rows or 0)
    return Built((part,), (), virtual_tokens=count)


def key_shape(base: Base) -> KeyShape:
    """Return the shape of the base's keys, tried on the base itself.

    Raises:
        TargetError: it has none that learned ones could stand among.
    """
    config: Any = base.model.config.get_text_config()
    heads = int(config.num_attention_heads)
    kv_heads = int(getattr(config, "num_key_value_heads", None) or heads)
    width = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    shape = KeyShape(int(config.num_hidden_layers), kv_heads, width)
    why = "its attention is its own" if base.layout_kind != "flat" else _fault(base, shape)
    if why is not None:
        raise TargetError(
            f"adapter.method: prefix-tuning gives attention learned keys and values, which {base.name} "
            f"({type(base.model).__name__}) cannot take: {why}. Use prompt-tuning, which trains virtual tokens at the "
            "input alone, or lora."
        )
    return shape


@torch.no_grad()
def _fault(base: Base, shape: KeyShape) -> str | None:
    """Return why the base cannot take keys and values of this shape, None if it can."""
    layout = Layout([Node(2, virtual=1)])
    learned = torch.zeros(1, shape.token_numbers, device=base.device)
    route = probe_route(base, layout, (memory_of(learned, shape, ((0, 0),)),))
    try:
        base.hidden(torch.zeros(2, dtype=torch.int64), route)
    except NotFlatError as error:
        return str(error)
    return None
