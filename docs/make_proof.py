"""Writes docs/proof.md: what verify, merge, export and lint say of one adapter of every method, and of the benches' own.

    python -m docs.make_proof --work runs/proof [--bench runs/tasks]

An adapter of every method is trained for a few steps on SmolLM2 (bench/methods.py lists them); BitFit, which it has no
biases for, on MiniLM. --bench are the run folders that bench/tasks.py kept. Then each verb runs as a user runs it, in a
process of its own; nothing on the page is written by hand. What --work holds already is not done again. About a minute
and a half for an adapter on two cores.
"""

import argparse
import json
import os
import re
import subprocess
import sys
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
right = LoraPart.merge_
def wrong(part, module):
    right(part, module)
    if part.path == sys.argv[1]:
        right(part, module)
LoraPart.merge_ = wrong
sys.argv[1:] = sys.argv[2:]
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
        return self.out.strip() or self.error

    @property
    def error(self) -> str:
        """The error as one line."""
        found = re.search(r"^\w+Error: .*", self.err, re.DOTALL | re.MULTILINE)
        return " ".join((found.group() if found else self.err).split())


def main() -> None:
    """Train what is missing, ask what was not asked yet, write the page."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--work", type=Path, required=True, help="where adapters and answers are kept")
    parser.add_argument("--bench", type=Path, help="the run folders that bench/tasks.py kept")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    runs = {name: trained(args.work, name) for name in METHODS}
    kept = sorted(path for path in (args.bench.iterdir() if args.bench else ()) if (path / "result.json").exists())
    runs |= {path.name: path for path in kept}
    asked = {name: {verb: answer(args.work, name, verb, run) for verb in _VERBS} for name, run in runs.items()}
    damaged = damaged_merge(args.work, runs[SHOWN])
    PAGE.write_text(page(asked, damaged), encoding="utf-8")


def trained(work: Path, name: str) -> Path:
    """Return the run folder of a method, trained now if it is not there."""
    out = work / name
    if (out / "result.json").exists():
        return out
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
    words = ["train", str(file), "--out", str(out)]
    said = run_verb(words)
    if said.code:
        raise SystemExit(f"{name}: {said.err}")
    return out


def answer(work: Path, name: str, verb: str, run: Path) -> Said:
    """Return what a verb said of a run, asked now if it was not."""
    kept = work / f"{name}.{verb}.json"
    if not kept.exists():
        out = work / f"{name}.{verb}.out"
        places = {"RUN": str(run), "OUT": str(out)}
        said = run_verb([places.get(word, word) for word in _VERBS[verb]])
        for place, shown in ((run, f"runs/{name}"), (out, "out"), (work, "runs")):
            said = Said(
                [word.replace(str(place), shown) for word in said.words],
                said.out.replace(str(place), shown),
                said.err.replace(str(place), shown),
                said.code,
            )
        kept.write_text(json.dumps(asdict(said)), encoding="utf-8")
    return Said(**json.loads(kept.read_text(encoding="utf-8")))


def damaged_merge(work: Path, run: Path) -> Said:
    """Return what a merge says in which one layer's scale was doubled on purpose."""
    kept = work / "damaged.json"
    if not kept.exists():
        layer = "model.layers.12.mlp.up_proj"
        said = run_verb(["merge", str(run), "--out", str(work / "damaged.out")], "-c", _DAMAGE, layer)
        kept.write_text(json.dumps(asdict(said)), encoding="utf-8")
    return Said(**json.loads(kept.read_text(encoding="utf-8")))


def run_verb(words: Sequence[str], *python: str) -> Said:
    """Run a command of onebase in a process of its own, for a terminal of 100 columns."""
    told = subprocess.run(
        [sys.executable, *(python or ("-m", "onebase")), *words],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "COLUMNS": "100"},
    )
    sys.stderr.write(f"onebase {' '.join(words[:2])}: exit code {told.returncode}\n")
    return Said(list(words), told.stdout, told.stderr, told.returncode)


def cells(name: str, said: dict[str, Said], reasons: Notes) -> list[str]:
    """Return what each verb said of an adapter in a word and a figure."""

    def of(verb: str, pattern: str) -> str:
        one = said[verb]
        if one.code == 2 or (one.code and not one.out):
            return f"refused {reasons.mark(one.error.replace(name, 'NAME'))}"
        found = re.search(pattern, one.out)
        return found.group(1) if found else "?"

    checks = re.findall(r"^(.+?) {2,}(ok|failed|-) ", said["verify"].out, re.MULTILINE)
    states = [state for _, state in checks]
    verified = f"{states.count('ok')} ok" + "".join(
        f", {count} {word}"
        for word, count in (("no meaning", states.count("-")), ("FAILED", states.count("failed")))
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
`bench/tasks.py` trained. Made by `python -m docs.make_proof --work runs/proof --bench runs/tasks`.

The figures are the largest differences that were found: of merged and reloaded results as a share of the largest, of the
portable adapter's outputs likewise, of the numbers in the GGUF file. A check that has no meaning for an adapter says
why when it is run.

{table}

{listed}

## A damaged merge

With the scale of one layer doubled on purpose:

```text
{damaged.error}
```

{whole}
"""


def _section(name: str, said: Iterable[Said]) -> str:
    parts = [f"## All that was said of {name}"]
    parts += [f"```text\n$ onebase {' '.join(one.words)}\n{one.text}\n```" for one in said]
    return "\n\n".join(parts)


if __name__ == "__main__":
    main()
