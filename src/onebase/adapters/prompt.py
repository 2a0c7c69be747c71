"""Prompt tuning: trained virtual tokens before every sequence, y = f([P; E(x)]) with the rows of P as embeddings.

Trained: num_virtual_tokens * dim numbers, whatever the model's depth. Not a no-op at the start: a fresh prompt already
changes what the base says. Source: arXiv:2104.08691 sec. 2; first values: sec. 3.2.

In a batch the virtual tokens are placeholder ids past the vocabulary (`Bank.virtual_ids`), so nothing but the part on
the input embedding knows of them. A learned row takes the place of what the embedding module returns: where the module
itself scales (Gemma) the row is not scaled, where the model does afterwards (Granite) it is. PEFT's `inputs_embeds`
go the same way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebase.adapters.part import Built, RowCall
from onebase.base import memory
from onebase.base.check import probe_route
from onebase.config.methods import PrefixTuning, PromptTuning
from onebase.errors import ConfigError, TargetError
from onebase.ops.keyed import mix
from onebase.ops.layout import Layout, Node

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from onebase.adapters.places import Places

NAME = "prompt_embeddings"
"""What PEFT calls the one tensor of a prompt method, without any module's path."""


def as_known_ids(ids: Tensor, vocabulary: int) -> Tensor:
    """Return ids that the frozen embedding knows: 0 in place of each placeholder."""
    return torch.where(ids < vocabulary, ids, 0)


@dataclass(frozen=True, eq=False)
class PromptPart:
    """One adapter's virtual tokens on the input embedding: `prompt_embeddings` is (num_virtual_tokens, dim), fp32."""

    path: str
    prompt_embeddings: nn.Parameter
    vocabulary: int

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the tensor under the name of PEFT's format, which has no path."""
        yield NAME, self.prompt_embeddings

    def on_input(self, x: Tensor) -> Tensor:
        """Return ids that the frozen embedding knows."""
        return as_known_ids(x, self.vocabulary)

    def on_output(self, y: Tensor, call: RowCall) -> Tensor:
        """Return the embeddings with the learned row i where the id is the vocabulary's size + i."""
        number = call.x - self.vocabulary
        learned = F.embedding(number.clamp(min=0), self.prompt_embeddings).to(y.dtype)
        return torch.where((number >= 0)[:, None], learned, y)


def build(places: Places, settings: PromptTuning, seed: int) -> Built:
    """Return a new adapter's virtual tokens.

    Raises:
        TargetError: the base has no input embedding that tokens alone go through.
        ConfigError: the text to start from cannot be read, or virtual tokens leave no room for others.
        CapacityError: there is no memory for them.
    """
    path = embedding_path(places, settings)
    embedding = places.module(path)
    width, vocabulary = int(embedding.embedding_dim), int(embedding.num_embeddings)
    count = settings.num_virtual_tokens
    memory.check_room_for("the adapter", 4 * count * width, "Set a smaller adapter.num_virtual_tokens.")
    draws = torch.Generator().manual_seed(mix(seed, NAME) >> 1)
    if settings.prompt_tuning_init == "RANDOM":
        start = torch.empty(count, width).normal_(generator=draws)
    else:
        text = settings.prompt_tuning_init_text
        ids = (
            torch.randint(0, vocabulary, (count,), generator=draws)
            if settings.prompt_tuning_init == "SAMPLE_VOCAB" or text is None
            else text_ids(places, text, count)
        )
        with torch.no_grad():
            start = embedding(ids.to(places.base.device)).float()
    part = PromptPart(path, nn.Parameter(start.to(places.base.device)), vocabulary)
    return Built((part,), (), virtual_tokens=count)


def embedding_path(places: Places, settings: PromptTuning | PrefixTuning) -> str:
    """Return where the input embedding is, which the virtual tokens of a prompt method go through.

    Raises:
        TargetError: there is none, or more than one.
        ConfigError: virtual tokens leave no room for others.
    """
    base = places.base
    path = places.embedding_path
    if path is None or base.layout_kind == "native":
        raise TargetError(
            f"adapter.method: {settings.method} puts virtual tokens before one sequence of tokens, but {base.name} "
            f"({type(base.model).__name__}) reads none: {base.why_native or 'it has no input embedding'}. Use lora."
        )
    others = _other_readers(places, path)
    if others:
        raise TargetError(
            f"adapter.method: {settings.method} puts tokens before a sequence that are in no vocabulary, but {base.name} "
            f"({type(base.model).__name__}) reads token ids in {', '.join(others)} too, which has no row for them. Use lora."
        )
    if base.max_length is not None and settings.num_virtual_tokens >= base.max_length:
        raise ConfigError(
            f"adapter.num_virtual_tokens: must leave room in the {base.max_length} tokens that {base.name} takes, "
            f"got {settings.num_virtual_tokens}."
        )
    return path


@torch.no_grad()
def _other_readers(places: Places, path: str) -> list[str]:
    """Return the other embeddings that the base looks token ids up in (Gemma 3n's of every layer), by trying it."""
    vocabulary = int(places.module(path).num_embeddings)
    ids, found, hooks = [vocabulary - 1, vocabulary - 2], [], []

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def note(module: nn.Module, given: tuple[Any, ...]) -> None:
            if given and isinstance(given[0], Tensor) and given[0].flatten().tolist() == ids:
                found.append(name)

        return note

    for name, module in places.modules.items():
        if isinstance(module, nn.Embedding) and name != path:
            hooks.append(module.register_forward_pre_hook(watch(name)))
    try:
        places.base.hidden(torch.tensor(ids), probe_route(places.base, Layout([Node(2)])))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def text_ids(places: Places, text: str, count: int) -> Tensor:
    """Return a text's tokens, with the special ones that its tokenizer adds, repeated or cut to `count`.

    Raises:
        ConfigError: the base has no tokenizer, or the text no token.
    """
    tokenizer = places.base.tokenizer
    ids: list[int] = [] if tokenizer is None else list(tokenizer(text)["input_ids"])
    if not ids:
        why = f"{places.base.name} has no tokenizer to read it with" if tokenizer is None else "the text has no tokens"
        raise ConfigError(
            f"adapter.prompt_tuning_init_text: {why}. Set another text, or prompt_tuning_init: SAMPLE_VOCAB."
        )
    return torch.tensor((ids * -(-count // len(ids)))[:count])
