"""PEFT opens our adapters and we open PEFT's with equal logits, and we learn as a plain transformers + PEFT loop does.

    python bench/against_peft.py

1. An adapter trained by onebase, opened by peft; one trained by peft, opened by onebase. The logits of all tokens of
   real rows: padded, with transformers' own attention, in peft; flat in onebase. Mark: max abs difference <= 1e-4, fp32.
   Beside it stands what padding alone changes within peft: the rounding that two ways of batching have between them.
2. The training loss of every step, against a plain loop: the same initial weights (read by peft from the file that
   onebase wrote), the same order of rows, torch's AdamW, clipping, warm-up and cosine, padded batches, the whole
   logits; it shares no code with onebase. The largest difference over 50 steps is stated.

--parts logits or --parts curve does one of the two and keeps what the record says of the other.
The rows are rendered and labelled by the chat template alone and must come out as onebase's. Times do not matter here.
On 2 cores about 8 minutes.
"""

from __future__ import annotations

import argparse
import gc
import math
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onebase.api as ob  # before all that imports torch: it asks MKL for reproducible bits

# isort: split
import torch
import torch.nn.functional as F
from fresh_run import add_data_options
from peft import LoraConfig, PeftModel, get_peft_model
from record import Record, earlier_parts, file_facts
from torch import Tensor
from transformers import AutoModelForCausalLM

from onebase.base.route import Route
from onebase.data.batches import batch_of_step, flatten
from onebase.data.examples import Examples
from onebase.train.data import load_rows
from onebase.train.opening import open_adapter
from onebase.train.progress import Quiet, StepRecord

MARK = 1e-4
_IGNORED = -100
_BETAS, _EPSILON, _MAX_GRAD_NORM, _WARMUP_RATIO = (0.9, 0.999), 1e-8, 1.0, 0.03

Row = tuple[list[int], list[bool]]


def main() -> None:
    args = _parser().parse_args()
    facts = {"train": file_facts(args.train), "valid": file_facts(args.valid), "r": 16, "target_modules": "all-linear"}
    record = Record(args.out, str(__doc__).partition("\n")[0], data=facts)
    folder = str(ob.model_path(args.model))
    values = earlier_parts(args.out, "logits", "curve")
    with tempfile.TemporaryDirectory() as scratch:
        for name, part in (("logits", compare_logits), ("curve", compare_curves)):
            if name in args.parts:
                values[name] = part(args, folder, Path(scratch) / name)
                record.write(values)
    for name, part in values.items():
        print(name, {key: value for key, value in part.items() if not isinstance(value, list)})


# --------------------------------------------------------------------------------------------------------- the logits


def compare_logits(args: argparse.Namespace, folder: str, scratch: Path) -> dict[str, Any]:
    """Return the largest differences of logits for an adapter of each origin, opened by both."""
    base, bank = _bank(args, folder)
    rows = _examples(base, args.valid, args.logit_rows)
    job = ob.Job(data=args.train, steps=args.logit_steps, batch_size=args.batch_size, learning_rate=1e-3)
    ob.train(bank, {"ours": job})
    bank.save("ours", scratch / "ours")
    plain_rows = plain_examples(base.tokenizer, args.train, args.logit_steps * args.batch_size)
    train_by_peft(folder, plain_rows, args, scratch / "peft")
    bank.remove("ours")
    del bank, base
    found = {
        "trained_by_onebase_opened_by_peft": _differences(folder, scratch / "ours", rows),
        "trained_by_peft_opened_by_onebase": _differences(folder, scratch / "peft", rows),
    }
    largest = max(part["max_abs_difference"] for part in found.values())
    return {"rows": len(rows), "tokens": rows.token_count, "mark": MARK, "reached": largest <= MARK, **found}


def _differences(folder: str, adapter: Path, rows: Examples) -> dict[str, float]:
    """Return how far one adapter's logits lie apart in peft and here, and from the base's: that it changes something."""
    theirs, one_by_one, base_alone = _logits_of_peft(folder, adapter, rows)
    gc.collect()
    opened = open_adapter(adapter, model=folder, dtype="float32", device="cpu")
    ours = _logits_of_onebase(opened.bank, opened.adapter.name, rows)
    return {
        "max_abs_difference": _largest(ours, theirs),
        "max_abs_difference_within_peft_padded_or_alone": _largest(theirs, one_by_one),
        "max_abs_difference_from_base": _largest(theirs, base_alone),
        "max_abs_logit": max(float(part.abs().max()) for part in theirs),
    }


@torch.no_grad()
def _logits_of_onebase(bank: Any, name: str, rows: Examples) -> list[Tensor]:
    batch = flatten(list(rows), range(len(rows)), name)
    hidden = bank.base.hidden(batch.token_ids, bank.route(batch.layout))
    route: Route = bank.route(batch.layout)
    head = bank.head
    segments = next(iter(route.rows.values()))
    return [head.logits(part, segments) for part in hidden.split(rows.lengths.tolist())]


@torch.no_grad()
def _logits_of_peft(folder: str, adapter: Path, rows: Examples) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return every row's logits from one padded batch, from a batch of its own, and padded without the adapter."""
    model = PeftModel.from_pretrained(_plain_model(folder), str(adapter)).eval()

    def logits(numbers: Sequence[int]) -> list[Tensor]:
        chosen = [(rows[n].token_ids.tolist(), rows[n].labelled.tolist()) for n in numbers]
        ids, mask, _ = pad(chosen)
        out = model(input_ids=ids, attention_mask=mask).logits
        return [line[: len(tokens)].clone() for line, (tokens, _) in zip(out, chosen, strict=True)]

    padded, alone = logits(range(len(rows))), [logits([n])[0] for n in range(len(rows))]
    with model.disable_adapter():
        return padded, alone, logits(range(len(rows)))


def _largest(left: Sequence[Tensor], right: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(left, right, strict=True))


def train_by_peft(folder: str, rows: Sequence[Row], args: argparse.Namespace, out: Path) -> None:
    """Train an adapter with peft alone, its own initial weights included, and let it write the files."""
    torch.manual_seed(0)
    config = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(_plain_model(folder), config)
    order = [range(s * args.batch_size, (s + 1) * args.batch_size) for s in range(args.logit_steps)]
    for _ in plain_losses(model, rows, order, learning_rate=1e-3):
        pass
    model.save_pretrained(str(out))


# ---------------------------------------------------------------------------------------------------------- the curve


class _Losses(Quiet):
    """Progress that keeps the steps' losses."""

    def __init__(self) -> None:
        self.values: list[float] = []

    def stepped(self, record: StepRecord) -> None:
        self.values.append(record.loss)
        print(f"onebase step {record.step}: {record.loss:.6f}", flush=True)


def compare_curves(args: argparse.Namespace, folder: str, scratch: Path) -> dict[str, Any]:
    """Return both curves and where they are furthest apart."""
    base, bank = _bank(args, folder)
    bank.save("ours", scratch / "initial")
    watch = _Losses()
    settings = {"steps": args.steps, "batch_size": args.batch_size, "learning_rate": args.learning_rate}
    ob.train(bank, {"ours": ob.Job(data=args.train, **settings)}, progress=watch)
    examples = _examples(base, args.train, None)
    plain_rows = plain_examples(base.tokenizer, args.train, None)
    same = [(e.token_ids.tolist(), e.labelled.tolist()) for e in examples] == plain_rows
    del bank, base
    gc.collect()
    model = PeftModel.from_pretrained(_plain_model(folder), str(scratch / "initial"), is_trainable=True)
    order = [batch_of_step(len(plain_rows), step, args.batch_size, seed=0).tolist() for step in range(args.steps)]
    theirs = []
    for loss in plain_losses(model, plain_rows, order, learning_rate=args.learning_rate):
        theirs.append(loss)
        print(f"plain step {len(theirs)}: {loss:.6f} ({loss - watch.values[len(theirs) - 1]:+.1e})", flush=True)
    apart = [abs(a - b) for a, b in zip(watch.values, theirs, strict=True)]
    return {
        **settings,
        "largest_difference": max(apart),
        "at_step": apart.index(max(apart)) + 1,
        "largest_relative_difference": max(d / b for d, b in zip(apart, theirs, strict=True)),
        "rows_equal_those_of_the_chat_template": same,
        "first_loss": watch.values[0],
        "last_loss": watch.values[-1],
        "onebase": watch.values,
        "plain": theirs,
    }


def plain_losses(
    model: Any, rows: Sequence[Row], order: Sequence[Sequence[int]], *, learning_rate: float
) -> Iterator[float]:
    """Train as anybody would write it down, one padded batch a step, and yield the loss of each step."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=_BETAS, eps=_EPSILON, weight_decay=0.0)
    warmup = math.ceil(_WARMUP_RATIO * len(order))
    model.train()
    for step, numbers in enumerate(order):
        ids, mask, labels = pad([rows[n] for n in numbers])
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=_IGNORED)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, _MAX_GRAD_NORM)
        curve = (step + 1) / warmup if step < warmup else _cosine((step - warmup) / max(1, len(order) - warmup))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * curve
        optimizer.step()
        yield loss.item()


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def plain_examples(tokenizer: Any, path: Path, count: int | None) -> list[Row]:
    """Return the tokens of each row as the chat template renders it; labelled: the answer up to its end token."""
    from datasets import load_dataset

    rows = load_dataset("json", data_files=str(path), split="train")
    made = []
    for row in rows.select(range(len(rows) if count is None else min(count, len(rows)))):
        messages = row["messages"]
        whole = tokenizer.apply_chat_template(messages, tokenize=False)
        asked = tokenizer.apply_chat_template(messages[:-1], tokenize=False, add_generation_prompt=True)
        ids = tokenizer(whole, add_special_tokens=False)["input_ids"]
        start = len(tokenizer(asked, add_special_tokens=False)["input_ids"])
        end_token = tokenizer.convert_tokens_to_ids("<|im_end|>")
        end = len(ids) - ids[::-1].index(end_token)
        made.append((ids, [start <= place < end for place in range(len(ids))]))
    return made


def pad(rows: Sequence[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (token ids, attention mask, labels) of rows, padded on the right."""
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full((len(rows), longest), _IGNORED)
    for line, (tokens, labelled) in enumerate(rows):
        ids[line, : len(tokens)] = torch.tensor(tokens)
        mask[line, : len(tokens)] = 1
        labels[line, : len(tokens)] = torch.where(torch.tensor(labelled), torch.tensor(tokens), _IGNORED)
    return ids, mask, labels


def _bank(args: argparse.Namespace, folder: str) -> tuple[ob.Base, ob.Bank]:
    base = ob.load(folder, dtype="float32", device="cpu")
    bank = ob.Bank(base)
    bank.add("ours", ob.Lora(r=16, lora_alpha=32), seed=0)
    return base, bank


def _examples(base: ob.Base, path: Path, count: int | None) -> Examples:
    job = ob.Job(data=path)
    examples = load_rows(path, job.reading, job.task, base).examples
    return examples if count is None else Examples([examples[n] for n in range(min(count, len(examples)))])


def _plain_model(folder: str) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add_data_options(parser)
    parser.add_argument("--parts", nargs="+", choices=["logits", "curve"], default=["logits", "curve"])
    parser.add_argument("--steps", type=int, default=50, help="steps of the curve")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="of the curve")
    parser.add_argument("--logit-steps", type=int, default=5, help="steps that the adapters of part 1 are trained")
    parser.add_argument("--logit-rows", type=int, default=32, help="rows of --valid whose logits are compared")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser


if __name__ == "__main__":
    main()
