"""Attention for flat batches inside models that we do not own.

transformers looks a model's attention up in a registry, by name; a name without a registered mask gets no dense mask.
`flat_attention_of(slot)` is the function registered for one base: it reads the layout of the current route and what
the layer says of itself (causal, scale, window, soft cap). An argument that it does not know and that is not None
raises `NotFlatError`: the model then runs padded, it is never guessed at. Which of the two holds is decided by
base/check.py when a base is made, not by a list of names.

A route may have memories: learned keys and values (prefix tuning) in place of those computed at some rows. In a model's
own padded and cached batches `memory_attention_of(slot)` puts them there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from onebase.base.route import Slot
from onebase.ops.attention import AttentionRule, flat_attention, masked_attention
from onebase.ops.memory import fits, take_places, take_places_

AttentionFunction = Callable[..., tuple[Tensor, None]]

# What models pass down to attention and what has no meaning for it here: positions are applied before, nothing is cached.
_WITHOUT_MEANING = frozenset(
    {
        "position_ids",
        "position_embeddings",
        "cache_position",
        "use_cache",
        "past_key_values",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "return_dict",
        "num_items_in_batch",
        "deterministic",
        "logits_to_keep",
    }
)


class NotFlatError(RuntimeError):
    """A model's attention wants something that the flat layout does not offer."""


def flat_attention_of(slot: Slot) -> AttentionFunction:
    """Return the attention function of the base that owns `slot`, in the form that transformers calls."""

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        layout = None if slot.route is None else slot.route.layout
        if layout is None:
            raise NotFlatError("flat attention was called without a layout in the route")
        rule = _rule_of(module, arguments)
        if attention_mask is not None or query.shape[0] != 1:
            raise NotFlatError(f"{type(module).__name__} brings a mask, or a batch of several rows")
        if query.shape[2] != layout.token_count or key.shape[2] != layout.token_count:
            raise NotFlatError(
                f"{type(module).__name__} attends {query.shape[2]} queries to {key.shape[2]} keys; the layout holds "
                f"{layout.token_count} tokens"
            )
        key, value = _with_memories(module, key, value, slot)
        return flat_attention(query[0], key[0], value[0], layout, rule)[None], None

    return attend


def memory_attention_of(slot: Slot) -> AttentionFunction:
    """Return attention for batches as transformers lays them out, padded and cached, under a route with memories.

    In the first forward of a sequence the learned keys and values are written into the tensors themselves, which are
    what a cache keeps, so that later forwards find them there, with their gradient where one is wanted. Views, which a
    cache never is, are replaced then: autograd forbids writing into some of them (the pieces of a split).
    """

    def attend(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **arguments: Any,
    ) -> tuple[Tensor, None]:
        dropout = float(arguments.pop("dropout", 0.0))
        rule = _rule_of(module, arguments)
        if query.shape[2] > 1 and key.shape[2] != query.shape[2] and slot.route is not None and slot.route.memories:
            raise NotFlatError(
                f"{query.shape[2]} tokens meet a cache of {key.shape[2]} keys: the learned keys of prefix tuning need a "
                "cache that grows (cache_implementation: dynamic)"
            )
        if key.shape[2] == query.shape[2]:
            in_place = not (torch.is_grad_enabled() and (key._is_view() or value._is_view()))
            key, value = _with_memories(module, key, value, slot, in_place=in_place)
        return masked_attention(query, key, value, attention_mask, rule, dropout), None

    return attend


def _with_memories(
    module: nn.Module, key: Tensor, value: Tensor, slot: Slot, *, in_place: bool = False
) -> tuple[Tensor, Tensor]:
    """Return a layer's keys and values with the route's learned ones in their places.

    Raises:
        NotFlatError: the layer does not say which one it is, or its keys have another shape.
    """
    memories = () if slot.route is None else slot.route.memories
    for memory in memories:
        layer = getattr(module, "layer_idx", None)
        if not isinstance(layer, int):
            raise NotFlatError(f"{type(module).__name__} does not say which layer it is")
        if not fits(memory, key, value, layer):
            raise NotFlatError(
                f"{type(module).__name__} of layer {layer} has keys {tuple(key.shape)} and values {tuple(value.shape)}, "
                f"the learned ones are {tuple(memory.keys.shape)}"
            )
        starts = memory.starts(key.shape[0])
        if in_place:
            take_places_(key, memory.keys[layer], starts)
            take_places_(value, memory.values[layer], starts)
            continue
        key = take_places(key, memory.keys[layer], starts)
        value = take_places(value, memory.values[layer], starts)
    return key, value


def _rule_of(module: nn.Module, arguments: dict[str, Any]) -> AttentionRule:
    """Return what a layer's attention does, from the arguments that transformers passes.

    Raises:
        NotFlatError: there is an argument with a meaning that the flat layout does not have.
    """
    given = {name: value for name, value in arguments.items() if value is not None and name not in _WITHOUT_MEANING}
    causal = given.pop("is_causal", getattr(module, "is_causal", True))
    rule = AttentionRule(
        causal=bool(causal),
        scale=given.pop("scaling", None),
        window=given.pop("sliding_window", None),
        soft_cap=given.pop("softcap", None),
    )
    if given.pop("dropout", 0.0):
        raise NotFlatError(f"{type(module).__name__} drops attention weights: the base must be in evaluation mode")
    if given:
        raise NotFlatError(f"{type(module).__name__} attends with {', '.join(sorted(given))}")
    return rule
