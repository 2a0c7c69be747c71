"""The cost of a step grows linearly with its real tokens, not with its longest row.

    python bench/linear_cost.py --train define-train.jsonl

Steps (forward, backward, clipping, AdamW; LoRA r 16 on all linear layers) on batches of 8 rows whose number of tokens and
longest row vary independently: all rows equal, or one that holds half of the batch, up to five sixths, beside short
ones. Rows are stretches of the tokens of the file's rows, every token learned but the first. onebase computes real tokens;
beside it, in turns, transformers and PEFT with the same adapter on the same rows padded to the longest, in one batch as
a collator makes it, as far as --padded-cells goes (it takes 4 MB a cell). Losses must be equal. Of --rounds times each the
median counts, of the clock and of the processor; on a machine with other work the second is the one to read, with
OMP_NUM_THREADS=1 (waiting threads spin). Lines are fitted to the medians: seconds = a + b tokens. Attention within a row is
quadratic in its length: the claim is about the range that is measured.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import onebase.api as ob  # before all that imports torch

# isort: split
import matplotlib as mpl
import numpy as np
import torch
from figures import save
from fresh_run import add_data_options
from matplotlib.figure import Figure
from peft import PeftModel
from record import Record, file_facts, median_and_spread
from transformers import AutoModelForCausalLM

from onebase.base.memory import peak_rss_bytes
from onebase.config.settings import TrainSettings
from onebase.data.examples import Example, Examples
from onebase.measure.forward import batches_of as flat_batches_of
from onebase.train.data import load_rows
from onebase.train.member import Member

RATE = 1e-15
"""So small that nothing is learned: a step of one side may be left out, and both still compute the same."""
_SAME_LOSS = 1e-5


@dataclass
class Batch:
    """Rows, and what was measured on them: each side's seconds of every step, and its loss."""

    rows: Examples
    computed: int = 0
    """Its tokens, those of a prefix that rows share once."""
    seconds: dict[str, list[float]] = field(default_factory=lambda: {"onebase": [], "padded": []})
    processor: dict[str, list[float]] = field(default_factory=lambda: {"onebase": [], "padded": []})
    losses: dict[str, float] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return int(self.rows.lengths.max())

    @property
    def cells(self) -> int:
        """Tokens and padding, where every row is as long as the longest."""
        return len(self.rows) * self.longest


def main() -> None:
    args = _parser().parse_args()
    record = Record(args.out, str(__doc__).partition("\n")[0], model=Path(args.model).name, data=file_facts(args.train))
    with tempfile.TemporaryDirectory() as folder:
        member, stream = _onebase(args, Path(folder))
        padded = _Padded(args.model, Path(folder))
        batches = batches_of(stream, args.totals, args.shares, args.rows)
        for batch in (batches[0], batches[-1]):  # to warm up
            _step(member, batch)
        _ = padded.step(batches[0].rows)
        for turn in range(args.rounds):
            for number, batch in enumerate(batches):
                _time(member, padded, batch, args.padded_cells, ours_first=(turn + number) % 2 == 0)
            print(f"round {turn + 1} of {args.rounds}", file=sys.stderr, flush=True)
            values = {"threads": torch.get_num_threads(), **summarise(batches), "peak_rss_bytes": peak_rss_bytes()}
            record.write(values)
    save(plot(values), args.out.with_suffix(".svg"))
    print(table(values))


def _onebase(args: argparse.Namespace, folder: Path) -> tuple[Member, np.ndarray]:
    """Return a member to step with, and the tokens of the rows end to end; its adapter is written for the other side."""
    base = ob.load(args.model, dtype="float32", device="cpu")
    bank = ob.Bank(base)
    adapter = bank.add("adapter", ob.Lora(r=16, lora_alpha=32))
    draws = torch.Generator().manual_seed(0)
    for name, parameter in adapter.parameters():  # a fresh B is zero, and would hide what is wrong about A
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01, generator=draws)
    bank.save("adapter", folder)
    job = ob.Job(data=args.train)
    examples = load_rows(args.train, job.reading, job.task, base).examples
    settings = TrainSettings(steps=10**6, batch_size=args.rows, learning_rate=RATE)
    member = Member(bank.routed, adapter, examples, settings, shuffle=True, budget=args.micro_batch_tokens)
    return member, examples.token_ids


class _Padded:
    """The same model and adapter as transformers and PEFT run them: rows padded to the longest, logits everywhere."""

    def __init__(self, model: str, adapter: Path) -> None:
        base = AutoModelForCausalLM.from_pretrained(ob.model_path(model), dtype=torch.float32)
        self.model = PeftModel.from_pretrained(base, adapter, is_trainable=True)
        self.learned = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learned, lr=RATE, weight_decay=0.0, fused=True)

    def step(self, rows: Examples) -> tuple[float, float]:
        """Return the seconds and the loss of a step."""
        began = time.perf_counter()
        longest = int(rows.lengths.max())
        ids = torch.zeros(len(rows), longest, dtype=torch.int64)
        mask = torch.zeros_like(ids)
        for line, row in enumerate(rows):
            ids[line, : len(row.token_ids)] = torch.from_numpy(row.token_ids.astype(np.int64))
            mask[line, : len(row.token_ids)] = 1
        labels = ids.masked_fill(mask == 0, -100)
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.optimizer.step()
        return time.perf_counter() - began, loss.item()


def batches_of(stream: np.ndarray, totals: Sequence[int], shares: Sequence[float], rows: int) -> list[Batch]:
    """Return a batch for each total of tokens and each share of it that the longest row has, of tokens that follow each other."""
    made, at = [], 0
    for total in totals:
        for share in shares:
            examples = []
            for length in lengths_of(total, share, rows):
                ids = np.take(stream, range(at, at + length), mode="wrap").astype(np.int32)
                examples.append(Example(ids, np.arange(length) > 0, f"tokens {at} and on", {}))
                at += length
            made.append(Batch(Examples(examples)))
    return made


def lengths_of(total: int, share: float, rows: int) -> list[int]:
    """Return the lengths of rows that have `total` tokens, the longest `share` of them, the others as equal as can be."""
    longest = max(round(total * share), -(-total // rows))
    rest, others = total - longest, rows - 1
    if rest < 2 * others:
        raise SystemExit(
            f"--totals: {total} tokens leave {rest} for {others} rows beside one of {longest}; two each at least."
        )
    return [longest, *(rest // others + (place < rest % others) for place in range(others))]


def _step(member: Member, batch: Batch) -> tuple[float, float]:
    """Return the seconds and the loss of onebase's step, and count the tokens that it computes."""
    member.examples, name = batch.rows, member.adapter.name
    cut = flat_batches_of(member.bank, name, batch.rows, range(len(batch.rows)), member.budget_tokens)
    batch.computed = sum(part.layout.token_count for part in cut)
    done = member.run_step()
    return done.seconds, done.loss


def _time(member: Member, padded: _Padded, batch: Batch, most_cells: int, *, ours_first: bool) -> None:
    """Step once on each side, the one or the other first.

    Raises:
        RuntimeError: the losses differ.
    """
    sides = ["onebase", "padded"] if ours_first else ["padded", "onebase"]
    for side in sides if batch.cells <= most_cells else ["onebase"]:
        before = time.process_time()
        seconds, loss = _step(member, batch) if side == "onebase" else padded.step(batch.rows)
        batch.processor[side].append(time.process_time() - before)
        batch.seconds[side].append(seconds)
        batch.losses[side] = loss
    found = list(batch.losses.values())
    if not all(math.isclose(loss, found[0], rel_tol=_SAME_LOSS) for loss in found):
        raise RuntimeError(f"{batch.computed} tokens, longest row {batch.longest}: losses {batch.losses}")


def summarise(batches: Sequence[Batch]) -> dict[str, Any]:
    """Return every batch with its times, and the lines through the medians."""
    lines = [
        {
            "tokens": batch.computed,
            "longest": batch.longest,
            "cells": batch.cells,
            "losses": batch.losses,
            **{
                side: {
                    "seconds": median_and_spread(batch.seconds[side]),
                    "processor": median_and_spread(batch.processor[side]),
                }
                for side in ("onebase", "padded")
                if batch.seconds[side]
            },
        }
        for batch in batches
    ]
    both = [line for line in lines if "padded" in line]
    return {
        "batches": lines,
        "onebase_by_tokens": fitted(lines, "tokens", "onebase", "processor"),
        "padded_by_tokens": fitted(both, "tokens", "padded", "processor"),
        "padded_by_cells": fitted(both, "cells", "padded", "processor"),
        "onebase_by_tokens_on_the_clock": fitted(lines, "tokens", "onebase", "seconds"),
    }


def fitted(lines: Sequence[Mapping[str, Any]], across: str, side: str, clock: str) -> dict[str, float]:
    """Return the least-squares line seconds = a + b x through the medians, and the share of their variance it explains."""
    x = np.array([line[across] for line in lines], dtype=float)
    y = np.array([line[side][clock]["median"] for line in lines])
    slope, intercept = np.polyfit(x, y, 1)
    left = y - (intercept + slope * x)
    r_squared = 1 - float((left**2).sum() / ((y - y.mean()) ** 2).sum())
    return {"seconds": float(intercept), "seconds_a_token": float(slope), "r_squared": r_squared}


def table(values: Mapping[str, Any]) -> str:
    """Return the batches as a Markdown table, and the lines below it."""
    lines = [
        "| real tokens | longest row | padded to | onebase, processor (clock) | padded, processor (clock) | padded / onebase |",
        "|---|---|---|---|---|---|",
    ]
    for line in values["batches"]:
        ours, theirs = (_both(line, side) for side in ("onebase", "padded"))
        ratio = ""
        if "padded" in line:
            ratio = f"{line['padded']['processor']['median'] / line['onebase']['processor']['median']:.2f}"
        lines.append(f"| {line['tokens']:,} | {line['longest']:,} | {line['cells']:,} | {ours} | {theirs} | {ratio} |")
    names = {
        "onebase_by_tokens": "onebase",
        "onebase_by_tokens_on_the_clock": "onebase, clock",
        "padded_by_tokens": "padded",
        "padded_by_cells": "padded",
    }
    for name, side in names.items():
        line, unit = values[name], "cells" if name.endswith("cells") else "tokens"
        lines.append(
            f"\n{side}: {line['seconds']:.3f} s + {1000 * line['seconds_a_token']:.3f} ms x {unit}, "
            f"R^2 = {line['r_squared']:.4f}"
        )
    return "\n".join(lines)


def _both(line: Mapping[str, Any], side: str) -> str:
    """Return a side's processor seconds, and those of the clock behind them."""
    if side not in line:
        return "not run"
    return f"{line[side]['processor']['median']:.2f} s ({line[side]['seconds']['median']:.2f})"


def plot(values: Mapping[str, Any]) -> Figure:
    """Return the processor seconds of a step over its real tokens, a colour for each share that the longest row has."""
    figure = Figure((7.5, 4.8), layout="constrained")
    panel = figure.subplots()
    shares = sorted({_share(line) for line in values["batches"]})
    colours = dict(zip(shares, mpl.colormaps["viridis"](np.linspace(0, 0.9, len(shares))), strict=True))
    for side, look in (
        ("padded", {"marker": "x", "linestyle": ":"}),
        ("onebase", {"marker": "o", "linestyle": "none"}),
    ):
        for share in shares:
            own = [line for line in values["batches"] if side in line and _share(line) == share]
            name = "onebase" if side == "onebase" else "transformers, PEFT, padded"
            panel.plot(
                [line["tokens"] for line in own],
                [line[side]["processor"]["median"] for line in own],
                color=colours[share],
                label=f"{name}: longest row {share} of the tokens" if own else None,
                **look,
            )
    line = values["onebase_by_tokens"]
    ends = np.array([0, max(one["tokens"] for one in values["batches"])])
    panel.plot(
        ends,
        line["seconds"] + line["seconds_a_token"] * ends,
        color="black",
        linewidth=1,
        label=f"{line['seconds']:.2f} s + {1000 * line['seconds_a_token']:.2f} ms a token, R^2 = {line['r_squared']:.4f}",
    )
    panel.set_xlabel("real tokens of the step (8 rows)")
    panel.set_ylabel("processor seconds a step")
    panel.set_ylim(bottom=0)
    panel.set_xlim(left=0)
    panel.grid(alpha=0.3)
    panel.set_title("What a step costs: its real tokens, and hardly its longest row")
    figure.legend(loc="outside lower center", ncols=2, fontsize="x-small")
    return figure


def _share(line: Mapping[str, Any]) -> Fraction:
    """Return which part of a batch's tokens its longest row has, as the nearest simple fraction."""
    return Fraction(line["longest"], line["tokens"]).limit_denominator(8)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add_data_options(parser)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--totals", type=int, nargs="+", default=[256, 512, 1024, 2048], help="real tokens of a step")
    parser.add_argument(
        "--shares", type=float, nargs="+", default=[1 / 8, 1 / 4, 1 / 2, 1 / 1.2], help="of them in the longest row"
    )
    parser.add_argument(
        "--padded-cells", type=int, default=2048, help="the most tokens and padding that are run padded"
    )
    parser.add_argument("--micro-batch-tokens", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser


if __name__ == "__main__":
    main()
