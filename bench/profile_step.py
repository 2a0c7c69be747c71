"""Where one training step's time goes, part by part, and how near its matrix products come to what the machine can do.

    python bench/profile_step.py --train define-train.jsonl

Real steps of SmolLM2-135M (LoRA r 16 on all linear layers, batch 16) under torch.profiler: every operation's own time
goes to the part it belongs to; what is left of a step is Python and dispatch between operations. Beside it, measured
alone in the same process: the fp32 products of the step's own shapes. The floor of a step is the time of these
products; the share reached is floor / step. FLOP are counted by formula: a multiply-add is two. About 2 minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onebase.api as ob  # before all that imports torch: it asks MKL for reproducible bits

# isort: split
import torch
from fresh_run import add_data_options
from record import Record, file_facts, median_and_spread
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from onebase.config.settings import TrainSettings
from onebase.data.batches import batch_of_step
from onebase.measure.forward import batches_of
from onebase.train.capacity import fit_budget
from onebase.train.data import load_rows
from onebase.train.member import Member

_STEP = "the step"
# The first of these that is in the name of an operation, or of one around it, names its part.
_PARTS = (
    ("Optimizer.step", "optimiser"),
    ("Optimizer.zero_grad", "optimiser"),
    ("low_rank", "low-rank updates"),
    ("_AddLowRank", "low-rank updates"),
    ("_HeadLoss", "head and loss"),
    ("scaled_dot_product", "attention"),
    ("ScaledDotProduct", "attention"),
    ("_MoveRows", "attention: moving rows"),
    ("repeat_interleave", "attention: moving rows"),
    ("foreach_norm", "clipping"),
    ("linalg_vector_norm", "clipping"),
    ("AccumulateGrad", "gradient sums"),
    ("MmBackward", "base linears, backward"),
    ("LinearBackward", "base linears, backward"),
    ("aten::linear", "base linears, forward"),
    ("aten::mm", "base linears, forward"),
    ("evaluate_function", "norms and elementwise, backward"),
)
_REST = "norms and elementwise, forward"


def main() -> None:
    args = _parser().parse_args()
    record = Record(args.out, str(__doc__).partition("\n")[0], data=file_facts(args.train))
    member = _member(args)
    for _ in range(args.warmup):
        member.run_step()
    seconds = [member.run_step().seconds for _ in range(args.steps)]
    parts, operations, profiled_ms = _profile(member, args.profiled)
    products = _products(member, args)
    floor_ms = sum(p["ms"] for p in products)
    step_ms = 1000 * statistics.median(seconds)
    gflop = sum(p["gflop"] for p in products)
    values = {
        "threads": torch.get_num_threads(),
        "step_seconds": median_and_spread(seconds),
        "profiled_step_ms": profiled_ms,
        "parts_ms": parts,
        "operations_ms": operations,
        "roofline": {
            "gflop_a_step": gflop,
            "product_gflop_per_s": gflop / floor_ms * 1000,
            "floor_ms": floor_ms,
            "share_reached": floor_ms / step_ms,
            "products": products,
        },
    }
    record.write(values)
    _print(values)


def _member(args: argparse.Namespace) -> Member:
    base = ob.load(args.model, dtype="float32", device="cpu")
    bank = ob.Bank(base)
    adapter = bank.add("one", ob.Lora(r=16, lora_alpha=32))
    job = ob.Job(data=args.train)
    examples = load_rows(args.train, job.reading, job.task, base).examples
    settings = TrainSettings(steps=10_000, batch_size=args.batch_size, learning_rate=2e-4)
    budget = fit_budget(bank.routed, "one", examples, args.batch_size, args.micro_batch_tokens)
    return Member(bank.routed, adapter, examples, settings, shuffle=True, budget=budget)


# ---------------------------------------------------------------------------------------------------------- the profile


def _profile(member: Member, steps: int) -> tuple[dict[str, float], list[dict[str, Any]], float]:
    """Return milliseconds a step of every part and of the costliest operations, and of the whole step."""
    with profile(activities=[ProfilerActivity.CPU]) as found:
        for _ in range(steps):
            with record_function(_STEP):
                member.run_step()
    parts: Counter[str] = Counter()
    operations: Counter[tuple[str, str]] = Counter()
    whole = 0.0
    for event in found.events():
        own = event.self_cpu_time_total / 1000 / steps
        if event.name == _STEP:
            whole += event.cpu_time_total / 1000 / steps
            continue
        part = _part_of(event)
        if part is not None:
            parts[part] += own
            operations[part, event.name] += own
    parts["python and dispatch"] = whole - sum(parts.values())
    top = [{"part": part, "operation": name, "ms": round(ms, 2)} for (part, name), ms in operations.most_common(30)]
    return {name: round(ms, 2) for name, ms in parts.most_common()}, top, round(whole, 2)


def _part_of(event: Any) -> str | None:
    """Return the part an operation belongs to; None for one outside of the steps."""
    names, at = [], event
    while at is not None and at.name != _STEP:
        names.append(at.name)
        at = at.cpu_parent
    if at is None:
        return None
    return next((part for key, part in _PARTS if any(key in name for name in names)), _REST)


# --------------------------------------------------------------------------------------------------------- the roofline


def _products(member: Member, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return every kind of matrix product of a median step, with its FLOP and the time that it takes alone."""
    tokens, labels = _median_micro_batches(member, args.batch_size)
    model = member.bank.base.model
    shapes = Counter(
        tuple(module.weight.shape)
        for module in model.modules()
        if isinstance(module, torch.nn.Linear) and module is not model.get_output_embeddings()
    )
    head = model.get_output_embeddings().weight.shape
    wanted = []
    for (outputs, inputs), layers in shapes.items():
        name = f"{outputs}x{inputs}"
        for rows in tokens:
            wanted += [
                (f"base {name} forward", (rows, inputs, outputs), layers),
                (f"base {name} backward", (rows, outputs, inputs), layers),
                (f"low-rank {name} h = A x", (rows, inputs, 16), layers),
                (f"low-rank {name} y += B h", (rows, 16, outputs), layers),
                (f"low-rank {name} dh = g B", (rows, outputs, 16), layers),
                (f"low-rank {name} dx = dh A", (rows, 16, inputs), layers),
                (f"low-rank {name} dA = dh^T x", (16, rows, inputs), layers),
                (f"low-rank {name} dB = (h^T g)^T", (16, rows, outputs), layers),
            ]
    for rows in labels:
        wanted += [("head forward", (rows, head[1], head[0]), 1), ("head backward", (rows, head[0], head[1]), 1)]
    return [_measure(name, sizes, times, args.repeats) for name, sizes, times in wanted]


def _median_micro_batches(member: Member, batch_size: int) -> tuple[list[int], list[int]]:
    """Return the tokens and the labels of each micro-batch of a step of median size among the first hundred."""
    lengths, sums = member.examples.lengths, []
    for step in range(100):
        numbers = batch_of_step(len(lengths), step, batch_size, seed=0).tolist()
        sums.append((int(lengths[numbers].sum()), numbers))
    numbers = sorted(sums)[len(sums) // 2][1]
    batches = list(batches_of(member.bank, member.adapter.name, member.examples, numbers, member.budget_tokens))
    tokens = [batch.layout.token_count for batch in batches]
    labels = [batch.label_count for batch in batches]
    return tokens, labels


def _measure(name: str, sizes: tuple[int, int, int], times: int, repeats: int) -> dict[str, Any]:
    """Return a product of (rows, inner) and (inner, columns): FLOP and time of all its `times` in a step."""
    rows, inner, columns = sizes
    # As it is in a step: a forward product reads its weight transposed, each layer has its own, none lies in the cache.
    forward = name.endswith(("forward", "x", "h"))
    weights = [_weight(inner, columns, transposed=forward) for _ in range(max(1, min(times, 8)))]
    x, out = torch.randn(rows, inner), torch.empty(rows, columns)
    taken = []
    for weight in [weights[0], *weights * repeats]:
        began = time.perf_counter()
        torch.mm(x, weight, out=out)
        taken.append(time.perf_counter() - began)
    ms = 1000 * statistics.median(taken[1:])
    gflop = 2 * rows * inner * columns / 1e9
    return {
        "product": name,
        "rows_inner_columns": list(sizes),
        "times": times,
        "gflop": gflop * times,
        "ms": ms * times,
        "gflop_per_s": round(gflop / ms * 1000, 1),
    }


def _weight(inner: int, columns: int, *, transposed: bool) -> Tensor:
    return torch.randn(columns, inner).T if transposed else torch.randn(inner, columns)


def _print(values: dict[str, Any]) -> None:
    step = values["step_seconds"]["median"]
    print(f"step {1000 * step:.0f} ms; profiled {values['profiled_step_ms']:.0f} ms, of which")
    _table([(name, ms, ms / values["profiled_step_ms"]) for name, ms in values["parts_ms"].items()])
    print("costliest operations")
    _table(
        [(f"{o['part']}: {o['operation']}"[:70], o["ms"], o["ms"] / values["profiled_step_ms"])
         for o in values["operations_ms"][:16]]
    )  # fmt: skip
    roofline = values["roofline"]
    print(
        f"{roofline['gflop_a_step']:.0f} GFLOP a step at {roofline['product_gflop_per_s']:.0f} GFLOP/s alone: floor "
        f"{roofline['floor_ms']:.0f} ms, share reached {roofline['share_reached']:.2f}"
    )
    kinds: Counter[str] = Counter()
    for product in roofline["products"]:
        kinds[product["product"].split()[0]] += product["ms"]
    _table([(f"floor: {kind}", ms, ms / roofline["floor_ms"]) for kind, ms in kinds.most_common()])


def _table(lines: Sequence[tuple[str, float, float]]) -> None:
    for name, ms, share in lines:
        print(f"  {name:<72}{ms:>9.1f} ms {share:>6.1%}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add_data_options(parser)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-tokens", type=_tokens, default="auto")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10, help="steps that are timed without the profiler")
    parser.add_argument("--profiled", type=int, default=3, help="steps under the profiler")
    parser.add_argument("--repeats", type=int, default=3, help="times that each product is measured on every weight")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser


def _tokens(word: str) -> int | str:
    return word if word == "auto" else int(word)


if __name__ == "__main__":
    main()
