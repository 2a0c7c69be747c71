"""The routed low-rank update: every row of a flat batch gets the update of the adapter that owns it.

For rows i owned by adapter k

    y_i += scaling_k * B_k A_k (m_i * x_i)                                        (LoRA, arXiv:2106.09685 eq. 3)

where m_i is the adapter's dropout mask divided by its keep probability (ones when dropout is 0). `reference` is the
meaning; `add_low_rank_` is what runs: it adds in place (0.16 against 0.42 ms at 500 rows), keeps only h = A x for the
backward, and takes every index as a tensor, so that a compiler sees one custom operation whatever the batch.

Cost: 2 * rows * r * (in + out) multiply-adds forward, twice that backward. Called by adapters/layer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from onebase.ops.keyed import keep_mask
from onebase.ops.segments import NO_OWNER, Segments, spans


@dataclass(frozen=True)
class LowRank:
    """The low-rank pairs on one layer, and what of them each owner of a segment uses.

    `pair_of_owner[k]` is the index of owner k's pair, `NO_OWNER` where owner k has none here; an owner beyond its end
    has none either. `lora_A[j]` is (r_j, in), `lora_B[j]` is (out, r_j).
    """

    lora_A: tuple[Tensor, ...]
    lora_B: tuple[Tensor, ...]
    scaling: Float[Tensor, " pairs"]
    dropout: Float[Tensor, " pairs"]
    pair_of_owner: Int64[Tensor, " owners"]


def reference(
    y: Float[Tensor, "rows out"],
    x: Float[Tensor, "rows in"],
    low_rank: LowRank,
    segments: Segments,
    row_keys: Int64[Tensor, " rows"] | None = None,
) -> Float[Tensor, "rows out"]:
    """Return y + scaling * B A (m * x) row by row: the meaning of `add_low_rank_`, as a loop.

    Source: LoRA, arXiv:2106.09685 eq. 3.
    """
    pieces = []
    for start, end, owner in segments:
        pair = _pair_of(owner, low_rank.pair_of_owner.tolist())
        piece = y[start:end]
        if pair != NO_OWNER:
            rows = x[start:end].to(y.dtype)
            p = float(low_rank.dropout[pair])
            if row_keys is not None and p > 0:
                rows = rows * keep_mask(row_keys[start:end], x.shape[1], p) / (1 - p)
            update = rows @ low_rank.lora_A[pair].to(y.dtype).T @ low_rank.lora_B[pair].to(y.dtype).T
            piece = piece + float(low_rank.scaling[pair]) * update
        pieces.append(piece)
    pieces.append(y[segments.row_count :])
    return torch.cat(pieces)


def add_low_rank_(
    y: Float[Tensor, "rows out"],
    x: Float[Tensor, "rows in"],
    low_rank: LowRank,
    segments: Segments,
    row_keys: Int64[Tensor, " rows"] | None = None,
) -> Float[Tensor, "rows out"]:
    """Return `y` after adding, in place, each row's own low-rank update; equal to `reference`.

    Args:
        row_keys: what dropout depends on (ops/keyed.py); None switches dropout off, as in evaluation.
    """
    result: Tensor = _AddLowRank.apply(  # type: ignore[no-untyped-call]
        y,
        x,
        low_rank.scaling,
        low_rank.dropout,
        low_rank.pair_of_owner,
        segments.offsets,
        segments.owners,
        row_keys,
        *low_rank.lora_A,
        *low_rank.lora_B,
    )
    return result


class _AddLowRank(torch.autograd.Function):
    """With h = A (m x) kept: dh = s g B; dx = m (dh A); dA = dh^T (m x); dB = s g^T h, computed as (h^T g)^T."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        y: Tensor,
        x: Tensor,
        scaling: Tensor,
        dropout: Tensor,
        pair_of_owner: Tensor,
        offsets: Tensor,
        owners: Tensor,
        row_keys: Tensor | None,
        *weights: Tensor,
    ) -> Tensor:
        pairs = len(weights) // 2
        x = x.to(y.dtype)
        lora_A, lora_B = list(weights[:pairs]), list(weights[pairs:])
        h = torch.ops.onebase.low_rank_forward(
            y, x, lora_A, lora_B, scaling, dropout, pair_of_owner, offsets, owners, row_keys
        )
        ctx.mark_dirty(y)
        ctx.save_for_backward(x, h, scaling, dropout, pair_of_owner, offsets, owners, row_keys, *weights)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, h, scaling, dropout, pair_of_owner, offsets, owners, row_keys, *weights = ctx.saved_tensors
        pairs = len(weights) // 2
        dx, *grads = torch.ops.onebase.low_rank_backward(
            grad.contiguous(), x, h, weights[:pairs], weights[pairs:],
            scaling, dropout, pair_of_owner, offsets, owners, row_keys, ctx.needs_input_grad[1],
        )  # fmt: skip
        grads = [g if need else None for g, need in zip(grads, ctx.needs_input_grad[8:], strict=True)]
        return (grad, dx if ctx.needs_input_grad[1] else None, None, None, None, None, None, None, *grads)


_INDEX_SCHEMA = "Tensor scaling, Tensor dropout, Tensor pair_of_owner, Tensor offsets, Tensor owners, Tensor? row_keys"


@torch.library.custom_op(
    "onebase::low_rank_forward",
    mutates_args=("y",),
    schema=f"(Tensor(a!) y, Tensor x, Tensor[] lora_A, Tensor[] lora_B, {_INDEX_SCHEMA}) -> Tensor",
)
def _forward(
    y: Tensor,
    x: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Tensor,
    dropout: Tensor,
    pair_of_owner: Tensor,
    offsets: Tensor,
    owners: Tensor,
    row_keys: Tensor | None,
) -> Tensor:
    """Add the update to y and return h = A (m x), (rows, largest r); columns beyond a row's own r are not set."""
    h = x.new_empty(x.shape[0], max(A.shape[0] for A in lora_A))
    scales, lookup = scaling.tolist(), pair_of_owner.tolist()
    for start, end, owner in spans(offsets, owners):
        pair = _pair_of(owner, lookup)
        if pair == NO_OWNER:
            continue
        A, B = lora_A[pair].to(y.dtype), lora_B[pair].to(y.dtype)
        rows = _dropped(x[start:end], dropout, pair, row_keys, start)
        h_rows = h[start:end, : A.shape[0]]
        torch.mm(rows, A.T, out=h_rows)
        y[start:end].addmm_(h_rows, B.T, alpha=scales[pair])
    return h


@_forward.register_fake
def _(y: Tensor, x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], *index: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], max(A.shape[0] for A in lora_A))


@torch.library.custom_op(
    "onebase::low_rank_backward",
    mutates_args=(),
    schema=(
        "(Tensor grad, Tensor x, Tensor h, Tensor[] lora_A, Tensor[] lora_B, "
        f"{_INDEX_SCHEMA}, bool need_dx) -> Tensor[]"
    ),
)
def _backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    scaling: Tensor,
    dropout: Tensor,
    pair_of_owner: Tensor,
    offsets: Tensor,
    owners: Tensor,
    row_keys: Tensor | None,
    need_dx: bool,
) -> list[Tensor]:
    """Return [dx, dA of every pair, dB of every pair]; dx is empty unless `need_dx`."""
    dx = torch.zeros_like(x) if need_dx else x.new_empty(0)
    dA = [torch.zeros_like(A) for A in lora_A]
    dB = [torch.zeros_like(B) for B in lora_B]
    scales, lookup = scaling.tolist(), pair_of_owner.tolist()
    for start, end, owner in spans(offsets, owners):
        pair = _pair_of(owner, lookup)
        if pair == NO_OWNER:
            continue
        A, B = lora_A[pair].to(grad.dtype), lora_B[pair].to(grad.dtype)
        g, h_rows = grad[start:end], h[start:end, : A.shape[0]]
        dh = (g @ B).mul_(scales[pair])
        dA[pair] += dh.T @ _dropped(x[start:end], dropout, pair, row_keys, start)
        dB[pair] += (h_rows.T @ g).T * scales[pair]
        if need_dx:
            torch.mm(dh, A, out=dx[start:end])
            p = float(dropout[pair])
            if row_keys is not None and p > 0:
                dx[start:end].mul_(keep_mask(row_keys[start:end], x.shape[1], p)).div_(1 - p)
    return [dx, *dA, *dB]


@_backward.register_fake
def _(
    grad: Tensor, x: Tensor, h: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], *index: Any
) -> list[Tensor]:
    dx = torch.empty_like(x) if index[-1] else x.new_empty(0)
    return [dx, *(torch.empty_like(A) for A in lora_A), *(torch.empty_like(B) for B in lora_B)]


def _dropped(rows: Tensor, dropout: Tensor, pair: int, row_keys: Tensor | None, start: int) -> Tensor:
    """Return the rows with the adapter's own dropout applied; the rows themselves when it has none."""
    p = float(dropout[pair])
    if row_keys is None or p == 0:
        return rows
    return rows * keep_mask(row_keys[start : start + rows.shape[0]], rows.shape[1], p) / (1 - p)


def _pair_of(owner: int, lookup: Sequence[int]) -> int:
    """Return the index of an owner's pair, `NO_OWNER` for rows without an owner or an owner without a pair here."""
    return lookup[owner] if NO_OWNER < owner < len(lookup) else NO_OWNER
