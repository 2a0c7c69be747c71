"""Attention for flat batches inside models that we do not own.

transformers looks a model's attention up in a registry, by name; a name without a registered mask gets no dense mask.
`flat_attention_of(slot)` is the function registered for one base: it reads the layout of the current route and what
the layer says of itself (causal, scale, window, soft cap). An argument that it does not know and that is not None
raises `NotFlatError`: the model then runs padded, it is never guessed at. Which of the two holds is decided by
base/check.py when a base is made, not by a list of names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from onebase.base.route import Slot
from onebase.ops.attention import AttentionRule, flat_attention

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
        *,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        layout = None if slot.route is None else slot.route.layout
        unknown = sorted(k for k, v in others.items() if v is not None and k not in _WITHOUT_MEANING)
        if layout is None:
            raise NotFlatError("flat attention was called without a layout in the route")
        if unknown or attention_mask is not None or dropout or query.shape[0] != 1:
            raise NotFlatError(
                f"{type(module).__name__} asks for what a flat batch does not offer: "
                f"{', '.join(unknown) or 'a mask, dropout or a batch of several rows'}"
            )
        if query.shape[2] != layout.token_count or key.shape[2] != layout.token_count:
            raise NotFlatError(
                f"{type(module).__name__} attends {query.shape[2]} queries to {key.shape[2]} keys; the layout holds "
                f"{layout.token_count} tokens"
            )
        causal = bool(getattr(module, "is_causal", True)) if is_causal is None else is_causal
        rule = AttentionRule(causal, scaling, sliding_window, softcap)
        return flat_attention(query[0], key[0], value[0], layout, rule)[None], None

    return attend
