"""Where one training step's time goes, part by part, and how near its matrix products come to what the machine can do.

    python bench/profile_step.py --train define-train.jsonl

Steps of SmolLM2-135M (LoRA r 16 on all linear layers, batch 16) as `onebase train --profile` measures them
(docs/profile.md); the record holds what its profile.json does. FLOP are counted from the products' shapes, a multiply-add
being two; the share reached is what these products would take at the rate that the machine has alone, over the step.
About a minute.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path

from fresh_run import add_data_options, settings_of, train_command, write_settings
from record import Record, file_facts


def main() -> None:
    args = _parser().parse_args()
    record = Record(args.out, str(__doc__).partition("\n")[0], data=file_facts(args.train))
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        settings = settings_of(args, learning_rate=2e-4, micro_batch_tokens=args.micro_batch_tokens, steps=1000)
        subprocess.run(train_command(write_settings(run.with_suffix(".yaml"), settings), run, "--profile"), check=True)
        found = json.loads((Path(folder) / "run-profile" / "profile.json").read_text(encoding="utf-8"))
    found["model"] = Path(found["model"]).name
    record.write({"share_reached": found["floor_seconds"] / found["seconds"], **found})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    add_data_options(parser)
    parser.add_argument("--micro-batch-tokens", type=_tokens, default="auto")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".json"))
    return parser


def _tokens(word: str) -> int | str:
    return word if word == "auto" else int(word)


if __name__ == "__main__":
    main()
