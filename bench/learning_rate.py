"""A method's default learning rate comes from this sweep: the loss on define-valid after 60 steps, for five rates.

    python bench/learning_rate.py --train define-train.jsonl --valid define-valid.jsonl --seeds 0 1 [--method ia3]

`onebase train` in a fresh process for each rate and seed: the method (LoRA's: r 16 on all linear layers) at its defaults,
batch 16, cosine with warm-up. Other methods than LoRA have a record of their own, learning_rate_METHOD.json. It is
written after each run, and a run that is in it already (same rate, seed, steps, rows) is skipped: interrupt it and start
it again. --plot-only draws the .svg anew. On 2 cores about 5 minutes a run: 25 for one seed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from figures import save
from fresh_run import add_data_options, settings_of, train_in_fresh_process
from matplotlib.figure import Figure
from methods import METHODS, default_rate
from record import Record, file_facts

RATES = (2e-4, 5e-4, 1e-3, 2e-3, 3e-3)
AROUND = (0.1, 0.3, 1, 3, 10)  # times the default, for the other methods


def main() -> None:
    args = _parser().parse_args()
    data = {"train": file_facts(args.train), "valid": file_facts(args.valid)}
    same = {"steps": args.steps, "model": Path(args.model).name, "train": data["train"], "valid": data["valid"]}
    if args.method != "lora":
        same["adapter"] = METHODS[args.method]
        args.out = args.out or Path(__file__).with_name(f"learning_rate_{args.method}.json")
    args.out = args.out or Path(__file__).with_suffix(".json")
    rates = args.rates or (RATES if args.method == "lora" else [default_rate(args.method) * f for f in AROUND])
    trials = _earlier_trials(args.out, same)
    if not args.plot_only:
        record = Record(args.out, str(__doc__).partition("\n")[0], same=same)
        for seed in args.seeds:
            for rate in rates:
                if any((t["learning_rate"], t["seed"]) == (rate, seed) for t in trials):
                    continue
                trials.append(_trial(args, rate, seed))
                record.write(summarise(trials))
                print(f"{rate:g} seed {seed}: {trials[-1]['valid_loss']:.4f}", flush=True)
    if not trials:
        raise SystemExit("nothing was measured yet")
    save(plot(summarise(trials)["by_rate"]), args.out.with_suffix(".svg"))
    for line in summarise(trials)["by_rate"]:
        print(f"{line['learning_rate']:>8g}  mean {line['mean']:.4f}  {line['valid_losses']}")


def _trial(args: argparse.Namespace, rate: float, seed: int) -> dict[str, Any]:
    adapter = None if args.method == "lora" else METHODS[args.method]
    settings = settings_of(args, adapter, steps=args.steps, learning_rate=rate, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        result = train_in_fresh_process(settings, Path(folder) / "run").result
    names = ("valid_loss_before", "valid_loss", "train_loss", "seconds")
    return {"learning_rate": rate, "seed": seed, **{name: result[name] for name in names}}


def summarise(trials: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the trials by rate, the rate with the lowest mean, and every trial."""
    by_rate = []
    for rate in sorted({trial["learning_rate"] for trial in trials}):
        losses = [trial["valid_loss"] for trial in trials if trial["learning_rate"] == rate]
        by_rate.append({"learning_rate": rate, "mean": statistics.fmean(losses), "valid_losses": losses})
    best = min(by_rate, key=lambda line: float(line["mean"]))
    return {
        "best_learning_rate": best["learning_rate"],
        "valid_loss_before": trials[0]["valid_loss_before"],
        "by_rate": by_rate,
        "trials": list(trials),
    }


def _earlier_trials(path: Path, same: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the trials of the record there is, if they were made with the same steps, model and rows."""
    if not path.exists():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["same"] != same:
        raise SystemExit(f"{path} holds trials with other steps, model or rows. Name another --out, or remove it.")
    return list(earlier["trials"])


def plot(by_rate: Sequence[Mapping[str, Any]]) -> Figure:
    """Return the mean loss over the learning rate, every run a dot."""
    figure = Figure((5.2, 3.2), layout="constrained")
    panel = figure.subplots()
    rates = [line["learning_rate"] for line in by_rate]
    panel.plot(rates, [line["mean"] for line in by_rate])
    for line in by_rate:
        panel.plot([line["learning_rate"]] * len(line["valid_losses"]), line["valid_losses"], "o", color="C0")
    panel.set(xscale="log", xlabel="learning rate", ylabel="loss on define-valid")
    panel.set_xticks(rates, [f"{rate:g}" for rate in rates])
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    return figure


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add_data_options(parser)
    parser.add_argument("--rates", type=float, nargs="+", help="default: around the method's own")
    parser.add_argument("--method", choices=METHODS, default="lora")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--plot-only", action="store_true", help="train nothing, draw the record there is")
    parser.add_argument("--out", type=Path, help="default: learning_rate.json or learning_rate_METHOD.json")
    return parser


if __name__ == "__main__":
    main()
