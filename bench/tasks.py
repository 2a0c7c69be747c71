"""On whole examples LoRA reaches at least 98 % of full fine-tuning's accuracy; a frozen encoder with a trained head beside them.

    python bench/tasks.py --category category --depth depth --seeds 0 1 2

`onebase train` in a fresh process for each task (25 classes of nouns; depth in the noun hierarchy), way of training and seed,
then `onebase eval` on the test rows, by slices of frequency. --category and --depth are what the files -train.jsonl,
-valid.jsonl and -test.jsonl begin with. Each way has the learning rate that did best on the validation rows of seed 0 among
--rates times its own, and while that is the lowest or highest of them the sweep goes on, up to --beyond times (it is in the
record too). The record is written after each run, and a run that is in it
already is skipped: interrupt it and start it again. --jobs of them at a time (with OMP_NUM_THREADS=1, as many as there are
cores); then `seconds` are of a run beside others.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

from fresh_run import train_in_fresh_process
from record import Record, file_facts

WAYS: dict[str, tuple[dict[str, Any], float]] = {
    "lora": ({"method": "lora", "r": 16, "lora_alpha": 16}, 2e-3),
    "head": ({"method": "full", "target_modules": ["classifier"]}, 3e-2),
    "full": ({"method": "full"}, 3e-4),
}
"""Way of training -> settings of `adapter:`, and the learning rate that its sweep is around."""
BOUND = 0.98
_SHOWN = {"classify": ("accuracy", "macro_f1", "ece"), "regress": ("mse", "mae", "r2")}
_KEPT = ("valid_loss", "seconds", "trainable_parameters", "adapter_bytes")


def main() -> None:
    args = _parser().parse_args()
    parts = {"classify": args.category, "regress": args.depth}
    files = {
        task: {kind: Path(f"{start}-{kind}.jsonl") for kind in ("train", "valid", "test")}
        for task, start in parts.items()
    }
    same = {
        "model": Path(args.model).name,
        "epochs": args.epochs,
        "data": {task: {kind: file_facts(path) for kind, path in own.items()} for task, own in files.items()},
    }
    runs: list[dict[str, Any]] = _earlier(args.out, same)
    record = Record(args.out, str(__doc__).partition("\n")[0], same=same)

    def done(wanted: tuple[str, str, int, float]) -> None:
        task, way, seed, rate = wanted
        facts = {"task": task, "way": way, "seed": seed, "learning_rate": rate}
        if any(facts.items() <= run.items() for run in runs):
            return
        runs.append({**facts, **_run(args, files[task], task, way, seed, rate)})
        record.write(summarise(runs))
        print(
            f"{task} {way} seed {seed} at {rate:g}: valid loss {runs[-1]['valid_loss']:.4f}",
            file=sys.stderr,
            flush=True,
        )

    first, *others = args.seeds
    pairs = list(product(files, WAYS))
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(done, [(t, w, first, WAYS[w][1] * factor) for t, w in pairs for factor in args.rates]))
        for _ in range(args.beyond):
            beyond = [(t, w, rate_beyond(runs, t, w, first)) for t, w in pairs]
            list(pool.map(done, [(t, w, first, rate) for t, w, rate in beyond if rate is not None]))
        list(pool.map(done, [(t, w, seed, best_rate(runs, t, w, first)) for t, w in pairs for seed in others]))
    record.write(summarise(runs))
    print(table(summarise(runs)))


def _run(
    args: argparse.Namespace, files: Mapping[str, Path], task: str, way: str, seed: int, rate: float
) -> dict[str, Any]:
    settings = {
        "model": args.model,
        "task": task,
        "data": {"train": str(files["train"].resolve()), "valid": str(files["valid"].resolve()), "max_length": 128},
        "adapter": WAYS[way][0],
        "train": {"epochs": args.epochs, "batch_size": 16, "seed": seed, "learning_rate": rate, "warmup_ratio": 0.1},
    }
    with tempfile.TemporaryDirectory() as folder:
        out = (args.keep or Path(folder)) / f"{task}-{way}-{seed}-{rate:g}"
        run = train_in_fresh_process(settings, out)
        words = ["eval", str(out), "--data", str(files["test"].resolve()), "--slice", "frequency", "--json"]
        told = subprocess.run([sys.executable, "-m", "onebase", *words], check=True, capture_output=True, text=True)
    test = json.loads(told.stdout)
    kept = ("loss", "intervals", "slices", "examples_per_s", *_SHOWN[task])
    return {
        **{name: run.result[name] for name in _KEPT},
        "peak_rss_bytes": run.peak_rss_bytes,
        "test": {name: test[name] for name in kept},
    }


def summarise(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return, for each task and way, the runs at its best learning rate with medians; whether the claim holds; every run."""
    lines = []
    for task, shown in _SHOWN.items():
        for way in WAYS:
            own = [run for run in runs if (run["task"], run["way"]) == (task, way)]
            if not own:
                continue
            first = min(run["seed"] for run in own)
            rate = best_rate(own, task, way, first)
            chosen = [run for run in own if run["learning_rate"] == rate]
            rare = [slice_of(run, "unseen") for run in chosen]
            lines.append(
                {
                    "task": task,
                    "way": way,
                    "learning_rate": rate,
                    "trainable_parameters": chosen[0]["trainable_parameters"],
                    "adapter_bytes": chosen[0]["adapter_bytes"],
                    "seconds": statistics.median(run["seconds"] for run in chosen),
                    **{name: [run["test"][name] for run in chosen] for name in shown},
                    "tail": [one["scores"][shown[-1] if task == "regress" else shown[0]]["value"] for one in rare],
                }
            )
    accuracy = {line["way"]: statistics.median(line["accuracy"]) for line in lines if line["task"] == "classify"}
    share = accuracy["lora"] / accuracy["full"] if {"lora", "full"} <= accuracy.keys() else None
    return {
        "by_way": lines,
        "lora_of_full": share,
        "bound": BOUND,
        "holds": None if share is None else share >= BOUND,
        "runs": list(runs),
    }


def best_rate(runs: Sequence[Mapping[str, Any]], task: str, way: str, seed: int) -> float:
    """Return the learning rate of a seed's runs that did best on the validation rows."""
    swept = _swept(runs, task, way, seed)
    return min(swept, key=lambda rate: swept[rate])


def rate_beyond(runs: Sequence[Mapping[str, Any]], task: str, way: str, seed: int) -> float | None:
    """Return the rate to try next, as far again beyond the best one of a seed's, or None where that has one on either side."""
    swept = _swept(runs, task, way, seed)
    rates, best = sorted(swept), best_rate(runs, task, way, seed)
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    return best * best / (rates[1] if best == rates[0] else rates[-2])


def _swept(runs: Sequence[Mapping[str, Any]], task: str, way: str, seed: int) -> dict[float, float]:
    """Return the validation loss of a seed's runs by their learning rate."""
    own = [run for run in runs if (run["task"], run["way"], run["seed"]) == (task, way, seed)]
    return {float(run["learning_rate"]): float(run["valid_loss"]) for run in own}


def slice_of(run: Mapping[str, Any], value: str) -> dict[str, Any]:
    """Return the scores of one slice of the test rows."""
    return next(dict(one) for one in run["test"]["slices"] if one["value"] == value)


def table(summary: Mapping[str, Any]) -> str:
    """Return the summary as Markdown: medians over seeds, with the lowest and highest."""
    lines = []
    for task, shown in _SHOWN.items():
        lines += [
            "",
            f"| {task} | rate | trained | file | {' | '.join(shown)} | {shown[-1] if task == 'regress' else shown[0]}, unseen words | seconds |",
            "|---" * (6 + len(shown)) + "|",
        ]
        for line in summary["by_way"]:
            if line["task"] == task:
                cells = [_spread(line[name]) for name in (*shown, "tail")]
                size = f"{line['adapter_bytes'] / 1e6:.2f} MB"
                lines.append(
                    f"| {line['way']} | {line['learning_rate']:g} | {line['trainable_parameters']:,} | {size} | "
                    f"{' | '.join(cells)} | {line['seconds']:.0f} |"
                )
    return "\n".join(lines[1:])


def _spread(values: Sequence[float]) -> str:
    return f"{statistics.median(values):.4f} ({min(values):.4f} - {max(values):.4f})"


def _earlier(path: Path, same: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["same"] != same:
        raise SystemExit(
            f"{path} holds runs of another model, rows or number of epochs. Name another --out, or remove it."
        )
    return list(earlier["runs"])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="minilm-l6-v2")
    parser.add_argument("--category", required=True, help="what the files with classes begin with")
    parser.add_argument("--depth", required=True, help="what the files with numbers begin with")
    parser.add_argument("--epochs", type=float, default=1)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[0.5, 1, 2], help="times each way's own rate, on the first seed"
    )
    parser.add_argument(
        "--beyond", type=int, default=4, help="rates to try at most beyond --rates, while the best is at their edge"
    )
    parser.add_argument("--keep", type=Path, help="a folder to keep the run folders in")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser


if __name__ == "__main__":
    main()
