"""The routed low-rank update: every row of a flat batch gets the update of the adapter that owns it.

For rows i owned by adapter k

    y_i += scaling_k * B_k A_k (m_i * x_i)                                        (LoRA, arXiv:2106.09685 eq. 3)

where m_i is the adapter's dropout mask divided by its keep probability (ones when dropout is 0). `reference` is the
meaning; `add_low_rank_` is what runs: it adds in place (0.16 against 0.42 ms at 500 rows), keeps only h = A x for the
backward, and takes every index as a tensor, so that a compiler sees one custom operation whatever the batch.

Cost: rows * r * (in + out) multiply-adds forward, twice that backward. Called by adapters/layer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from onebase.ops import native
from onebase.ops.keyed import keep_mask
from onebase.ops.segments import NO_OWNER, Segments


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
    started: tuple[LowRank, LowRank] | None = None
    """Pairs of other owners, and what is taken off them: their own starts (PiSSA, OLoRA)."""

    @cached_property
    def numbers(self) -> tuple[list[float], list[float], list[int]]:
        """Scaling and dropout of each pair and the pair of each owner, as numbers."""
        return self.scaling.tolist(), self.dropout.tolist(), self.pair_of_owner.tolist()

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """All trained tensors."""
        return (*self.lora_A, *self.lora_B, *(() if self.started is None else self.started[0].weights))


def reference(
    y: Float[Tensor, "rows out"],
    x: Float[Tensor, "rows in"],
    low_rank: LowRank,
    segments: Segments,
    row_keys: Int64[Tensor, " rows"] | None = None,
) -> Float[Tensor, "rows out"]:
    """Return y + scaling * B A (m * x) row by row, less what `started` takes off: `add_low_rank_`'s meaning, as a loop.

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
    result = torch.cat(pieces)
    if low_rank.started is not None:
        nothing = torch.zeros_like(result)
        now, first = (reference(nothing, x, pairs, segments, row_keys) for pairs in low_rank.started)
        result = result + (now - first)
    return result


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
    index: _Index | list[Tensor]
    if torch.compiler.is_compiling():  # to a compiler numbers would be constants
        index, used = (
            [low_rank.scaling, low_rank.dropout, low_rank.pair_of_owner, segments.offsets, segments.owners],
            None,
        )
        index += [] if row_keys is None else [row_keys]
    else:
        index, used = _Index.of(low_rank, segments, row_keys)
    if used is None or used:  # of forty adapters those that have rows here take part
        ABs = [pairs if used is None else [pairs[i] for i in used] for pairs in (low_rank.lora_A, low_rank.lora_B)]
        y = _AddLowRank.apply(y, x, index, len(ABs[0]), *ABs[0], *ABs[1])  # type: ignore[no-untyped-call]
    if low_rank.started is not None:  # two like products from zero differ in no bit while nothing is learned
        now, first = (add_low_rank_(torch.zeros_like(y), x, pairs, segments, row_keys) for pairs in low_rank.started)
        y = y + (now - first)
    return y


class _AddLowRank(torch.autograd.Function):
    """With h = A (m x) kept: dh = s g B; dx = m (dh A); dA = dh^T (m x); dB = s g^T h, computed as (h^T g)^T."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, index: _Index | list[Tensor], pairs: int, *weights: Tensor) -> Tensor:
        x = x.to(y.dtype)
        add: Any = _forward if isinstance(index, _Index) else torch.ops.onebase.low_rank_forward
        h = add(y, x, weights[:pairs], weights[pairs:], index)
        ctx.mark_dirty(y)
        ctx.pairs, ctx.index = pairs, index if isinstance(index, _Index) else None
        ctx.save_for_backward(x, h, *weights, *([] if isinstance(index, _Index) else index))
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, h, *others = ctx.saved_tensors
        lora_A, lora_B, tensors = others[: ctx.pairs], others[ctx.pairs : 2 * ctx.pairs], others[2 * ctx.pairs :]
        need_dx = ctx.needs_input_grad[1]
        need_dw = any(ctx.needs_input_grad[4:])
        of: Any = torch.ops.onebase.low_rank_backward if ctx.index is None else _backward
        dx, *grads = of(grad.contiguous(), x, h, lora_A, lora_B, ctx.index or tensors, [need_dx, need_dw])
        return grad, dx if need_dx else None, None, None, *(grads if need_dw else [None] * len(grads))


@dataclass(frozen=True)
class _Index:
    """What a call needs beside rows and pairs: which stretch of rows uses which pair, and how."""

    stretches: list[tuple[int, int, int]]
    scaling: list[float]
    dropout: list[float]
    row_keys: Tensor | None

    @staticmethod
    def of(low_rank: LowRank, segments: Segments, row_keys: Tensor | None) -> tuple[_Index, list[int]]:
        """Return the index of a batch and the numbers of the layer's pairs that have rows in it, which it counts from 0."""
        scaling, dropout, lookup = low_rank.numbers
        owned = [(start, end, _pair_of(owner, lookup)) for start, end, owner in segments]
        used = sorted({pair for _, _, pair in owned} - {NO_OWNER})
        place = {pair: number for number, pair in enumerate(used)}
        stretches = [(start, end, place[pair]) for start, end, pair in owned if pair != NO_OWNER]
        return _Index(stretches, [scaling[i] for i in used], [dropout[i] for i in used], row_keys), used

    @staticmethod
    def of_tensors(index: Sequence[Tensor]) -> _Index:
        """Return the index of all pairs from (scaling, dropout, pair_of_owner, offsets, owners[, row_keys])."""
        scaling, dropout, pair_of_owner, offsets, owners, *keys = index
        lookup = pair_of_owner.tolist()
        owned = [(start, end, _pair_of(owner, lookup)) for start, end, owner in Segments(offsets, owners)]
        stretches = [one for one in owned if one[2] != NO_OWNER]
        return _Index(stretches, scaling.tolist(), dropout.tolist(), keys[0] if keys else None)

    def mask(self, start: int, end: int, pair: int, columns: int) -> Tensor | None:
        """Return which inputs of the rows the pair sees; None when all of them."""
        p = self.dropout[pair]
        return None if self.row_keys is None or p == 0 else keep_mask(self.row_keys[start:end], columns, p)

    def dropped(self, rows: Tensor, start: int, end: int, pair: int) -> Tensor:
        """Return the rows as the pair sees them, m * x."""
        mask = self.mask(start, end, pair, rows.shape[1])
        return rows if mask is None else rows * mask / (1 - self.dropout[pair])


def _forward(
    y: Tensor, x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], index: _Index | Sequence[Tensor]
) -> Tensor:
    """Add the update to y and return h = A (m x), (rows, largest r); columns beyond a row's own r are not set."""
    h = x.new_empty(x.shape[0], max(A.shape[0] for A in lora_A))
    index = index if isinstance(index, _Index) else _Index.of_tensors(index)
    for start, end, pair in index.stretches:
        A, B, scaling = lora_A[pair].to(y.dtype), lora_B[pair].to(y.dtype), index.scaling[pair]
        seen = index.dropped(_cut(x, start, end), start, end, pair)
        y_rows, h_rows = _cut(y, start, end), _cut(h, start, end)
        if native.fits(y, x, A, B) and y.is_contiguous():
            native.add_low_rank_(y_rows, seen, A, B, scaling, h_rows)
            continue
        h_rows = h_rows[:, : A.shape[0]]
        torch.mm(seen, A.T, out=h_rows)
        y_rows.addmm_(h_rows, B.T, alpha=scaling)
    return h


def _fake_forward(
    y: Tensor, x: Tensor, lora_A: Sequence[Tensor], lora_B: Sequence[Tensor], index: Sequence[Tensor]
) -> Tensor:
    return x.new_empty(x.shape[0], max(A.shape[0] for A in lora_A))


def _backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    index: _Index | Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    """Return [dx, dA of every pair, dB of every pair]; `needs` says whether dx, and whether the others are filled."""
    need_dx, need_dw = needs
    dA: dict[int, Tensor] = {}
    dB: dict[int, Tensor] = {}
    index = index if isinstance(index, _Index) else _Index.of_tensors(index)
    filled = sum(end - start for start, end, _ in index.stretches) == len(x)
    dx = (x.new_empty if filled else x.new_zeros)(x.shape if need_dx else 0)  # contiguous, whatever x is
    for start, end, pair in index.stretches:
        A, B, scaling = lora_A[pair].to(grad.dtype), lora_B[pair].to(grad.dtype), index.scaling[pair]
        g, seen, h_rows = (_cut(rows, start, end) for rows in (grad, x, h))
        seen = index.dropped(seen, start, end, pair) if need_dw else seen
        into = _cut(dx, start, end) if need_dx else None
        gradient = native.low_rank_gradient if native.fits(grad, x, A, B) else _gradient
        found = gradient(g, seen, h_rows, A, B, scaling, into, need_weights=need_dw)
        if found is not None:
            _add(dA, pair, found[0])
            _add(dB, pair, found[1])
        mask = None if into is None else index.mask(start, end, pair, x.shape[1])
        if into is not None and mask is not None:
            into.mul_(mask).div_(1 - index.dropout[pair])
    both = ((dA, lora_A), (dB, lora_B))
    return [
        dx,
        *(sums[i].to(w.dtype) if i in sums else torch.zeros_like(w) for sums, ws in both for i, w in enumerate(ws)),
    ]


def _gradient(
    grad: Tensor, x: Tensor, h: Tensor, A: Tensor, B: Tensor, scaling: float, dx: Tensor | None, *, need_weights: bool
) -> tuple[Tensor, Tensor] | None:
    """Write dx of one pair's rows if it is wanted, and return dA and dB if they are."""
    dh, h = (grad @ B).mul_(scaling), h[:, : A.shape[0]]
    if dx is not None:
        torch.mm(dh, A, out=dx)
    return (dh.T @ x, (h.T @ grad).mul_(scaling).T.contiguous()) if need_weights else None


def _cut(rows: Tensor, start: int, end: int) -> Tensor:
    """Return some of the rows; to return all of them costs nothing."""
    return rows if end - start == len(rows) else rows[start:end]


def _add(sums: dict[int, Tensor], pair: int, gradient: Tensor) -> None:
    """Add a stretch's gradient to that of its pair; most pairs have one stretch, and nothing to be added to."""
    sums[pair] = sums[pair].add_(gradient) if pair in sums else gradient


def _fake_backward(
    grad: Tensor,
    x: Tensor,
    h: Tensor,
    lora_A: Sequence[Tensor],
    lora_B: Sequence[Tensor],
    index: Sequence[Tensor],
    needs: Sequence[bool],
) -> list[Tensor]:
    dx = torch.empty_like(x) if needs[0] else x.new_empty(0)
    return [dx, *(torch.empty_like(A) for A in lora_A), *(torch.empty_like(B) for B in lora_B)]


# the plain way to make an operation: torch's decorator for it costs 80 us a call, as much as a small layer's products
_LIBRARY = torch.library.Library("onebase", "DEF")  # type: ignore[no-untyped-call]
for _name, _schema, _function, _fake in (
    (
        "low_rank_forward",
        "(Tensor(a!) y, Tensor x, Tensor[] lora_A, Tensor[] lora_B, Tensor[] index) -> Tensor",
        _forward,
        _fake_forward,
    ),
    (
        "low_rank_backward",
        "(Tensor grad, Tensor x, Tensor h, Tensor[] lora_A, Tensor[] lora_B, Tensor[] index, bool[] needs) -> Tensor[]",
        _backward,
        _fake_backward,
    ),
):
    _LIBRARY.define(_name + _schema)  # type: ignore[no-untyped-call]
    _LIBRARY.impl(_name, _function, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"onebase::{_name}", _fake, lib=_LIBRARY)


def _pair_of(owner: int, lookup: Sequence[int]) -> int:
    """Return the index of an owner's pair, `NO_OWNER` for rows without an owner or an owner without a pair here."""
    return lookup[owner] if NO_OWNER < owner < len(lookup) else NO_OWNER
