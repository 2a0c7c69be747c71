"""Writes docs/coverage.md: what works, method by method, layer kind by layer kind, on every model family.

    python -m docs.make_coverage

No cell is written by hand: each is tried on the tiny random models of the tests (coverage_cell.py says how), on all of a
model's layers of that kind at once and, where that is not simply "yes", on those of each name. What refuses with an
error of ours gives its reason; anything else that goes wrong ends this script, which takes two to three minutes.
tests/test_coverage.py holds the page against the code.
"""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from docs.coverage_cell import NO, PART, YES, Bench, Column, Outcome, name_of, tried
from docs.notes import Notes
from tests import families

from onebase.adapters.bank import Bank
from onebase.adapters.matching import LINEAR_KINDS, Candidate, lies_in
from onebase.adapters.places import NORM

PAGE = Path(__file__).with_name("coverage.md")
DEFAULT = "default targets"
NAMES = {
    "linear": "linear",
    "transposed-linear": "GPT-2's Conv1D",
    "conv1d": "Conv1d",
    "conv2d": "Conv2d",
    "experts": "experts",
    NORM: "norm",
}
ORDER = (
    DEFAULT,
    *list(NAMES.values())[:4],
    "grouped convolution",
    "token embedding",
    "other embedding",
    "head",
    "tied head",
)


Table = dict[str, dict[str, Outcome]]


def columns_of(bank: Bank) -> dict[str, list[Column]]:
    """Return, for each kind of layer that the model has, the settings that put an adapter on all of them; the first that do count."""
    places = bank.places
    kinds: dict[str, list[Candidate]] = {}
    for candidate in places.owners:
        kinds.setdefault(label_of(bank, candidate), []).append(candidate)
    found = {
        label: [Column({}, "target_modules", by_name(c.path for c in of_kind))] for label, of_kind in kinds.items()
    }
    if "experts" in found:
        stacked = [f"{c.path}.{name}" for c in kinds["experts"] for name in _stacked(places.module(c.path))]
        found["experts"].insert(0, Column({"target_modules": "attention"}, "target_parameters", by_name(stacked)))
    found[DEFAULT] = [Column({})]
    if places.embedding_path is not None:
        found["token rows"] = [Column({"trainable_token_indices": families.token_ids(bank)})]
    ends = [next(c.path for c in places.owners if c.kind in which) for which in (LINEAR_KINDS, {NORM})]
    found["whole module"] = [_beside(places.owners, end) for end in ends]
    return {label: found[label] for label in (*(label for label in ORDER if label in found), *found)}


def _beside(owners: Sequence[Candidate], target: str) -> Column:
    """Return the settings that train every module whole that stands in no other, beside an adapter on one of them."""
    paths = [c.path for c in owners if c.path != target and not lies_in(target, c.path)]
    paths = [path for path in paths if not any(path != outer and lies_in(path, outer) for outer in paths)]
    return Column({"target_modules": [target]}, "modules_to_save", by_name(paths))


def by_name(paths: Iterable[str]) -> dict[str, list[str]]:
    """Return paths by what they are called in every layer."""
    found: dict[str, list[str]] = {}
    for path in paths:
        found.setdefault(name_of(path), []).append(path)
    return found


def _stacked(module: Any) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.ndim == 3]


def label_of(bank: Bank, candidate: Candidate) -> str:
    """Return what a layer's column is called."""
    places, module = bank.places, bank.places.module(candidate.path)
    if candidate.path == places.head_path:
        tied = places.embedding_path is not None and module.weight is places.module(places.embedding_path).weight
        return "tied head" if tied else "head"
    if candidate.role == "embedding":
        return "token embedding" if places.reads_tokens(candidate.path) else "other embedding"
    if getattr(module, "groups", 1) > 1:
        return "grouped convolution"
    return NAMES.get(candidate.kind, "bare parameters")


def outcomes(name: str, variants: Mapping[str, tuple[type[Any], dict[str, Any]]]) -> Table:
    """Return variant -> column -> what comes of it on a model."""
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(name, Path(scratch) / "adapter")
        return {
            label: {
                column: _one(bench, label, column, variant, named) for column, named in columns_of(bench.bank).items()
            }
            for label, variant in variants.items()
        }


def _one(bench: Bench, label: str, column: str, variant: tuple[type[Any], Any], named: Sequence[Column]) -> Outcome:
    try:
        return tried(bench, *variant, named)
    except Exception as error:
        raise RuntimeError(f"{label} on {column} of {bench.name}: {error}") from error


def cell(found: Mapping[str, Outcome], notes: Notes) -> str:
    """Return what a cell says of the models of a family: one word where they agree, the exceptions where not."""
    if not found:
        return ""
    words = [outcome.word for outcome in found.values()]
    usual = max(dict.fromkeys(words), key=words.count)
    parts = [_said(usual, {o.why for o in found.values() if o.word == usual}, notes)]
    for name, outcome in found.items():
        if outcome.word != usual:
            parts.append(f"{name}: {_said(outcome.word, {outcome.why}, notes)}")
    return "; ".join(parts)


def _said(word: str, reasons: set[str], notes: Notes) -> str:
    marks = "".join(sorted({notes.mark(why) for why in sorted(reasons) if why}))
    return f"{'-' if word == NO else word}{' ' + marks if marks else ''}"


def merging_of(rows: Mapping[str, Mapping[str, Outcome]]) -> dict[str, Outcome]:
    """Return whether what works of a method on each model merges into a plain one."""
    found = {}
    for name, row in rows.items():
        reasons = {outcome.merged for outcome in row.values()} - {""}
        why = " and ".join(sorted(reasons - {YES}))
        if reasons:
            found[name] = Outcome(NO if YES not in reasons else PART if why else YES, why)
    return found


def section(family: str, notes: Notes) -> str:
    """Return a heading and the table of a family."""
    names = families.FAMILIES[family]
    tables = {name: outcomes(name, families.variants()) for name in names}
    seen = dict.fromkeys(column for table in tables.values() for row in table.values() for column in row)
    columns = [label for label in (*ORDER, *seen) if seen.pop(label, 0) is None]
    lines = [["method", *columns, "merged"], ["---"] * (2 + len(columns))]
    for label in families.variants():
        rows = {name: table[label] for name, table in tables.items()}
        cells = [{name: row[column] for name, row in rows.items() if column in row} for column in columns]
        cells.append(merging_of(rows))
        lines.append([f"`{label}`", *(cell(found, notes) for found in cells)])
    written = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return f"## {family[0].upper()}{family[1:]}\n\nTried on {', '.join(names)}.\n\n{written}"


def page(tables: Iterable[str], notes: Notes) -> str:
    """Return the page: what it means, the tables, the reasons."""
    written = "\n\n".join(tables)
    reasons = "\n".join(f"- [{number}] {text}." for number, text in enumerate(notes.texts, 1))
    same: dict[str, list[str]] = {}
    for label, (row, _, _) in families.SAME.items():
        same.setdefault(row, []).append(f"`{label}`")
    no_rows = "\n".join(f"- as `{row}`: {', '.join(labels)}." for row, labels in same.items())
    return f"""# What works on what

Every cell was tried on tiny random models, by `python -m docs.make_coverage`: adapters are built on all layers of the
kind, a batch mixed of two of them and of the bare base runs forward and backward, and every row and gradient is held
against the same adapter alone; gradients must reach every part. The adapter is saved to a folder, read back and
compared; where its method can be merged, so is a plain model with the merged weights.

- **yes**: it works, also in one batch with any other adapter.
- **alone**: it works, but shares no batch: the route names one adapter.
- **part**: it works on some of the layers of this kind; the reason says what it is with the others.
- **-**: refused, with an error that says why; the number is the reason, below.
- empty: no model of the family has such a layer.

*Default targets* are what the method chooses where `target_modules` is not given. A *head* is the output head;
*other embedding* is one of positions or types; *bare parameters* are a module's own that is none of the other kinds;
*token rows* are `trainable_token_indices`; *whole module* is `modules_to_save`, of every module at once. *Merged* says
whether what works merges into a plain model: **part** where some of it does.

What changes first values, rates or scales alone has no row of its own, because it is the same in every cell:

{no_rows}

{written}

## Reasons

{reasons}
"""


def main() -> None:
    """Write the page."""
    notes = Notes()
    tables = [section(family, notes) for family in families.FAMILIES]
    PAGE.write_text(page(tables, notes), encoding="utf-8")


if __name__ == "__main__":
    main()
