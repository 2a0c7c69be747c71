"""Writes docs/proof.md: what verify, merge, export and lint say of one adapter of every method, and of the benches' own.

    python -m docs.make_proof --work runs/proof [--runs RUN ...]

An adapter of every method is trained for a few steps on SmolLM2 (bench/methods.py lists them); BitFit, which it has no
biases for, on MiniLM. --runs are further run folders, for the page those that bench/tasks.py kept. Then each verb runs as a user runs it, in a
process of its own; nothing on the page is written by hand. What --work holds already is not done again. About a minute
and a half for an adapter on two cores.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
sys.path.insert(0, str(ROOT / "bench"))

from docs.notes import Notes  # noqa: E402
from methods import METHODS  # noqa: E402 (a folder of scripts)

PAGE = DOCS / "proof.md"
STEPS, ROWS = 8, 8
SHOWN = "lora"
_VERBS: dict[str, list[str]] = {
    "verify": ["verify", "RUN"],
    "merge": ["merge", "RUN", "--out", "OUT"],
    "portable": ["export", "RUN", "--portable", "--out", "OUT"],
    "gguf": ["export", "RUN", "--gguf", "--out", "OUT"],
    "lint": ["lint", "RUN"],
}
_DAMAGE = """
import sys
from onebase.adapters.lora import LoraPart
from onebase.cli.app import main
right, damaged = LoraPart.merge_, sys.argv.pop(1)
def wrong(part, module):
    right(part, module)
    if part.path == damaged:
        right(part, module)
LoraPart.merge_ = wrong
main()
"""


@dataclass(frozen=True)
class Said:
    """What a command said: its words, as a user types them, both outputs, and its exit code."""

    words: list[str]
    out: str
    err: str
    code: int

    @property
    def text(self) -> str:
        """What a reader is shown: the output, or the error without what was counted before it."""
        return "\n".join(line.rstrip() for line in self.out.strip().splitlines()) or self.error

    @property
    def error(self) -> str:
        """The error as one line."""
        found = re.search(r"^\w+Error: .*", self.err, re.DOTALL | re.MULTILINE)
        return " ".join((found.group() if found else self.err or "nothing").split())


def main() -> None:
    """Train what is missing, ask what was not asked yet, write the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where adapters and answers are kept")
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="further run folders")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    (args.work / "runs").mkdir(exist_ok=True)
    for name in METHODS:
        train(args.work, name)
    for run in args.runs:
        link = args.work / "runs" / run.name
        if not link.exists():
            link.symlink_to(run.resolve())
    names = [*METHODS, *(run.name for run in args.runs)]
    asked = {name: {verb: answer(args.work, name, verb) for verb in _VERBS} for name in names}
    PAGE.write_text(page(asked, damaged_merge(args.work)), encoding="utf-8")


def train(work: Path, name: str) -> None:
    """Train an adapter of a method, unless it is there."""
    if (work / "runs" / name / "result.json").exists():
        return
    classes = name == "bitfit"
    rows = ROOT / "examples" / "data" / ("category" if classes else "define")
    settings = {
        "model": "minilm-l6-v2" if classes else "smollm2-135m-instruct",
        "task": "classify" if classes else "chat",
        "data": {"train": f"{rows}-train.jsonl"},
        "adapter": METHODS[name],
        "train": {"steps": STEPS, "batch_size": ROWS, "seed": 0},
    }
    file = work / f"{name}.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")
    said = run_verb(work, ["train", file.name, "--out", f"runs/{name}"])
    if said.code:
        raise SystemExit(f"{name}: {said.err}")


def answer(work: Path, name: str, verb: str) -> Said:
    """Return what a verb said of a run, asked now if it was not."""
    places = {"RUN": f"runs/{name}", "OUT": f"runs/{name}.{verb}.out"}
    return _kept(work, f"{name}.{verb}", [places.get(word, word) for word in _VERBS[verb]])


def damaged_merge(work: Path) -> Said:
    """Return what a merge says in which one layer's scale was doubled on purpose."""
    words = ["merge", f"runs/{SHOWN}", "--out", "runs/damaged.out"]
    return _kept(work, "damaged", words, "-c", _DAMAGE, "model.layers.12.mlp.up_proj")


def _kept(work: Path, what: str, words: Sequence[str], *python: str) -> Said:
    kept = work / f"{what}.json"
    if not kept.exists():
        kept.write_text(json.dumps(asdict(run_verb(work, words, *python))), encoding="utf-8")
    return Said(**json.loads(kept.read_text(encoding="utf-8")))


def run_verb(work: Path, words: Sequence[str], *python: str) -> Said:
    """Run a command of onebase in a process of its own, for a terminal of 120 columns."""
    told = subprocess.run(
        [sys.executable, *(python or ("-m", "onebase")), *words],
        cwd=work,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "120"},
    )
    sys.stderr.write(f"onebase {' '.join(words[:2])}: exit code {told.returncode}\n")
    return Said(list(words), told.stdout, told.stderr, told.returncode)


def cells(name: str, said: dict[str, Said], reasons: Notes) -> list[str]:
    """Return what each verb said of an adapter in a word and a figure."""

    def of(verb: str, pattern: str) -> str:
        one = said[verb]
        if one.code == 2 or (one.code and not one.out):
            return f"refused {reasons.mark(one.error.replace(f'runs/{name}/', 'runs/NAME/'))}"
        found = re.search(pattern, one.out)
        return found.group(1) if found else "?"

    checks = re.findall(r"^(.+?) {2,}(ok|failed|not applicable)(?: |$)", said["verify"].out, re.MULTILINE)
    states = [state for _, state in checks]
    verified = f"{states.count('ok')} ok" + "".join(
        f", {count} {word}"
        for word, count in (("not applicable", states.count("not applicable")), ("FAILED", states.count("failed")))
        if count
    )
    tools = re.findall(r"^(\S+) {2,}(loads wrong|loads|refused)", said["lint"].out, re.MULTILINE)
    loads = [tool for tool, verdict in tools if verdict == "loads"]
    wrong = [tool for tool, verdict in tools if verdict == "loads wrong"]
    linted = ", ".join(loads) or "none"
    return [
        f"`{name}`",
        verified if checks else of("verify", "(^$)"),
        of("merge", r"largest difference\s+(\S+)"),
        of("portable", r"outputs\s+differ by at most (\S+)"),
        of("gguf", r"numbers\s+differ by at most ([^,\s]+)"),
        linted + (f"; wrong in {', '.join(wrong)}" if wrong else ""),
    ]


def page(asked: dict[str, dict[str, Said]], damaged: Said) -> str:
    """Return the page."""
    reasons = Notes()
    head = ["adapter", "verify", "merge", "export --portable", "export --gguf", "loads in (lint)"]
    lines = [head, ["---"] * len(head), *(cells(name, said, reasons) for name, said in asked.items())]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    listed = "\n".join(f"- [{number}] {text}" for number, text in enumerate(reasons.texts, 1))
    chosen = [SHOWN, *(name for name in asked if name not in METHODS and "-lora-0-" in name)]
    whole = "\n\n".join(_section(name, asked[name].values()) for name in chosen)
    return f"""# What was said

What `verify`, `merge`, `export` and `lint` say of an adapter of every method, trained for {STEPS} steps of {ROWS} rows of
`examples/data` on SmolLM2-135M-Instruct (BitFit on MiniLM, since SmolLM2 has no biases), and of the adapters that
`bench/tasks.py` trained (seed 0 at the learning rate that it chose). Made by
`python -m docs.make_proof --work runs/proof --runs RUN ...`.

The figures are the largest differences that were found: of merged and reloaded results as a share of the largest, of the
portable adapter's outputs likewise, of the numbers in the GGUF file. A check that is not applicable to an adapter says
why when it is run.

{table}

{listed}

## A damaged merge

With the scale of one layer doubled on purpose:

```text
{textwrap.fill(damaged.error, 118)}
```

{whole}
"""


def _section(name: str, said: Iterable[Said]) -> str:
    parts = [f"## All that was said of {name}"]
    parts += [f"```text\n$ onebase {' '.join(one.words)}\n{one.text}\n```" for one in said]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
