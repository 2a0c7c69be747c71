"""The same adapter on the same rows to the same loss, in a fraction of the time and memory of TRL with PEFT.

    python bench/train_vs_trl.py --workloads short long mixed classes --pairs 3

onebase and TRL's SFTTrainer with PEFT (for classes transformers' Trainer with PEFT) train in fresh processes in turns
(A B A B): same model, same first values of the adapter, rows in the same order, rank, targets, batch, steps, learning
rate at every step; ratios are taken pair by pair. TRL runs at its best on this machine: fp32, no activation
checkpointing, labels given as token ids, so that it prepares nothing. One evaluator scores both adapters on the same
held-out rows: mean loss over labelled tokens or rows. Tokens are the rows' real ones for both.
Seconds are of the training loop; processor seconds and peak memory are of the whole process. The record is written
after each pair, and goes on from the pairs that are in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import onebase.api as ob  # before all that imports torch

# isort: split
from fresh_run import Finished, train_in_fresh_process, wait_for
from record import DATA, MODEL, ROOT, Record, median_and_spread

from onebase.base.model import load
from onebase.config.settings import DataSettings
from onebase.data.batches import batch_of_step
from onebase.measure.judge import score
from onebase.train.data import labels_in, load_rows
from onebase.train.opening import open_adapter

LORA = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}


@dataclass(frozen=True)
class Workload:
    """What is trained on: the task of the rows, and the settings that go with them."""

    task: str
    batch_size: int
    steps: int
    learning_rate: float = 2e-4
    max_length: int | None = None
    model: str = MODEL


WORKLOADS = {
    "short": Workload("chat", batch_size=16, steps=20),
    "long": Workload("text", batch_size=4, steps=6, max_length=1024),
    "mixed": Workload("text", batch_size=16, steps=8, max_length=1024),
    "classes": Workload("classify", batch_size=16, steps=60, learning_rate=1e-3, model="minilm-l6-v2"),
}


def main() -> None:
    args = _parser().parse_args()
    record = Record(args.out, str(__doc__).partition("\n")[0], lora=LORA, workloads=_as_json(args))
    earlier = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    pairs: dict[str, list[dict[str, Any]]] = earlier.get("pairs", {})
    for _ in range(args.pairs):
        for name in args.workloads:
            if len(pairs.get(name, ())) < args.pairs:
                pairs.setdefault(name, []).append(run_pair(args, name, first=len(pairs.get(name, ())) % 2))
                record.write({"by_workload": summarise(pairs), "pairs": pairs})
    print(table(summarise(pairs)))


def run_pair(args: argparse.Namespace, name: str, first: int) -> dict[str, Any]:
    """Train by both, the one or the other first, and score both adapters."""
    workload = changed(args, name)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        train, valid = rows_of(args, name, scratch)
        job, tokens = write_job(args, workload, train, scratch)
        runs: dict[str, dict[str, Any]] = {}
        for who in ("onebase", "trl") if first == 0 else ("trl", "onebase"):
            runs[who] = run_onebase(args, workload, train, scratch) if who == "onebase" else run_trl(job, scratch)
            print(f"{name} {who}: {runs[who]['seconds']:.1f} s", file=sys.stderr, flush=True)
        ours, theirs = (runs[who].pop("learning_rates") for who in ("onebase", "trl"))
        same_rates = max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) <= 1e-6 * workload.learning_rate
        first_losses = [runs[who]["losses"][0] for who in ("onebase", "trl")]
        for who, adapter in (("onebase", scratch / "run" / "adapter"), ("trl", Path(job["out"]))):
            runs[who]["valid_loss"] = loss_on(args, workload, valid, adapter)
    return {
        **runs,
        "tokens": tokens,
        "examples": workload.steps * workload.batch_size,
        "equal": {"learning_rates": same_rates, "first_losses": first_losses},
    }


def changed(args: argparse.Namespace, name: str) -> Workload:
    """Return a workload with what the command line says otherwise."""
    workload = WORKLOADS[name]
    return replace(workload, model=args.model or workload.model, steps=args.steps or workload.steps)


def rows_of(args: argparse.Namespace, name: str, scratch: Path) -> tuple[Path, Path]:
    """Return files of rows to train on and to score on.

    Long and mixed rows are the sources of Python's standard library, which every machine has: whole files, cut into
    windows of 1,024 tokens; or beginnings of them, of 50 to 3,000 characters, most of them short.
    """
    if name in ("short", "classes"):
        kind = "define" if name == "short" else "category"
        return args.train or DATA / f"{kind}-train.jsonl", args.valid or DATA / f"{kind}-valid.jsonl"
    draws = random.Random(0)
    texts = [path.read_text(encoding="utf-8") for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    texts = [text for text in texts if len(text) > 3000]
    if name == "mixed":
        texts = [text[: int(50 * 60 ** draws.random())] for text in texts * 3]
    draws.shuffle(texts)
    parts = {"train": texts[20:], "valid": texts[:20]}
    files = {part: scratch / f"{part}.jsonl" for part in parts}
    for part, own in parts.items():
        files[part].write_text("".join(f"{json.dumps({'text': text})}\n" for text in own), encoding="utf-8")
    return files["train"], files["valid"]


def write_job(args: argparse.Namespace, workload: Workload, train: Path, scratch: Path) -> tuple[dict[str, Any], int]:
    """Return TRL's job, with the rows as token ids in the order in which onebase visits them, and their tokens.

    The adapter that both start from is written beside it.
    """
    reading = DataSettings(train=str(train), max_length=workload.max_length)
    labels = labels_in(reading, workload.task)
    base = load(workload.model, dtype="float32", device="cpu", labels=labels)
    examples = load_rows(train, reading, workload.task, base).examples
    bank = ob.Bank(base)
    bank.add("start", ob.Lora(**LORA), seed=0)
    bank.save("start", scratch / "start")
    order = [
        int(number)
        for step in range(workload.steps)
        for number in batch_of_step(len(examples), step, workload.batch_size, seed=0)
    ]
    lines = []
    for number in order:
        example = examples[number]
        ids, labelled = example.token_ids.tolist(), example.labelled.tolist()
        answer: Any = [token if counts else -100 for token, counts in zip(ids, labelled, strict=True)]
        if labels is not None:
            assert example.target is not None
            answer = int(example.target)
        lines.append(json.dumps({"input_ids": ids, "labels": answer}) + "\n")
    rows = scratch / "rows.jsonl"
    rows.write_text("".join(lines), encoding="utf-8")
    job = {
        "model": str(ob.model_path(workload.model)),
        "classes": None if labels is None else len(labels.names),
        "rows": str(rows),
        "start": str(scratch / "start"),
        "out": str(scratch / "trl"),
        "steps": workload.steps,
        "batch_size": workload.batch_size,
        "learning_rate": workload.learning_rate,
        "dtype": "float32",
        "seed": 0,
        "trainer": {"use_cpu": True},
    }
    tokens = int(examples.lengths[order].sum())
    del base, bank
    gc.collect()
    return job, tokens


def run_onebase(args: argparse.Namespace, workload: Workload, train: Path, scratch: Path) -> dict[str, Any]:
    """Return what `onebase train` took, with the loss and the learning rate of every step."""
    settings = {
        "model": workload.model,
        "task": workload.task,
        "data": {"train": str(train), "max_length": workload.max_length},
        "adapter": {"method": "lora", **LORA, "init_from": str(scratch / "start")},
        "train": {
            "steps": workload.steps,
            "batch_size": workload.batch_size,
            "learning_rate": workload.learning_rate,
            "warmup_steps": 0,
            "seed": 0,
        },
    }
    done = train_in_fresh_process(settings, scratch / "run")
    steps = [json.loads(line) for line in (scratch / "run" / "metrics.jsonl").read_text().splitlines()]
    return {
        **_taken(done),
        "losses": [step["loss"] for step in steps],
        "learning_rates": [step["learning_rate"] for step in steps],
    }


def run_trl(job: Mapping[str, Any], scratch: Path) -> dict[str, Any]:
    """Return what SFTTrainer took, in a process that imports no onebase."""
    file = scratch / "job.json"
    file.write_text(json.dumps(job), encoding="utf-8")
    with (scratch / "trl.out").open("wb") as out, (scratch / "trl.err").open("wb") as err:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "bench" / "trl_run.py"), str(file)], stdout=out, stderr=err
        )
        done = wait_for(process)
    if process.returncode:
        raise RuntimeError((scratch / "trl.err").read_text(encoding="utf-8", errors="replace")[-3000:])
    for name in ("onebase.json", "config.json"):  # what PEFT's folder does not say: the base's name, the classes' names
        if (Path(job["start"]) / name).exists():
            shutil.copy(Path(job["start"]) / name, job["out"])
    told = json.loads((scratch / "trl.out").read_text(encoding="utf-8").splitlines()[-1])
    return {
        **_taken(Finished(told, *done, told["peak_rss_bytes"])),
        "losses": told["losses"],
        "learning_rates": told["learning_rates"],
    }


def _taken(done: Finished) -> dict[str, Any]:
    return {
        "seconds": done.result["seconds"],
        "process_cpu_seconds": done.cpu_seconds,
        "peak_rss_bytes": done.peak_rss_bytes,
        "trainable_parameters": done.result["trainable_parameters"],
    }


def loss_on(args: argparse.Namespace, workload: Workload, valid: Path, adapter: Path) -> float:
    """Return the mean loss over the labelled tokens, or the rows, that were held out."""
    opened = open_adapter(adapter, model=workload.model, dtype="float32", device="cpu")
    reading = DataSettings(train=str(valid), max_length=workload.max_length)
    examples = load_rows(valid, reading, workload.task, opened.bank.base).examples
    return score(opened.bank, opened.adapter.name, examples[: args.scored]).loss


def summarise(pairs: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return, for each workload, rates and memory of both with their ratios pair by pair."""
    found = {}
    for name, own in pairs.items():
        both: dict[str, Any] = {}
        for who in ("onebase", "trl"):
            both[who] = {
                "examples_per_s": median_and_spread([pair["examples"] / pair[who]["seconds"] for pair in own]),
                "tokens_per_s": median_and_spread([pair["tokens"] / pair[who]["seconds"] for pair in own]),
                "process_cpu_seconds": median_and_spread([pair[who]["process_cpu_seconds"] for pair in own]),
                "peak_rss_bytes": max(pair[who]["peak_rss_bytes"] for pair in own),
                "valid_loss": statistics.median(pair[who]["valid_loss"] for pair in own),
            }
        both["speed_ratio"] = median_and_spread([pair["trl"]["seconds"] / pair["onebase"]["seconds"] for pair in own])
        both["cpu_ratio"] = median_and_spread(
            [pair["trl"]["process_cpu_seconds"] / pair["onebase"]["process_cpu_seconds"] for pair in own]
        )
        both["memory_share"] = both["onebase"]["peak_rss_bytes"] / both["trl"]["peak_rss_bytes"]
        both["loss_difference"] = both["onebase"]["valid_loss"] - both["trl"]["valid_loss"]
        found[name] = both
    return found


def table(summary: Mapping[str, Any]) -> str:
    """Return the summary as Markdown."""
    lines = [
        "| rows | | examples/s | tokens/s | times TRL | peak memory | loss |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, both in summary.items():
        for who in ("trl", "onebase"):
            one = both[who]
            ratio = "1" if who == "trl" else f"{both['speed_ratio']['median']:.2f}"
            lines.append(
                f"| {name} | {who} | {one['examples_per_s']['median']:.2f} | {one['tokens_per_s']['median']:.0f} | {ratio} | "
                f"{one['peak_rss_bytes'] / 1e9:.2f} GB | {one['valid_loss']:.4f} |"
            )
    return "\n".join(lines)


def _as_json(args: argparse.Namespace) -> dict[str, Any]:
    changed_ones = {name: asdict(changed(args, name)) for name in args.workloads}
    return {name: {**one, "model": Path(one["model"]).name} for name, one in changed_ones.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", help="in place of the workload's own")
    parser.add_argument("--train", type=Path, help="rows in place of those of short and classes")
    parser.add_argument("--valid", type=Path, help="held-out rows, likewise")
    parser.add_argument("--steps", type=int, help="in place of the workload's own")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=list(WORKLOADS))
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--scored", type=int, default=100, help="held-out examples")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser


if __name__ == "__main__":
    main()
