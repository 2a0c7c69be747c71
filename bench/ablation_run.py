"""Some steps of training with one fast path switched off, in a process of its own: ablation.py's other half.

    python bench/ablation_run.py JOB.json

Each variant puts one reference in the place of the fast path that it is the meaning of; FULL changes nothing. To add one:
a function that takes the member and swaps, and a line in VARIANTS. Nothing is put back: the process ends. Prints one JSON
object: seconds, processor seconds, loss and norm of the gradient of each step, and the process's peak memory.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onebase.api as ob  # before all that imports torch

# isort: split
import torch
import torch.nn.functional as F
from torch import Tensor

from onebase.adapters import layer
from onebase.adapters.bank import Bank
from onebase.base import blocks, flat
from onebase.base.memory import peak_rss_bytes
from onebase.base.route import RowSpace
from onebase.config.settings import DataSettings, TrainSettings
from onebase.data.batches import FlatBatch
from onebase.measure import forward
from onebase.ops import attention, elementwise, loss, low_rank, native, rows
from onebase.ops.attention import AttentionRule
from onebase.ops.layout import Layout
from onebase.ops.loss import HeadRecord, RowLosses
from onebase.ops.low_rank import LowRank
from onebase.ops.segments import Segments
from onebase.train import capacity, member
from onebase.train.data import load_rows
from onebase.train.member import Member

FULL = "full"
BOTH = ("short", "long")


@dataclass(frozen=True)
class Variant:
    """A fast path, what is put in its place, and on which workloads it can make a difference.

    `beside` is the variant that it is compared with: one that lacks what this one cannot have either.
    """

    fast: str
    instead: str
    off: Callable[[Member], None]
    workloads: tuple[str, ...] = BOTH
    beside: str = FULL


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    learner = member_of(job)
    if job["variant"] != FULL:
        VARIANTS[job["variant"]].off(learner)
    bank, name = learner.bank, learner.adapter.name
    with bank.learning(name):
        capacity.fit_budget(bank, name, learner.examples, job["batch_size"], learner.budget_tokens)  # it warms up, too
        steps, cpu = [], []
        for _ in range(job["steps"]):
            before = time.process_time()
            steps.append(learner.run_step())
            cpu.append(time.process_time() - before)
    found = {
        "seconds": [step.seconds for step in steps],
        "cpu_seconds": cpu,
        "losses": [step.loss for step in steps],
        "grad_norms": [step.grad_norm for step in steps],
        "peak_rss_bytes": peak_rss_bytes(),
        "threads": torch.get_num_threads(),
    }
    sys.stdout.write(f"\n{json.dumps(found)}\n")


def member_of(job: dict[str, Any]) -> Member:
    """Return a member that does a job's steps, with LoRA r 16 on all linear layers, as if it had learned already."""
    base = ob.load(job["model"], dtype="float32", device="cpu")
    bank = ob.Bank(base)
    adapter = bank.add("one", ob.Lora(r=16, lora_alpha=32), seed=0)
    draws = torch.Generator().manual_seed(0)
    for name, parameter in adapter.parameters():  # a fresh B is zero, and would hide what is wrong about A
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01, generator=draws)
    reading = DataSettings(train=job["train"], max_length=job["max_length"])
    examples = load_rows(job["train"], reading, job["task"], base).examples
    settings = TrainSettings(steps=1000, batch_size=job["batch_size"], learning_rate=2e-4)
    return Member(bank.routed, adapter, examples, settings, shuffle=True, budget=job["micro_batch_tokens"])


# -------------------------------------------------------------------------------------------------- what is switched off


def _put(name: str, function: Any, *modules: ModuleType) -> None:
    """Let a function be another one wherever it is called from."""
    for module in modules:
        if not hasattr(module, name):
            raise AttributeError(f"{module.__name__} has no {name}: the fast path has moved, and this bench with it.")
        setattr(module, name, function)


def _repeat_prefixes(learner: Member) -> None:
    learner.bank.base.shares_prefixes = False


def _pad_rows(learner: Member) -> None:
    _repeat_prefixes(learner)
    learner.bank.base.layout_kind = "padded"


def _every_logit(_: Member) -> None:
    _put("forward_loss", forward_loss_of_every_token, forward, member, capacity)


def forward_loss_of_every_token(
    bank: Bank, batch: FlatBatch, label_weight: float, *, dropout_step: int | None = None, objective: Any = None
) -> tuple[Tensor, RowLosses]:
    """Return what `forward_loss` does, by autograd through the logits of all tokens, as a model's own loss is taken."""
    route = bank.route(batch.layout, label_rows=batch.label_rows, dropout_step=dropout_step)
    logits = bank.head.logits(bank.base.hidden(batch.token_ids, route), route.rows[RowSpace.TOKEN])
    labelled = logits.index_select(0, batch.label_rows)
    losses = F.cross_entropy(labelled, batch.label_ids, reduction="none")
    correct = labelled.detach().argmax(1) == batch.label_ids
    return label_weight * losses.sum(), RowLosses(losses.detach(), correct)


def _logits_at_once(_: Member) -> None:
    _put("head_loss", head_loss_at_once, forward)


def head_loss_at_once(
    hidden: Tensor,
    labels: Tensor,
    weights: Tensor,
    head: HeadRecord,
    segments: Segments,
    row_keys: Tensor | None = None,
) -> tuple[Tensor, RowLosses]:
    """Return what `head_loss` does by its reference; of the rows' own losses, which that does not tell, their mean."""
    total = loss.reference(hidden, labels, weights, head, segments)
    mean = (total.detach() / weights.sum()).expand(len(labels))
    return total, RowLosses(mean, torch.zeros(len(labels), dtype=torch.bool))


def _low_rank_by_autograd(_: Member) -> None:
    _put("add_low_rank_", low_rank_by_autograd, layer)


def low_rank_by_autograd(
    y: Tensor, x: Tensor, pairs: LowRank, segments: Segments, row_keys: Tensor | None = None
) -> Tensor:
    """Return what `add_low_rank_` does by its reference."""
    return low_rank.reference(y, x, pairs, segments, row_keys)


def _attention_by_loop(_: Member) -> None:
    _put("flat_attention", attention_by_loop, flat)


def attention_by_loop(query: Tensor, key: Tensor, value: Tensor, layout: Layout, rule: AttentionRule) -> Tensor:
    """Return what `flat_attention` does by its reference."""
    return attention.reference(query, key, value, layout, rule)


def _attention_by_slots(_: Member) -> None:
    _put("fits_attention", lambda *_: False, native)


def _rows_by_indexing(learner: Member) -> None:
    _attention_by_slots(learner)
    _put("slots_of", rows.reference_slots, attention)
    _put("rows_of_slots", rows.reference_rows, attention)


def _masks_in_every_layer(learner: Member) -> None:
    _attention_by_slots(learner)
    Layout.once = lambda self, key, make: make()  # type: ignore[method-assign]


def _tensors_one_by_one(learner: Member) -> None:
    for group in learner.optimizer.param_groups:
        group.update(fused=False, foreach=False)


def _one_thread(_: Member) -> None:
    torch.set_num_threads(1)


def _several_passes(_: Member) -> None:
    for name in ("swiglu", "rms_norm", "rotary"):
        _put(name, getattr(elementwise, f"{name}_reference"), blocks)


VARIANTS = {
    "passes": Variant("norms, gates and rotations compiled, one pass each", "as torch writes them", _several_passes),
    "prefixes": Variant("a shared prefix is computed once", "in every example", _repeat_prefixes, ("short",)),
    "flat": Variant("rows end to end", "rows padded to the longest", _pad_rows, ("short",), beside="prefixes"),
    "labels": Variant("logits of labelled tokens", "of all tokens, by autograd", _every_logit),
    "chunks": Variant("logits in chunks, gradient in closed form", "at once, by autograd", _logits_at_once),
    "low-rank": Variant("the update in place, as one operation", "x A^T B^T s by autograd", _low_rank_by_autograd),
    "compiled": Variant("attention compiled, nothing padded", "padded slots, torch's attention", _attention_by_slots),
    "attention": Variant(
        "torch's attention on groups of one width", "a loop, softmax by autograd", _attention_by_loop, beside="compiled"
    ),
    "rows": Variant(
        "whole rows moved by one index each way", "indexing by autograd", _rows_by_indexing, beside="compiled"
    ),
    "masks": Variant("masks made once a batch", "in every layer", _masks_in_every_layer, ("short",), beside="compiled"),
    "optimiser": Variant("AdamW fused over all tensors", "tensor by tensor", _tensors_one_by_one, ("short",)),
    "threads": Variant("torch's choice of threads", "one thread", _one_thread, ("short",)),
}
"""Every fast path of a LoRA step; docs/speed.md says of each which test shows that both are equal."""


if __name__ == "__main__":
    main()
