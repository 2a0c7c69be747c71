"""Every method at its default learns: validation loss, trained numbers, time and file size on define-train.

    python bench/compare_methods.py --train define-train.jsonl --valid define-valid.jsonl --seeds 0 1 2

`onebase train` in a fresh process for each method and seed, same rows, same steps of 8 rows, each method's own default
learning rate; --jobs of them at a time (with OMP_NUM_THREADS=1, as many as there are cores). A method that the model cannot have (BitFit without biases) stands in the record with what it
said. The record is written after each run, and a run that is in it already (same method, settings, rate, seed) is
skipped: interrupt it and start it again. What a step takes comes from step_time.json, where the methods step in turns: it
is measured first if it is not there. Prints the table as Markdown; --plot-only prints and draws from the records.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import matplotlib as mpl
from figures import save
from fresh_run import RefusedError, add_data_options, settings_of, train_in_fresh_process
from matplotlib.figure import Figure
from methods import METHODS, default_rate
from record import ROOT, Record, file_facts

_KEPT = ("valid_loss_before", "valid_loss", "train_loss", "trainable_parameters", "adapter_bytes")
_COLOURS, _MARKERS = mpl.colormaps["tab10"], "os^"


def main() -> None:
    args = _parser().parse_args()
    times = _step_times(args)
    same = {
        "steps": args.steps,
        "batch_size": args.batch_size,
        "model": Path(args.model).name,
        "train": file_facts(args.train),
        "valid": file_facts(args.valid),
    }
    trials = _earlier_trials(args.out, same)
    if not args.plot_only:
        record = Record(args.out, str(__doc__).partition("\n")[0], same=same)
        wanted = [(name, seed) for seed in args.seeds for name in args.methods]
        wanted = [w for w in wanted if not any(_facts(*w).items() <= trial.items() for trial in trials)]
        with ThreadPoolExecutor(args.jobs) as pool:
            for done in as_completed([pool.submit(_trial, args, name, seed) for name, seed in wanted]):
                trials.append(done.result())
                record.write(summarise(trials, times))  # after each: a long comparison may be interrupted
                trial = trials[-1]
                found = trial.get("valid_loss", trial.get("refused"))
                print(f"{trial['method']} seed {trial['seed']}: {found}", file=sys.stderr, flush=True)
        if trials:
            record.write(summarise(trials, times))
    if not trials:
        raise SystemExit("nothing was measured yet")
    summary = summarise(trials, times)
    if summary["by_method"]:
        save(plot(summary), args.out.with_suffix(".svg"))
    print(table(summary))


def _step_times(args: argparse.Namespace) -> dict[str, Any]:
    """Return what a step of each method takes, measured now if there is no record of it."""
    if not args.times.exists():
        words = [f"--model={args.model}", f"--train={args.train}", f"--out={args.times}", "--methods", *args.methods]
        subprocess.run([sys.executable, str(ROOT / "bench" / "step_time.py"), *words], check=True)
    found: dict[str, Any] = json.loads(args.times.read_text(encoding="utf-8"))["by_method"]
    return found


def _facts(name: str, seed: int) -> dict[str, Any]:
    """Return what a trial depends on beside the rows."""
    return {"method": name, "seed": seed, "learning_rate": default_rate(name), "adapter": METHODS[name]}


def _trial(args: argparse.Namespace, name: str, seed: int) -> dict[str, Any]:
    settings = settings_of(args, METHODS[name], steps=args.steps, batch_size=args.batch_size, seed=seed)
    with tempfile.TemporaryDirectory() as folder:
        try:
            run = train_in_fresh_process(settings, Path(folder) / "run")
        except RefusedError as error:
            said = " ".join(str(error).replace(str(args.model), Path(args.model).name).replace(folder, "").split())
            return {**_facts(name, seed), "refused": said}
        weights = Path(folder) / "run" / "adapter" / "adapter_model.safetensors"
        return {
            **_facts(name, seed),
            **{key: run.result[key] for key in _KEPT},
            "file_bytes": weights.stat().st_size,
            "peak_rss_bytes": run.peak_rss_bytes,
        }


def summarise(trials: Sequence[Mapping[str, Any]], times: Mapping[str, Any]) -> dict[str, Any]:
    """Return the trials by method with medians, spreads and step times, best loss first; what was refused; every trial."""
    by_method = []
    trials = sorted(trials, key=lambda trial: (trial["seed"], list(METHODS).index(trial["method"])))
    for name in dict.fromkeys(trial["method"] for trial in trials if "refused" not in trial):
        own = [trial for trial in trials if trial["method"] == name and "refused" not in trial]
        line = {key: own[0][key] for key in ("method", "learning_rate", "trainable_parameters", "file_bytes")}
        line |= {key: _spread([trial[key] for trial in own]) for key in ("valid_loss", "peak_rss_bytes")}
        line |= {key: times[name][key] for key in ("wall_seconds", "wall_ratio_to_lora")}
        line["learns"] = all(trial["valid_loss"] < trial["valid_loss_before"] for trial in own)
        line["valid_loss_before"] = own[0]["valid_loss_before"]
        by_method.append(line)
    by_method.sort(key=lambda line: float(line["valid_loss"]["median"]))
    refused = {trial["method"]: trial["refused"] for trial in trials if "refused" in trial}
    return {"by_method": by_method, "refused": refused, "trials": list(trials)}


def _spread(values: Sequence[float]) -> dict[str, Any]:
    return {"median": statistics.median(values), "lowest": min(values), "highest": max(values), "runs": len(values)}


def table(summary: Mapping[str, Any]) -> str:
    """Return the record's summary as a Markdown table."""
    lines = [
        "| method | learning rate | trained | file | loss | lowest - highest | seeds | a step | of LoRA's | memory |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for line in summary["by_method"]:
        loss = line["valid_loss"]
        lines.append(
            f"| `{line['method']}`{'' if line['learns'] else ' (does not learn)'} | {line['learning_rate']:g} "
            f"| {line['trainable_parameters']:,} | {_size(line['file_bytes'])} | {loss['median']:.4f} "
            f"| {loss['lowest']:.4f} - {loss['highest']:.4f} | {loss['runs']} | {line['wall_seconds']['median']:.2f} s "
            f"| {line['wall_ratio_to_lora']['median']:.2f} | {_size(line['peak_rss_bytes']['median'])} |"
        )
    lines += [f"| `{name}` | refused | | | | | | | | |" for name in summary["refused"]]
    return "\n".join(lines)


def _size(count: float) -> str:
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def plot(summary: Mapping[str, Any]) -> Figure:
    """Return the loss over trained numbers, time of a step and size of the file, in three panels of one height."""
    figure = Figure((11, 5.5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    figure.suptitle("Every method at its default on define-train: median over seeds, lowest to highest")
    for number, line in enumerate(summary["by_method"]):
        loss = line["valid_loss"]
        spread = [[loss["median"] - loss["lowest"]], [loss["highest"] - loss["median"]]]
        look = {"color": _COLOURS(number % 10), "marker": _MARKERS[number // 10], "capsize": 2}
        across = (line["trainable_parameters"], line["wall_seconds"]["median"], line["file_bytes"] / 1e6)
        for panel, value in zip(panels, across, strict=True):
            panel.errorbar(value, loss["median"], yerr=spread, label=line["method"], linestyle="none", **look)
    for panel, name in zip(panels, ("trained numbers", "seconds a step (16 rows)", "adapter file, MB"), strict=True):
        panel.set_xlabel(name)
        panel.grid(alpha=0.3)
    panels[0].set_xscale("log")
    panels[2].set_xscale("log")
    panels[0].set_ylabel("loss on define-valid")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", fontsize="small")
    return figure


def _earlier_trials(path: Path, same: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the trials of the record there is, if they were made with the same steps, model and rows.

    Those of a method whose default has changed since are left out.
    """
    if not path.exists():
        return []
    earlier = json.loads(path.read_text(encoding="utf-8"))
    if earlier["same"] != same:
        raise SystemExit(f"{path} holds trials with other steps, model or rows. Name another --out, or remove it.")
    return [t for t in earlier["trials"] if _facts(t["method"], t["seed"]).items() <= t.items()]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add_data_options(parser)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--plot-only", action="store_true", help="train nothing, show the record there is")
    parser.add_argument("--times", type=Path, default=Path(__file__).with_name("step_time.json"))
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser


if __name__ == "__main__":
    main()
