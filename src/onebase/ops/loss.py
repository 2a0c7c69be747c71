"""The loss at labelled positions, forward and backward in one pass over chunks of rows.

The logits of a step never exist at once: a chunk of rows is multiplied with the head, its cross-entropy and the
gradient of that are taken in place, and only the gradients of the hidden rows and of what is trainable in the head
are kept. `HeadRecord` says what stands between hidden states and logits:

    logits = soft_cap * tanh(z / soft_cap),  z = scale * (h W^T + b + sum_k s_k h A_k^T B_k^T over row owners k)

or, where a head is changed in another way (a copy of one's own, a scaled output, a trained bias), z = scale * linear(h).

`reference` is the meaning. `head_loss` is what runs. Cost: rows * hidden * vocab multiply-adds forward, the same
again backward (twice that when W is trained); memory: two chunks of logits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor

from onebase.ops import low_rank, native
from onebase.ops.attention import at_least_fp32
from onebase.ops.low_rank import LowRank
from onebase.ops.segments import Segments

CHUNK_BYTES = 48 * 2**20


@dataclass(frozen=True)
class HeadRecord:
    """An output head: what turns hidden rows into logits. Whatever requires a gradient in it gets one.

    `weight` is (vocab, hidden), the input embedding itself where they are tied; `update` the low-rank pairs on the
    head, used by the owners in the label row space. `linear`, where given, stands for weight, bias and update: from
    hidden rows, their segments and keys to rows of the vocabulary's width, and `learned` is what is trained in it.
    """

    weight: Float[Tensor, "vocab hidden"]
    bias: Float[Tensor, " vocab"] | None = None
    scale: float = 1.0
    soft_cap: float | None = None
    update: LowRank | None = None
    linear: Callable[[Tensor, Segments, Tensor | None], Tensor] | None = None
    learned: tuple[Tensor, ...] = ()

    def logits(
        self, hidden: Float[Tensor, "rows hidden"], segments: Segments, row_keys: Int64[Tensor, " rows"] | None = None
    ) -> Float[Tensor, "rows vocab"]:
        """Return the logits of every row, differentiable in all parts."""
        rows = hidden.to(self.weight.dtype)  # under autocast a norm may return fp32
        if self.linear is not None:
            return self._squash(self.linear(rows, segments, row_keys))
        z = F.linear(rows, self.weight, self.bias)
        if self.update is not None:
            z = low_rank.add_low_rank_(z, hidden, self.update, segments, row_keys)
        return self._squash(z)

    def _squash(self, z: Tensor) -> Tensor:
        if self.scale != 1.0:
            z = z * self.scale
        return z if self.soft_cap is None else torch.tanh(z / self.soft_cap) * self.soft_cap

    def trainable(self) -> tuple[Tensor, ...]:
        """Return the parts that require a gradient, in a fixed order."""
        parts = [self.weight, *(() if self.bias is None else (self.bias,))]
        parts += self.learned
        if self.update is not None:
            parts += self.update.weights
        return tuple(part for part in parts if part.requires_grad)


@dataclass(frozen=True)
class RowLosses:
    """What came of each labelled row, without gradients: its loss (nats) and whether no token was better than the label."""

    loss: Float[Tensor, " rows"]
    correct: Tensor


def reference(
    hidden: Float[Tensor, "rows hidden"],
    labels: Int64[Tensor, " rows"],
    weights: Float[Tensor, " rows"],
    head: HeadRecord,
    segments: Segments,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Return sum_i weights_i * cross_entropy(logits_i, labels_i): the meaning of `head_loss`."""
    logits = at_least_fp32(head.logits(hidden, segments))
    losses = F.cross_entropy(logits, labels, reduction="none", label_smoothing=label_smoothing)
    return (losses * weights).sum()


def head_loss(
    hidden: Float[Tensor, "rows hidden"],
    labels: Int64[Tensor, " rows"],
    weights: Float[Tensor, " rows"],
    head: HeadRecord,
    segments: Segments,
    row_keys: Int64[Tensor, " rows"] | None = None,
    label_smoothing: float = 0.0,
) -> tuple[Float[Tensor, ""], RowLosses]:
    """Return the weighted sum of the rows' losses, ready for backward, and each row's own loss.

    Rows are reduced by their own weights only, so a row that is NaN spoils its owner's gradient and no other's.
    """
    rows = RowLosses(
        loss=torch.empty(labels.shape[0], dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device),
        correct=torch.empty(labels.shape[0], dtype=torch.bool, device=hidden.device),
    )
    job = _Job(labels, weights, head, segments, row_keys, label_smoothing, rows)
    trainable = head.trainable() if torch.is_grad_enabled() else ()
    total: Tensor = _HeadLoss.apply(hidden, job, *trainable)  # type: ignore[no-untyped-call]
    return total, rows


@dataclass(frozen=True)
class _Job:
    labels: Tensor
    weights: Tensor
    head: HeadRecord
    segments: Segments
    row_keys: Tensor | None
    label_smoothing: float
    rows: RowLosses


class _HeadLoss(torch.autograd.Function):
    """d loss_i / d logits_i = softmax(logits_i) - target_i, carried through cap, scale and head within the chunk."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, job: _Job, *trainable: Tensor) -> Tensor:
        needs = any(ctx.needs_input_grad)
        d_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        d_parts = [torch.zeros_like(part) for part in trainable]
        size = chunk_rows(job.head.weight.shape[0])
        for start in range(0, hidden.shape[0], size):
            chunk = slice(start, min(start + size, hidden.shape[0]))
            if needs and (trainable or job.head.linear is not None):
                _chunk_by_autograd(hidden, job, chunk, d_hidden, d_parts, trainable)
            else:
                _chunk_with_frozen_head(hidden, job, chunk, d_hidden)
        ctx.save_for_backward(d_hidden, *d_parts)
        total: Tensor = (job.rows.loss * job.weights).sum()
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, *d_parts = ctx.saved_tensors
        return (
            None if d_hidden is None else d_hidden * grad,
            None,
            *(part * grad for part in d_parts),
        )


def chunk_rows(vocabulary: int) -> int:
    """Return how many rows of fp32 logits fit the chunk: a multiple of 16, at least 16."""
    return max(16, CHUNK_BYTES // (4 * vocabulary) // 16 * 16)


def _chunk_with_frozen_head(hidden: Tensor, job: _Job, chunk: slice, d_hidden: Tensor | None) -> None:
    """Fill the chunk's losses and hidden gradients; the head keeps no gradient, so everything is in closed form."""
    head, h = job.head, hidden[chunk]
    with torch.no_grad():
        keys = None if job.row_keys is None else job.row_keys[chunk]
        logits = at_least_fp32(head.logits(h, _cut(job.segments, chunk), keys))
        d_logits = _cross_entropy(logits, job, chunk, overwrite=head.soft_cap is None)
        if d_hidden is None:
            return
        if head.soft_cap is not None:
            d_logits *= 1 - (logits / head.soft_cap) ** 2
        if head.scale != 1.0:
            d_logits *= head.scale
        d_hidden[chunk] = d_logits.to(head.weight.dtype) @ head.weight
        if head.update is not None:
            _add_update_gradient(d_hidden[chunk], d_logits, h, job, chunk)


def _add_update_gradient(d_hidden: Tensor, d_logits: Tensor, h: Tensor, job: _Job, chunk: slice) -> None:
    update, cut = job.head.update, _cut(job.segments, chunk)
    assert update is not None
    with torch.enable_grad():
        leaf = h.detach().requires_grad_()
        zero = torch.zeros_like(d_logits)
        keys = None if job.row_keys is None else job.row_keys[chunk]
        z = low_rank.add_low_rank_(zero, leaf, update, cut, keys)
        if not z.requires_grad:  # no row of the chunk has a pair
            return
        (extra,) = torch.autograd.grad(z, leaf, d_logits)
    d_hidden += extra


def _chunk_by_autograd(
    hidden: Tensor,
    job: _Job,
    chunk: slice,
    d_hidden: Tensor | None,
    d_parts: list[Tensor],
    trainable: tuple[Tensor, ...],
) -> None:
    """Fill the chunk's losses and add its gradients for every trainable part of the head."""
    with torch.enable_grad():
        h = hidden[chunk].detach().requires_grad_()
        keys = None if job.row_keys is None else job.row_keys[chunk]
        logits = job.head.logits(h, _cut(job.segments, chunk), keys)
    with torch.no_grad():
        d_logits = _cross_entropy(at_least_fp32(logits.detach()), job, chunk, overwrite=False).to(logits.dtype)
    grads = torch.autograd.grad(logits, [h, *trainable], d_logits, allow_unused=True)
    if d_hidden is not None and grads[0] is not None:
        d_hidden[chunk] = grads[0]
    for total, part in zip(d_parts, grads[1:], strict=True):
        if part is not None:
            total += part


def _cross_entropy(logits: Tensor, job: _Job, chunk: slice, *, overwrite: bool) -> Tensor:
    """Write the chunk's row losses and return weights * d loss / d logits, (rows, vocab), in the logits' place if allowed."""
    labels, weights = job.labels[chunk, None], job.weights[chunk, None].to(logits.dtype)
    smooth, floor = job.label_smoothing, job.label_smoothing / logits.shape[1]
    if native.fits(logits, weights):  # whoever asks: with a head that learns and without one, bits are the same
        label, mean = logits.gather(1, labels), logits.mean(1, keepdim=True) if smooth else None
        d_logits = (
            logits if overwrite and logits.is_contiguous() else logits.clone(memory_format=torch.contiguous_format)
        )
        largest, totals = (found[:, None] for found in native.softmax_gradient_(d_logits, weights, floor))
        log_total = totals.log()
        correct = (label >= largest) & ~totals.isnan()
        loss = log_total - (label - largest)
        loss_of_all = loss if mean is None else log_total - (mean - largest)
    else:
        correct = logits.gather(1, labels) >= logits.amax(1, keepdim=True)
        log_p = torch.log_softmax(logits, 1)
        loss = -log_p.gather(1, labels)
        loss_of_all = -log_p.mean(1, keepdim=True) if smooth else loss
        d_logits = log_p.exp_().sub_(floor).mul_(weights)
    job.rows.correct[chunk] = correct[:, 0]
    job.rows.loss[chunk] = (loss if not smooth else (1 - smooth) * loss + smooth * loss_of_all)[:, 0]
    return d_logits.scatter_add_(1, labels, (smooth - 1) * weights)


def _cut(segments: Segments, chunk: slice) -> Segments:
    """Return the segments of the chunk's rows alone."""
    return Segments((segments.offsets.clamp(chunk.start, chunk.stop) - chunk.start), segments.owners)
