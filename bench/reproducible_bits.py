"""What reproducible bits cost: MKL's strict mode (MKL_CBWR) against its default, on real training steps in pairs.

    python bench/reproducible_bits.py --train define-train.jsonl

1. bits: every matrix product of SmolLM2's layers (forward and for the input's gradient), of LoRA's pairs and of the
   head, with 1 to 1,100 rows: is a row's result that of the same row among other numbers of rows? And are the hidden
   states of real examples, through the adapted model, those of the example alone? Counted with the strict mode and
   without. What is promised: none differs with it.
2. cost: fresh processes in turns, with and without, each training the same steps; the ratio (with / without) of the
   median step of neighbours, in wall seconds and in seconds of the processor, and the median of these ratios.

Part 1 does not depend on what else runs (1 minute); part 2 does (2 cores: 1.5 minutes a process, 14 processes).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fresh_run import add_data_options
from record import Record, earlier_parts, file_facts, median_and_spread

VARIABLE = "MKL_CBWR"
MARK_RATIO = 1.03
_ROWS = (1, 2, 3, 5, 8, 13, 16, 17, 31, 48, 64, 100, 127, 200, 256, 333, 512, 700, 870, 1024, 1100)


def main() -> None:
    args = _parser().parse_args()
    if args.worker is not None:
        print(json.dumps({"bits": _bits, "steps": _steps}[args.worker](args)))
        return
    from onebase.ops.bits import instruction_set

    strict = args.branch or f"{instruction_set()},STRICT"
    record = Record(args.out, str(__doc__).partition("\n")[0], setting=f"{VARIABLE}={strict}", rows=list(_ROWS))
    values = earlier_parts(args.out, "bits", "cost")
    if "bits" in args.parts:
        values["bits"] = {"strict": _in_fresh_process("bits", strict), "default": _in_fresh_process("bits", None)}
        record.write(values)
        for mode, found in values["bits"].items():
            print(f"{mode}: {found['differing']} of {found['products']} products depend on the number of rows")
    if "cost" in args.parts:
        pairs: list[tuple[dict[str, Any], dict[str, Any]]] = []
        for number in range(args.pairs):
            first, second = (strict, None) if number % 2 == 0 else (None, strict)
            found = {mode: _in_fresh_process("steps", mode) for mode in (first, second)}
            pairs.append((found[strict], found[None]))
            values["cost"] = {"data": file_facts(args.train), **_compare(pairs)}
            record.write(values)
            print(f"pair {number + 1}: wall {_ratio(pairs[-1], 'wall'):.3f}, cpu {_ratio(pairs[-1], 'cpu'):.3f}")


def _in_fresh_process(worker: str, mode: str | None) -> dict[str, Any]:
    """Run this script as a worker with MKL's mode set before torch is loaded (None: not set at all)."""
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    if mode is not None:
        environment[VARIABLE] = mode
    words = [sys.executable, __file__, "--worker", worker, *sys.argv[1:]]
    done = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _compare(pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, Any]:
    wall = median_and_spread([_ratio(pair, "wall") for pair in pairs])
    return {
        "wall_ratio": wall,
        "cpu_ratio": median_and_spread([_ratio(pair, "cpu") for pair in pairs]),
        "strict_step_seconds": median_and_spread([statistics.median(strict["wall"]) for strict, _ in pairs]),
        "default_step_seconds": median_and_spread([statistics.median(default["wall"]) for _, default in pairs]),
        "strict_losses_repeat": len({tuple(strict["losses"]) for strict, _ in pairs}) == 1,
        "default_losses_repeat": len({tuple(default["losses"]) for _, default in pairs}) == 1,
        "mark": {"wall_ratio_at_most": MARK_RATIO, "reached": wall["median"] <= MARK_RATIO},
        "pairs": [{"strict": strict, "default": default} for strict, default in pairs],
    }


def _ratio(pair: tuple[dict[str, Any], dict[str, Any]], clock: str) -> float:
    strict, default = pair
    return statistics.median(strict[clock]) / statistics.median(default[clock])


# --------------------------------------------------------------------------------------------------------- the workers


def _import_onebase() -> Any:
    """Import torch, then onebase: so that MKL's mode is what the environment says, and nothing else."""
    import torch

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import onebase.api
    assert torch.get_num_threads() > 0
    return onebase.api


def _steps(args: argparse.Namespace) -> dict[str, Any]:
    """Return wall and processor seconds of each step, after the first ones."""
    ob = _import_onebase()
    from onebase.train.progress import Quiet

    class Clock(Quiet):
        """Progress that reads both clocks after every step."""

        def __init__(self) -> None:
            self.marks: list[tuple[float, float]] = []
            self.losses: list[float] = []

        def stepped(self, record: Any) -> None:
            self.marks.append((time.perf_counter(), time.process_time()))
            self.losses.append(record.loss)

    clock = Clock()
    bank = ob.Bank(ob.load(args.model, dtype="float32", device="cpu"))
    bank.add("one", ob.Lora(r=16, lora_alpha=32))
    job = ob.Job(data=args.train, steps=args.warmup + args.steps, learning_rate=2e-4, batch_size=args.batch_size)
    ob.train(bank, {"one": job}, progress=clock)
    spans = list(zip(clock.marks, clock.marks[1:], strict=False))[args.warmup - 1 :]
    return {
        "wall": [round(after[0] - before[0], 4) for before, after in spans],
        "cpu": [round(after[1] - before[1], 4) for before, after in spans],
        "losses": clock.losses,
    }


def _bits(args: argparse.Namespace) -> dict[str, Any]:
    """Return how many products give a row other bits as the number of rows changes, by kind, and which."""
    ob = _import_onebase()
    import torch

    base = ob.load(args.model, dtype="float32", device="cpu")
    model, examples = base.model, _examples_alone_and_together(ob, base, args)
    draws = torch.Generator().manual_seed(0)
    differing: dict[str, list[int]] = {}
    products = 0
    with torch.no_grad():
        for name, weight in _weights(model, draws):
            # A product as a layer computes it: x W^T. A transposed weight is the product of the input's gradient.
            x = torch.randn(max(_ROWS), weight.shape[1], generator=draws)
            whole = x @ weight.T
            for rows in _ROWS:
                products += 1
                first, last = x[:rows] @ weight.T, x[-rows:] @ weight.T
                if not (torch.equal(first, whole[:rows]) and torch.equal(last, whole[-rows:])):
                    differing.setdefault(name, []).append(rows)
    found = {"products": products, "differing": sum(map(len, differing.values())), "where": differing}
    return {**found, "examples_alone_and_together": examples}


def _examples_alone_and_together(ob: Any, base: Any, args: argparse.Namespace) -> dict[str, int]:
    """Return for how many examples the last hidden states of an adapted forward change with the neighbours."""
    import torch

    from onebase.config.methods import Lora
    from onebase.data.batches import flatten
    from onebase.train.data import load_rows

    job = ob.Job(data=args.train)
    examples = load_rows(args.train, job.reading, job.task, base).examples
    chosen = [examples[n] for n in range(args.batch_size)]
    bank = ob.Bank(base)
    bank.add("one", Lora(init_lora_weights=False), seed=1)  # both matrices random: it changes the base

    def hidden(numbers: list[int]) -> list[Any]:
        batch = flatten([chosen[n] for n in numbers], numbers, "one")
        with torch.no_grad():
            rows = base.hidden(batch.token_ids, bank.routed.route(batch.layout))
        return list(rows.split([len(chosen[n].token_ids) for n in numbers]))

    together = hidden(list(range(len(chosen))))
    alone = [hidden([n])[0] for n in range(len(chosen))]
    return {
        "examples": len(chosen),
        "differing": sum(not torch.equal(a, b) for a, b in zip(together, alone, strict=True)),
    }


def _weights(model: Any, draws: Any) -> Iterator[tuple[str, Any]]:
    """Yield a weight of every shape there is among the model's linear layers, LoRA's pairs on them and the head."""
    import torch

    seen = set()
    for path, module in model.named_modules():
        if not isinstance(module, torch.nn.Linear) or tuple(module.weight.shape) in seen:
            continue
        outputs, inputs = module.weight.shape
        seen.add((outputs, inputs))
        name = f"{path.rpartition('.')[2]} {outputs}x{inputs}"
        yield f"{name} forward", module.weight
        yield f"{name} gradient", module.weight.T
        if module is not model.get_output_embeddings():
            A, B = torch.randn(16, inputs, generator=draws), torch.randn(outputs, 16, generator=draws)
            yield f"{name} lora_A", A
            yield f"{name} lora_A gradient", A.T
            yield f"{name} lora_B", B
            yield f"{name} lora_B gradient", B.T


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add_data_options(parser)
    parser.add_argument("--parts", nargs="+", choices=["bits", "cost"], default=["bits", "cost"])
    parser.add_argument("--branch", help="another value of MKL_CBWR than the machine's own, such as AVX2,STRICT")
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--steps", type=int, default=12, help="measured steps of each process")
    parser.add_argument("--warmup", type=int, default=2, help="steps before them, at least 1")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--worker", choices=["bits", "steps"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser


if __name__ == "__main__":
    main()
