"""What a base in 8 or 4 bits costs and saves: the loss that LoRA reaches on it, the time of a step, and the memory.

    python bench/quantised.py --seeds 0 1 2

`onebase train` in fresh processes, in turns: the same rows, settings and seeds on SmolLM2-135M-Instruct in fp32, with
quantize: int8 and with quantize: nf4. Losses are of the base as it was trained on, before and after; seconds are those of
the training loop; memory is the most that the whole process held, which opens the base in full before it quantises it.
The record is written after each run, and goes on from the runs that are in it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fresh_run import add_data_options, settings_of, train_in_fresh_process
from record import Record, earlier_parts, file_facts, median_and_spread

KINDS = ("none", "int8", "nf4")
KEPT = ("valid_loss_before", "valid_loss", "train_loss", "seconds", "steps", "examples", "tokens", "peak_rss_bytes")


def main() -> None:
    args = _parser().parse_args()
    data = {"train": file_facts(args.train), "valid": file_facts(args.valid)}
    train = settings_of(args, steps=args.steps)["train"]
    record = Record(args.out, str(__doc__).partition("\n")[0], train=train, data=data)
    runs: list[dict[str, Any]] = earlier_parts(args.out, "runs").get("runs", [])
    for seed in args.seeds:
        for kind in KINDS:
            if not any(one["seed"] == seed and one["quantize"] == kind for one in runs):
                runs.append(trained(args, kind, seed))
                record.write({"by_kind": summarise(runs), "runs": runs})
                print(json.dumps(runs[-1]), flush=True)
    print(table(summarise(runs)))


def trained(args: argparse.Namespace, kind: str, seed: int) -> dict[str, Any]:
    """Return what a run came to on a base that is held so."""
    settings = {**settings_of(args, steps=args.steps, seed=seed), "quantize": kind}
    with tempfile.TemporaryDirectory() as folder:
        result = train_in_fresh_process(settings, Path(folder) / "run").result
    return {"quantize": kind, "seed": seed, **{name: result[name] for name in KEPT}}


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return medians over the seeds, by how the base is held; differences of losses are from fp32's, seed by seed."""
    plain = {one["seed"]: one for one in runs if one["quantize"] == "none"}
    summary = {}
    for kind in KINDS:
        own = [one for one in runs if one["quantize"] == kind]
        if own:
            summary[kind] = {
                "valid_loss_before": median_and_spread([one["valid_loss_before"] for one in own]),
                "valid_loss": median_and_spread([one["valid_loss"] for one in own]),
                "valid_loss_above_fp32": median_and_spread(
                    [one["valid_loss"] - plain[one["seed"]]["valid_loss"] for one in own]
                ),
                "seconds_a_step": median_and_spread([one["seconds"] / one["steps"] for one in own]),
                "peak_rss_bytes": max(one["peak_rss_bytes"] for one in own),
            }
    return summary


def table(summary: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the summary as Markdown."""
    lines = ["| quantize | loss before | loss | above fp32 | s a step | peak memory |", "|---|---|---|---|---|---|"]
    for kind, one in summary.items():
        lines.append(
            f"| {kind} | {one['valid_loss_before']['median']:.4f} | {one['valid_loss']['median']:.4f} | "
            f"{one['valid_loss_above_fp32']['median']:+.4f} | {one['seconds_a_step']['median']:.2f} | "
            f"{one['peak_rss_bytes'] / 1e9:.2f} GB |"
        )
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add_data_options(parser)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser


if __name__ == "__main__":
    main()
