"""What each fast path brings: a step with it switched off, its reference in its place, against the step as it is.

    python bench/ablation.py --train define-train.jsonl

SmolLM2, fp32, LoRA r 16 on all linear layers, on short chats (16 rows a step) and on texts of 1,024 tokens (4 rows a step).
Each pair is two fresh processes, the one without the path and the one with it, in turns first and second; ratios are
taken pair by pair. Both must compute the same: the first loss and the first norm of the gradient within 1e-4 of each
other, or the bench fails. Processor seconds are of the steps, peak memory is of the
process; on a machine with other work read the processor's, with OMP_NUM_THREADS=1 (waiting threads spin). Variants stand in ablation_run.py.
The record is written after each pair, and goes on from the pairs that are in it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from ablation_run import FULL, VARIANTS
from fresh_run import add_data_options
from record import ROOT, Record, median_and_spread
from train_vs_trl import WORKLOADS, rows_of

SAME = 1e-4
"""Relative: fp32 sums of other orders."""
_BROUGHT = ("cpu_seconds", "seconds", "peak_rss_bytes")


def main() -> None:
    args = _parser().parse_args()
    texts = {name: {"fast": variant.fast, "instead": variant.instead} for name, variant in VARIANTS.items()}
    record = Record(args.out, str(__doc__).partition(":")[0] + ".", model=Path(args.model).name, variants=texts)
    earlier = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    pairs: dict[str, dict[str, list[dict[str, Any]]]] = earlier.get("pairs", {})
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(args.pairs):
            for workload in args.workloads:
                own = pairs.setdefault(workload, {})
                for name in [name for name in args.variants if workload in VARIANTS[name].workloads]:
                    made = own.setdefault(name, [])
                    if len(made) < args.pairs:
                        made.append(run_pair(args, workload, name, Path(folder), without_first=len(made) % 2 == 0))
                        record.write({"by_workload": summarise(pairs), "pairs": pairs})
    print(table(summarise(pairs)))


def run_pair(
    args: argparse.Namespace, workload: str, name: str, scratch: Path, *, without_first: bool
) -> dict[str, dict[str, Any]]:
    """Return what the steps took without a fast path and with it, the one or the other first.

    Raises:
        RuntimeError: they did not compute the same.
    """
    sides = {"without": name, "with": VARIANTS[name].beside}
    pair: dict[str, dict[str, Any]] = {}
    for side in sides if without_first else reversed(sides):
        pair[side] = run_variant(args, workload, sides[side], scratch)
    for what in ("losses", "grad_norms"):
        one, other = (pair[side][what][0] for side in ("without", "with"))
        if not math.isclose(one, other, rel_tol=SAME):
            raise RuntimeError(f"{workload}, {name}: {what} {one} without the fast path, {other} with it")
    print(f"{workload} {name}: {_ratio(pair, 'cpu_seconds'):.2f}", file=sys.stderr, flush=True)
    return pair


def run_variant(args: argparse.Namespace, workload: str, variant: str, scratch: Path) -> dict[str, Any]:
    """Return what a fresh process says of its steps."""
    kind = WORKLOADS[workload]
    job = {
        "variant": variant,
        "model": args.model,
        "task": kind.task,
        "train": str(_first_rows(rows_of(args, workload, scratch)[0], scratch / "rows.jsonl", args.rows)),
        "max_length": kind.max_length,
        "batch_size": kind.batch_size,
        "steps": args.short_steps if workload == "short" else args.long_steps,
        "micro_batch_tokens": args.micro_batch_tokens,
    }
    file = scratch / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    environment = {**os.environ, "MKL_CBWR": "AUTO"}  # MKL's default, in which `onebase train` runs
    words = [sys.executable, str(ROOT / "bench" / "ablation_run.py"), str(file)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{workload}, {variant}:\n{done.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _first_rows(source: Path, target: Path, count: int) -> Path:
    """Write the first rows of a file into another, and return that: reading all of them would take longer than the steps."""
    with source.open(encoding="utf-8") as lines:
        target.write_text("".join(islice(lines, count)), encoding="utf-8")
    return target


def summarise(pairs: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """Return for each workload and variant the ratios without / with of time and memory, and the step as it is."""
    found: dict[str, Any] = {}
    for workload, variants in pairs.items():
        found[workload] = {}
        for name, own in variants.items():
            line: dict[str, Any] = {what: median_and_spread([_ratio(pair, what) for pair in own]) for what in _BROUGHT}
            line["beside"] = VARIANTS[name].beside
            line["step_seconds"] = {
                side: statistics.median(statistics.median(pair[side]["seconds"]) for pair in own)
                for side in ("without", "with")
            }
            first = [pair["without"]["losses"][0] - pair["with"]["losses"][0] for pair in own]
            line["loss_difference"] = max(map(abs, first))
            found[workload][name] = line
    return found


def _ratio(pair: Mapping[str, Mapping[str, Any]], what: str) -> float:
    """Return without / with; of times the median over the steps, each of the same rows on both sides."""
    one, other = (pair[side][what] for side in ("without", "with"))
    if isinstance(one, list):
        return statistics.median(a / b for a, b in zip(one, other, strict=True))
    return float(one / other)


def table(summary: Mapping[str, Any]) -> str:
    """Return the summary as Markdown."""
    lines = [
        "| rows | fast path | instead | processor | clock | peak memory | first loss differs by |",
        "|---|---|---|---|---|---|---|",
    ]
    for workload, variants in summary.items():
        for name, line in variants.items():
            variant = VARIANTS[name]
            beside = "" if variant.beside == FULL else f" (both without `{variant.beside}`)"
            ratios = " | ".join(f"{line[what]['median']:.2f}" for what in _BROUGHT)
            lines.append(
                f"| {workload} | `{name}`: {variant.fast} | {variant.instead}{beside} | {ratios} "
                f"| {line['loss_difference']:.1e} |"
            )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add_data_options(parser)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--workloads", nargs="+", choices=("short", "long"), default=["short", "long"])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--rows", type=int, default=64, help="rows of the file that are read")
    parser.add_argument("--short-steps", type=int, default=4, help="timed steps of a process on short chats")
    parser.add_argument("--long-steps", type=int, default=1, help="timed steps of a process on long texts")
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser


if __name__ == "__main__":
    main()
