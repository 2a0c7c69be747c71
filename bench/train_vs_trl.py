"""The same adapter on the same rows to the same loss, in a fraction of the time and memory of TRL with PEFT.

    python bench/train_vs_trl.py --workloads short long mixed classes --rounds 3

onebase and TRL's SFTTrainer with PEFT (for classes transformers' Trainer with PEFT) train in fresh processes in turns
(A B A B): same model, same first values of the adapter, rows in the same order, rank, targets, batch, steps, learning
rate at every step; ratios are taken round by round. TRL runs at its best on this machine: fp32, no activation
checkpointing, labels given as token ids, so that it prepares nothing. Other sides (`--sides`): onebase with its base in
8 bits; TRL with rows grouped by length, which sees them in another order; TRL with its defaults (activation
checkpointing, bfloat16). TRL's packing is left out: without flash attention its rows see their neighbours.
One evaluator scores all adapters on the same held-out rows, on the base that each was trained on: mean loss over labelled
tokens or rows. Tokens are the rows' real ones for all. Seconds are of the training loop; processor seconds and peak
memory are of the whole process. The record is written after each round, and goes on from the rounds that are in it.
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

SIDES: dict[str, dict[str, Any]] = {  # what differs from the plain one: settings of onebase, arguments of TRL's trainer
    "trl": {},
    "onebase": {},
    "onebase-int8": {"quantize": "int8"},
    "trl-grouped": {"train_sampling_strategy": "group_by_length"},
    "trl-defaults": {"gradient_checkpointing": True, "bf16": True},
}
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
    "mixed": Workload("text", batch_size=4, steps=12, max_length=1024),  # of 16 such rows TRL needs more than 24 GB
    "classes": Workload("classify", batch_size=16, steps=60, learning_rate=1e-3, model="minilm-l6-v2"),
}


def main() -> None:
    args = _parser().parse_args()
    record = Record(args.out, str(__doc__).partition("\n")[0], lora=LORA, workloads=_as_json(args))
    earlier = json.loads(args.out.read_text(encoding="utf-8")) if args.out.exists() else {}
    rounds: dict[str, list[dict[str, Any]]] = earlier.get("rounds", {})
    for _ in range(args.rounds):
        for name in args.workloads:
            if len(rounds.get(name, ())) < args.rounds:
                rounds.setdefault(name, []).append(run_round(args, name, turn=len(rounds.get(name, ()))))
                record.write({"by_workload": summarise(rounds), "rounds": rounds})
    print(table(summarise(rounds)))


def run_round(args: argparse.Namespace, name: str, turn: int) -> dict[str, Any]:
    """Train by every side, another one first each time, and score the adapters."""
    workload = changed(args, name)
    order = [args.sides[(place + turn) % len(args.sides)] for place in range(len(args.sides))]
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        train, valid = rows_of(args, name, scratch)
        job, tokens = write_job(args, workload, train, scratch)
        sides: dict[str, dict[str, Any]] = {}
        for who in order:
            run = run_trl if who.startswith("trl") else run_onebase
            sides[who] = run(workload, train, job, scratch / who, SIDES[who])
            print(f"{name} {who}: {sides[who]['seconds']:.1f} s", file=sys.stderr, flush=True)
        rates = {who: one.pop("learning_rates") for who, one in sides.items()}
        for who, one in sides.items():
            one["valid_loss"] = loss_on(
                args, workload, valid, scratch / who / "adapter", SIDES[who].get("quantize", "none")
            )
    bound = 1e-6 * workload.learning_rate
    same_rates = all(abs(a - b) <= bound for own in rates.values() for a, b in zip(own, rates[order[0]], strict=True))
    return {
        "sides": sides,
        "tokens": tokens,
        "examples": workload.steps * workload.batch_size,
        "equal": {"learning_rates": same_rates, "first_losses": {who: one["losses"][0] for who, one in sides.items()}},
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
        "steps": workload.steps,
        "batch_size": workload.batch_size,
        "learning_rate": workload.learning_rate,
        "dtype": "float32",
        "seed": 0,
    }
    tokens = int(examples.lengths[order].sum())
    del base, bank
    gc.collect()
    return job, tokens


def run_onebase(
    workload: Workload, train: Path, job: Mapping[str, Any], out: Path, other: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what `onebase train` took, with the loss and the learning rate of every step."""
    settings = {
        **other,
        "model": workload.model,
        "task": workload.task,
        "data": {"train": str(train), "max_length": workload.max_length},
        "adapter": {"method": "lora", **LORA, "init_from": job["start"]},
        "train": {
            "steps": workload.steps,
            "batch_size": workload.batch_size,
            "learning_rate": workload.learning_rate,
            "warmup_steps": 0,
            "seed": 0,
        },
    }
    done = train_in_fresh_process(settings, out)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return {
        **_taken(done),
        "losses": [step["loss"] for step in steps],
        "learning_rates": [step["learning_rate"] for step in steps],
    }


def run_trl(
    workload: Workload, train: Path, job: Mapping[str, Any], out: Path, other: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what SFTTrainer took, in a process that imports no onebase."""
    out.mkdir()
    file, adapter = out / "job.json", out / "adapter"
    own = {**job, "out": str(adapter), "trainer": {"use_cpu": True, **other}}
    file.write_text(json.dumps(own), encoding="utf-8")
    with (out / "trl.out").open("wb") as said, (out / "trl.err").open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "bench" / "trl_run.py"), str(file)], stdout=said, stderr=errors
        )
        done = wait_for(process)
    if process.returncode:
        raise RuntimeError((out / "trl.err").read_text(encoding="utf-8", errors="replace")[-3000:])
    for name in ("onebase.json", "config.json"):  # what PEFT's folder does not say: the base's name, the classes' names
        if (Path(job["start"]) / name).exists():
            shutil.copy(Path(job["start"]) / name, adapter)
    told = json.loads((out / "trl.out").read_text(encoding="utf-8").splitlines()[-1])
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


def loss_on(args: argparse.Namespace, workload: Workload, valid: Path, adapter: Path, quantize: Any) -> float:
    """Return the mean loss over the labelled tokens, or the rows, that were held out."""
    opened = open_adapter(adapter, model=workload.model, dtype="float32", device="cpu", quantize=quantize)
    reading = DataSettings(train=str(valid), max_length=workload.max_length)
    examples = load_rows(valid, reading, workload.task, opened.bank.base).examples
    return score(opened.bank, opened.adapter.name, examples[: args.scored]).loss


def summarise(rounds: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """Return, for each workload, rates, memory and loss of every side, with its ratios to TRL round by round."""
    return {
        name: {who: _summary([one for one in own if who in one["sides"]], who) for who in _sides_of(own)}
        for name, own in rounds.items()
    }


def _sides_of(rounds: Sequence[Mapping[str, Any]]) -> list[str]:
    return [who for who in SIDES if any(who in one["sides"] for one in rounds)]


def _summary(rounds: Sequence[Mapping[str, Any]], who: str) -> dict[str, Any]:
    own, trl = ([one["sides"][side] for one in rounds] for side in (who, "trl"))
    return {
        "examples_per_s": median_and_spread(
            [one["examples"] / run["seconds"] for one, run in zip(rounds, own, strict=True)]
        ),
        "tokens_per_s": median_and_spread(
            [one["tokens"] / run["seconds"] for one, run in zip(rounds, own, strict=True)]
        ),
        "process_cpu_seconds": median_and_spread([run["process_cpu_seconds"] for run in own]),
        "peak_rss_bytes": max(run["peak_rss_bytes"] for run in own),
        "valid_loss": statistics.median(run["valid_loss"] for run in own),
        "times_trl": median_and_spread([b["seconds"] / a["seconds"] for a, b in zip(own, trl, strict=True)]),
        "times_trl_in_cpu_seconds": median_and_spread(
            [b["process_cpu_seconds"] / a["process_cpu_seconds"] for a, b in zip(own, trl, strict=True)]
        ),
        "share_of_trls_memory": statistics.median(
            a["peak_rss_bytes"] / b["peak_rss_bytes"] for a, b in zip(own, trl, strict=True)
        ),
        "loss_less_trls": statistics.median(a["valid_loss"] - b["valid_loss"] for a, b in zip(own, trl, strict=True)),
    }


def table(summary: Mapping[str, Any]) -> str:
    """Return the summary as Markdown."""
    lines = [
        "| rows | | examples/s | tokens/s | times TRL | peak memory | of TRL's | loss |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, sides in summary.items():
        for who, one in sides.items():
            lines.append(
                f"| {name} | {who} | {one['examples_per_s']['median']:.2f} | {one['tokens_per_s']['median']:.0f} | "
                f"{one['times_trl']['median']:.2f} | {one['peak_rss_bytes'] / 1e9:.2f} GB | "
                f"{one['share_of_trls_memory']:.2f} | {one['valid_loss']:.4f} |"
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
    parser.add_argument(
        "--sides", nargs="+", choices=SIDES, default=["trl", "onebase", "onebase-int8"], help="with trl"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--scored", type=int, default=100, help="held-out examples")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser


if __name__ == "__main__":
    main()
