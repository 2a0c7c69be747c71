"""A DoRA step takes at most 1.3 times a LoRA step; what PiSSA's second pair costs stands beside it.

    python bench/dora_step.py --train define-train.jsonl

The three adapters (r 16 on all linear layers) lie in one bank on one base and step in turns, each on the same batches.
Each step's processor time is taken beside its wall-clock time: on one thread it hardly feels other programs. A ratio
belongs to two steps in a row, and the claim is about their median. About 3 minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import onebase.api as ob  # before all that imports torch: it asks MKL for reproducible bits

# isort: split
import torch
from fresh_run import add_data_options
from record import Record, file_facts, median_and_spread

from onebase.config.settings import TrainSettings
from onebase.train.data import load_rows
from onebase.train.member import Member

BOUND = 1.3
_KINDS: dict[str, dict[str, Any]] = {
    "lora": {},
    "dora": {"use_dora": True},
    "pissa": {"init_lora_weights": "pissa_niter_4"},
}


def main() -> None:
    args = _parser().parse_args()
    torch.set_num_threads(args.threads)
    record = Record(args.out, str(__doc__).partition(";")[0], model=Path(args.model).name, data=file_facts(args.train))
    members = _members(args)
    processor: dict[str, list[float]] = {kind: [] for kind in members}
    wall: dict[str, list[float]] = {kind: [] for kind in members}
    for step in range(args.steps + 1):
        for kind, member in members.items():
            before, began = time.process_time(), time.perf_counter()
            with member.bank.learning(kind):
                member.run_step()
            if step:  # the first one warms up
                processor[kind].append(time.process_time() - before)
                wall[kind].append(time.perf_counter() - began)
    ratios = {kind: _ratios(processor[kind], processor["lora"]) for kind in members if kind != "lora"}
    values = {
        "threads": torch.get_num_threads(),
        "processor_seconds": {kind: median_and_spread(seconds) for kind, seconds in processor.items()},
        "wall_seconds": {kind: median_and_spread(seconds) for kind, seconds in wall.items()},
        "processor_ratio_to_lora": {kind: median_and_spread(found) for kind, found in ratios.items()},
        "wall_ratio_of_dora": median_and_spread(_ratios(wall["dora"], wall["lora"])),
        "bound": BOUND,
        "holds": statistics.median(ratios["dora"]) <= BOUND,
    }
    record.write(values)
    for kind, found in ratios.items():
        print(f"{kind}: {statistics.median(found):.2f} times a LoRA step")


def _ratios(times: list[float], lora: list[float]) -> list[float]:
    return [one / other for one, other in zip(times, lora, strict=True)]


def _members(args: argparse.Namespace) -> dict[str, Member]:
    base = ob.load(args.model, dtype="float32", device="cpu")
    bank = ob.Bank(base)
    job = ob.Job(data=args.train)
    examples = load_rows(args.train, job.reading, job.task, base).examples
    settings = TrainSettings(steps=10_000, batch_size=args.batch_size, learning_rate=2e-4)
    members = {}
    for kind, adapter in _KINDS.items():
        made = bank.add(kind, ob.Lora(r=16, lora_alpha=32, **adapter))
        members[kind] = Member(bank.routed, made, examples, settings, shuffle=True, budget=args.micro_batch_tokens)
    return members


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add_data_options(parser)
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each kind")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser


if __name__ == "__main__":
    main()
