"""A DoRA step takes at most 1.3 times a LoRA step; what a step of every other method takes stands beside it.

    python bench/step_time.py --train define-train.jsonl

Every method at its defaults, alone on the one base, in turns: a step to warm up, then timed ones on the same rows as all
others', wall clock and processor time; and so again, --rounds times. A ratio belongs to two steps of one round, and the
claim is about the median. A method that the model cannot have stands in the record with what was said. About 7 minutes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onebase.api as ob  # before all that imports torch: it asks MKL for reproducible bits

# isort: split
import torch
from fresh_run import add_data_options
from methods import METHODS
from record import Record, file_facts, median_and_spread

from onebase.config.methods import METHODS as SETTINGS
from onebase.config.settings import TrainSettings
from onebase.data.examples import Examples
from onebase.errors import OnebaseError
from onebase.train.data import load_rows
from onebase.train.member import Member

BOUND = 1.3
_Times = dict[str, list[float]]


def main() -> None:
    args = _parser().parse_args()
    names = list(dict.fromkeys(("lora", "lora-dora", *args.methods)))
    record = Record(args.out, str(__doc__).partition(";")[0], model=Path(args.model).name, data=file_facts(args.train))
    base = ob.load(args.model, dtype="float32", device="cpu")
    bank = ob.Bank(base)
    job = ob.Job(data=args.train)
    examples = load_rows(args.train, job.reading, job.task, base).examples
    wall: _Times = {name: [] for name in names}
    processor: _Times = {name: [] for name in names}
    refused: dict[str, str] = {}
    for _ in range(args.rounds):
        for name in names:
            if name in refused:
                continue
            try:
                _time(args, bank, examples, name, wall[name], processor[name])
            except OnebaseError as error:
                refused[name] = " ".join(str(error).split())
                del wall[name], processor[name]
    values = summarise(wall, processor)
    record.write({"threads": torch.get_num_threads(), **values, "refused": refused})
    for name, line in values["by_method"].items():
        print(
            f"{name:24} {line['wall_seconds']['median']:6.2f} s  {line['wall_ratio_to_lora']['median']:.2f} times LoRA"
        )


def _time(
    args: argparse.Namespace,
    bank: ob.Bank,
    examples: Examples,
    name: str,
    wall: list[float],
    processor: list[float],
) -> None:
    """Put a fresh adapter on the base, take its steps' times, and take it off again."""
    settings = TrainSettings(steps=10_000, batch_size=args.batch_size, learning_rate=1e-4)
    made = bank.add(name, SETTINGS[METHODS[name]["method"]](**METHODS[name]))
    member = Member(bank.routed, made, examples, settings, shuffle=True, budget=args.micro_batch_tokens)
    with member.bank.learning(name):
        member.run_step()
        for _ in range(args.steps):
            before, began = time.process_time(), time.perf_counter()
            member.run_step()
            processor.append(time.process_time() - before)
            wall.append(time.perf_counter() - began)
    bank.remove(name)


def summarise(wall: Mapping[str, Sequence[float]], processor: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Return each method's times and their ratios to LoRA's in the same round, and whether the claim holds."""
    by_method = {
        name: {
            "wall_seconds": median_and_spread(wall[name]),
            "processor_seconds": median_and_spread(processor[name]),
            "wall_ratio_to_lora": median_and_spread(_ratios(wall[name], wall["lora"])),
            "processor_ratio_to_lora": median_and_spread(_ratios(processor[name], processor["lora"])),
        }
        for name in wall
    }
    dora = statistics.median(_ratios(wall["lora-dora"], wall["lora"]))
    return {"by_method": by_method, "dora_ratio": dora, "bound": BOUND, "holds": dora <= BOUND}


def _ratios(times: Sequence[float], lora: Sequence[float]) -> list[float]:
    return [one / other for one, other in zip(times, lora, strict=True)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add_data_options(parser)
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="beside LoRA and DoRA"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=2, help="timed steps of each method in each round")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-tokens", type=int, default=2048)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser


if __name__ == "__main__":
    main()
