"""Attention over a flat batch: every token attends within its own example and the prefixes it shares.

`reference` is the meaning, a loop over nodes with the softmax written out. `flat_attention` is what runs. In fp32 on a CPU
that is attention.c: queries, keys and values are read where the model's layers left them, nothing is padded, and forward
and backward are one call each. Elsewhere, and with a soft cap, tokens are moved into the layout's slots (one copy of
whole rows, those of a prefix to every example behind it), each group is one call of torch's scaled_dot_product_attention,
and the result is moved back. A causal group without ancestors needs no mask there: its padding lies after every real
token. Registered with the model by base/flat.py.

Source: FlashAttention-2, arXiv:2307.08691 sec. 3.1; online softmax, arXiv:1805.02867.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from onebase.ops import native
from onebase.ops.layout import Group, Layout
from onebase.ops.pieces import pieces_of
from onebase.ops.rows import rows_of_slots, slots_of


@dataclass(frozen=True)
class AttentionRule:
    """What a layer's attention does besides the tree: causal or not, scale, window and soft cap (None: without)."""

    causal: bool
    scale: float | None = None
    window: int | None = None
    soft_cap: float | None = None


def reference(
    query: Float[Tensor, "heads tokens dim"],
    key: Float[Tensor, "kv_heads tokens dim"],
    value: Float[Tensor, "kv_heads tokens dim_v"],
    layout: Layout,
    rule: AttentionRule,
) -> Float[Tensor, "tokens heads dim_v"]:
    """Return softmax(scale * q k^T) v of each node over its ancestors and itself: the meaning of `flat_attention`."""
    repeat = query.shape[0] // key.shape[0]
    key, value = key.repeat_interleave(repeat, 0), value.repeat_interleave(repeat, 0)
    pieces = []
    for index, (start, node) in enumerate(zip(layout.starts, layout.nodes, strict=True)):
        own = list(range(start, start + node.length))
        rows = layout.ancestor_rows(index) + own
        scores = query[:, own] @ key[:, rows].transpose(1, 2) * _scale(query, rule)
        if rule.soft_cap is not None:
            scores = rule.soft_cap * torch.tanh(scores / rule.soft_cap)
        distance = torch.arange(node.length)[:, None] + (len(rows) - node.length) - torch.arange(len(rows))[None]
        scores = scores.masked_fill(~_allowed(distance, rule).to(scores.device), float("-inf"))
        pieces.append(torch.softmax(at_least_fp32(scores), -1).to(value.dtype) @ value[:, rows])
    return torch.cat(pieces, 1).transpose(0, 1)


def flat_attention(
    query: Float[Tensor, "heads tokens dim"],
    key: Float[Tensor, "kv_heads tokens dim"],
    value: Float[Tensor, "kv_heads tokens dim_v"],
    layout: Layout,
    rule: AttentionRule,
) -> Float[Tensor, "tokens heads dim_v"]:
    """Return every token's attention over its own example; equal to `reference`."""
    query, key, value = (part.transpose(0, 1) for part in (query, key, value))
    if rule.soft_cap is None and native.fits_attention(query, key, value):
        out: Tensor = _Attention.apply(query, key, value, layout, rule)  # type: ignore[no-untyped-call]
        return out
    return slot_attention(query, key, value, layout, rule)


def slot_attention(
    query: Float[Tensor, "tokens heads dim"],
    key: Float[Tensor, "tokens kv_heads dim"],
    value: Float[Tensor, "tokens kv_heads dim_v"],
    layout: Layout,
    rule: AttentionRule,
) -> Float[Tensor, "tokens heads dim_v"]:
    """Return what `flat_attention` does, by padded slots and torch's own attention."""
    q = slots_of(query, layout, ancestors=False)
    k, v = (slots_of(part, layout, ancestors=True) for part in (key, value))
    outputs = []
    for number, group in enumerate(layout.groups):
        plain = rule.causal and group.ancestors is None and (rule.window is None or group.width <= rule.window)
        mask = None
        if not plain:  # the same in every layer that has the same rule
            mask = layout.once((number, rule, query.device), partial(_group_mask, group, rule, query.device))
        own = [part[number].transpose(1, 2) for part in (q, k, v)]
        outputs.append(_group_attention(own[0], own[1], own[2], rule, mask))
    return rows_of_slots(tuple(outputs), layout)


def masked_attention(
    query: Float[Tensor, "batch heads queries dim"],
    key: Float[Tensor, "batch kv_heads keys dim"],
    value: Float[Tensor, "batch kv_heads keys dim_v"],
    mask: Bool[Tensor, "#batch #heads queries keys"] | None,
    rule: AttentionRule,
    dropout: float = 0.0,
) -> Float[Tensor, "batch queries heads dim_v"]:
    """Return softmax(scale * q k^T) v where the mask is true, for batches with a mask of their own.

    The mask holds causality, window and padding; None: every key, or those before a query if several are causal. A
    query that may see nothing is padding: it sees everything, so that no row holds a NaN. `dropout` of the softmax's
    numbers are drawn to 0, from torch's global generator.
    """
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    if mask is None and rule.causal and query.shape[2] > 1:
        mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device).tril()[None, None]
    if mask is not None:
        mask = mask | ~mask.any(-1, keepdim=True)
    if rule.soft_cap is None:
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout, scale=rule.scale)
        return out.transpose(1, 2)
    scores = rule.soft_cap * torch.tanh(query @ key.transpose(2, 3) * (_scale(query, rule) / rule.soft_cap))
    scores = at_least_fp32(scores)
    scores = scores if mask is None else scores.masked_fill(~mask, float("-inf"))
    return (F.dropout(torch.softmax(scores, -1), dropout).to(value.dtype) @ value).transpose(1, 2)


class _Attention(torch.autograd.Function):
    """attention.c on (tokens, heads, size); kept are the inputs, the output and two numbers a query and head."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: AttentionRule) -> Tensor:
        pieces = layout.once(("pieces", rule.causal), partial(pieces_of, layout, causal=rule.causal))
        kinds: dict[str, Any] = {"causal": rule.causal, "window": rule.window, "scale": _scale(query, rule)}
        out, softmax = native.attention((query, key, value), pieces, **kinds)
        ctx.pieces, ctx.kinds = pieces, kinds
        ctx.save_for_backward(query, key, value, out, softmax)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return *native.attention_gradient(grad, ctx.saved_tensors, ctx.pieces, **ctx.kinds), None, None


def _group_attention(q: Tensor, k: Tensor, v: Tensor, rule: AttentionRule, mask: Tensor | None) -> Tensor:
    """Return one group's output, (count * width, heads, dim_v); without a mask every key up to the query's own is seen."""
    repeat = q.shape[1] // k.shape[1]
    grouped = rule.soft_cap is None and q.device.type == "cpu"  # torch's kernel there reads shared heads where they lie
    if repeat > 1 and not grouped:
        k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    if rule.soft_cap is None:
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=rule.scale, enable_gqa=grouped and repeat > 1
        )
    else:
        scores = rule.soft_cap * torch.tanh(q @ k.transpose(2, 3) * (_scale(q, rule) / rule.soft_cap))
        seen = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).tril() if mask is None else mask
        out = torch.softmax(at_least_fp32(scores).masked_fill(~seen, float("-inf")), -1).to(v.dtype) @ v
    return out.transpose(1, 2).flatten(0, 1)


def _group_mask(group: Group, rule: AttentionRule, device: torch.device) -> Bool[Tensor, "count 1 width keys"]:
    """Return which key each query may see; a padded query sees its node's first token, so that no row is empty."""
    prefix = 0 if group.ancestors is None else group.ancestors.shape[1]
    own = torch.arange(group.width)
    before = group.ancestor_count[:, None]
    key_position = torch.cat(
        [torch.arange(prefix).expand(group.count, prefix), before + own.expand(group.count, group.width)], 1
    )
    real = torch.cat(
        [
            torch.arange(prefix).expand(group.count, prefix) < before,
            own.expand(group.count, group.width) < group.lengths[:, None],
        ],
        1,
    )
    query_position = before + own
    mask = _allowed(query_position[:, :, None] - key_position[:, None, :], rule) & real[:, None, :]
    padded = own >= group.lengths[:, None]
    mask[..., prefix] |= padded
    return mask[:, None].to(device)


def _allowed(distance: Tensor, rule: AttentionRule) -> Tensor:
    """Return whether a query may see a key `distance` positions before it."""
    allowed = distance >= 0 if rule.causal else torch.ones_like(distance, dtype=torch.bool)
    if rule.window is not None:
        allowed = allowed & (distance < rule.window)
        if not rule.causal:
            allowed = allowed & (distance > -rule.window)
    return allowed


def at_least_fp32(numbers: Tensor) -> Tensor:
    """Return the numbers in fp32, or as they are when they are finer."""
    return numbers.to(torch.promote_types(numbers.dtype, torch.float32))


def _scale(query: Tensor, rule: AttentionRule) -> float:
    return float(query.shape[-1] ** -0.5) if rule.scale is None else rule.scale
