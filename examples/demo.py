"""What `make demo` runs: fine-tune a small chat model on dictionary definitions, and show what changed.

The run is `onebase train examples/define.yaml --out runs/demo --resume`: interrupted, it goes on where it stopped;
finished, nothing is trained and its table is printed again. Then three rows of the validation set are answered, by the
base alone and with the adapter.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from onebase.cli import terminal
from onebase.cli.failure import reported
from onebase.cli.train import train

CONFIG = Path(os.path.relpath(Path(__file__).with_name("define.yaml")))
ROWS = (0, 1, 2)
"""Which rows of the validation set are answered, from 0: the first three, one of each slice."""


def main(
    out: Annotated[Path, typer.Option(help="The run's folder.")] = Path("runs/demo"),
    config: Annotated[Path, typer.Option(help="The settings file.")] = CONFIG,
) -> None:
    """Fine-tune a small chat model on dictionary definitions, and show what changed."""
    train([config], out, resume=True)
    show_answers(config, out)
    show_next(config, out)


def show_answers(config: Path, out: Path, max_new_tokens: int = 48) -> None:
    """Print some questions of the validation set with the dictionary's answer, the base's and the adapter's."""
    from onebase.config.reading import read_settings
    from onebase.data.reading import read_rows
    from onebase.measure.generate import end_ids, generate
    from onebase.measure.prompts import Asking
    from onebase.train.opening import open_adapter

    valid = read_settings(config).data.valid
    assert isinstance(valid, tuple), "the demo's settings name a file"
    rows = [row for number, row in enumerate(read_rows(valid[0].path)) if number in ROWS]
    opened = open_adapter(out)
    bank, asking = opened.bank, Asking(opened.bank.base.tokenizer)
    prompts, ends = asking.of_rows(rows), end_ids(bank.base)

    def answers(name: str | None) -> list[str]:
        answered = generate(bank, name, prompts, max_new_tokens=max_new_tokens)
        return [asking.text_of(ids) + ("" if ids[-1] in ends else " ...") for ids in answered]

    console = terminal.stdout()
    for row, before, after in zip(rows, answers(None), answers(opened.adapter.name), strict=True):
        question, reference = (message["content"] for message in row.values["messages"])
        console.print(f"\n{question}", style="bold", soft_wrap=True)
        lines = (("dictionary", reference), ("before", before), ("after", after))
        console.print(terminal.facts((f"  {name}", " ".join(text.split())) for name, text in lines))


def show_next(config: Path, out: Path) -> None:
    """Print commands to try next."""
    commands: Sequence[str] = (
        f"onebase chat {out}",
        f"onebase preview {config}",
        f"onebase train {config} --out {out.parent}/r4 --set adapter.r=4",
        f"onebase runs {out.parent}",
    )
    activate = Path(sys.executable).with_name("activate")
    console = terminal.stdout()
    console.print("\nnext:", style="bold")
    if shutil.which("onebase") is None and activate.exists():
        commands = (f"source {os.path.relpath(activate)}", *commands)
    for command in commands:
        console.print(f"  {command}", soft_wrap=True)


if __name__ == "__main__":
    typer.run(reported(main))
