"""Writes docs/coverage.md: what works, method by method, layer kind by layer kind, on every model family.

    python -m docs.make_coverage

No cell is written by hand. Each is tried on the tiny random models of the tests: two adapters are built and moved from
where they start, a mixed batch of both and of the bare base runs forward and backward, gradients must reach every
tensor, every entry and gradient must equal the same adapter alone, and what is read from its files must compute the
same. What refuses with an error of ours gives its reason; anything else that goes wrong ends this script.
tests/test_coverage.py holds the page against the code.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from tests import families, tiny

from onebase.adapters.bank import Bank
from onebase.adapters.matching import Candidate
from onebase.adapters.part import Part
from onebase.adapters.places import NORM
from onebase.config.targeting import Targeted
from onebase.errors import ConfigError, TargetError
from onebase.files.peft_format import read_adapter
from onebase.train import saving

PAGE = Path(__file__).with_name("coverage.md")
DEFAULT = "default targets"
OWNERS: dict[int, str | None] = {0: "one", 1: None, 2: "two", 3: "one"}
YES, ALONE = "yes", "alone"
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


@dataclass(frozen=True)
class Outcome:
    """What came of one cell on one model: it works, works but shares no batch, or why not."""

    word: str
    why: str = ""


def columns_of(bank: Bank) -> dict[str, list[dict[str, Any]]]:
    """Return, for each kind of layer that the model has, the settings that put an adapter on one; the first that do count."""
    places = bank.places
    found: dict[str, list[dict[str, Any]]] = {DEFAULT: [{}]}
    for candidate in sorted(places.owners, key=lambda c: c.kind.startswith("embedding") and -_size(bank, c.path)):
        if candidate.path in places.lenders:  # it is never called
            continue
        label = label_of(bank, candidate)
        found.setdefault(label, [{"target_modules": [candidate.path]}])
        if candidate.kind == "experts" and len(found[label]) == 1:
            name = next(name for name, p in places.module(candidate.path).named_parameters() if p.ndim == 3)
            parameter = {"target_modules": "attention", "target_parameters": [f"{candidate.path}.{name}"]}
            found[label].insert(0, parameter)
    if places.embedding_path is not None:
        found["token rows"] = [{"trainable_token_indices": [3, 5]}]
    ends = [[c.path for c in places.owners if c.kind == kind] for kind in ("linear", NORM)]
    found["whole module"] = [
        {"modules_to_save": [saved[-1]], "target_modules": [adapted[0]]} for saved in ends for adapted in ends
    ]
    return {label: found[label] for label in (*(label for label in ORDER if label in found), *found)}


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


def _size(bank: Bank, path: str) -> int:
    return sum(p.numel() for p in bank.places.module(path).parameters(recurse=False))


def tried(bank: Bank, kind: type[Any], settings: Mapping[str, Any], columns: Sequence[Mapping[str, Any]]) -> Outcome:
    """Return what comes of a method on one column: of the first settings that it takes; others may only be beyond it."""
    if any(columns) and not issubclass(kind, Targeted):
        return Outcome("no", "it stands before the sequence, on no layer")
    known = [column for column in columns if set(column) <= set(kind.model_fields)]
    if not known:
        return Outcome("no", f"it has no {next(name for name in columns[0] if name not in kind.model_fields)}")
    found = [tried_one(bank, kind, settings, column) for column in known]
    best = next((outcome for outcome in found if outcome.word != "no"), found[0])
    for other in found:
        beyond = re.search(r"^it goes on |is trained whole, so .* cannot be a target too$", other.why)
        assert other == best or (other.word == "no" and (beyond or best.word == "no")), f"{best}, but {other}"
    return best


def tried_one(bank: Bank, kind: type[Any], settings: Mapping[str, Any], column: Mapping[str, Any]) -> Outcome:
    """Return what comes of one adapter's settings on a model."""
    try:
        chosen = kind(**{**settings, **column})
        for seed, name in enumerate(("one", "two")):
            adapter = bank.add(name, chosen, seed=seed)
            families.perturb_(tiny.as_dtype_(adapter, bank.base.dtype), seed)
            check_place(bank, adapter.parts, column)
        word, why = YES, ""
        mixed: dict[int, Any] = {}
        gradients: dict[str, dict[str, Any]] = {}
        try:
            mixed, gradients = results(bank, OWNERS)
        except ConfigError as error:
            word, why = ALONE, short(str(error), bank)
        for name in ("one", "two"):
            check(bank, name, mixed, gradients)
        check_saved(bank)
        return Outcome(word, why)
    except (ConfigError, TargetError) as error:
        return Outcome("no", short(str(error), bank))
    finally:
        for name in bank.adapters:
            bank.remove(name)


def check_place(bank: Bank, parts: Sequence[Part], column: Mapping[str, Any]) -> None:
    """See that an adapter has a part where the column's settings put one: no setting is silently left out."""
    modules = [name.rpartition(".")[0] for name in column.get("target_parameters", ())]
    paths = [*(modules or column.get("target_modules", ())), *column.get("modules_to_save", ())]
    if "trainable_token_indices" in column:
        paths.append(bank.places.embedding_path)
    for path in paths:
        assert any(f"{part.path}.".startswith(f"{path}.") for part in parts), f"nothing was put on {path}"


def results(bank: Bank, owners: Mapping[int, str | None]) -> tuple[dict[int, Any], dict[str, dict[str, Any]]]:
    """Return every entry's numbers, and the gradients of every adapter."""
    tiny.clear_gradients(bank)
    numbers, loss = families.run(bank, owners)
    if not loss.requires_grad:
        raise TargetError("the model never calls it, so that training finds no gradient and stops")
    families.backward(loss)
    return numbers, {name: tiny.gradients(bank, name) for name in bank.adapters}


def check(bank: Bank, name: str, mixed: Mapping[int, Any], gradients: Mapping[str, Mapping[str, Any]]) -> None:
    """Hold an adapter alone against its part of the mixed batch, and see that gradients reach it."""
    alone, own = results(bank, {i: owner for i, owner in OWNERS.items() if owner == name})
    learned = {key for key, gradient in own[name].items() if gradient.abs().max() > 0}
    assert learned, f"no gradient reaches {name}"
    assert all(gradient.isfinite().all() for gradient in own[name].values())
    for i in alone if mixed else ():
        families.check_same(f"entry {i}", mixed[i], alone[i], bank)
    for key in own[name] if mixed else ():
        families.check_same(key, gradients[name][key], own[name][key], bank)


def check_saved(bank: Bank) -> None:
    """See that an adapter that is read from the files it was written to computes the same."""
    with TemporaryDirectory() as folder:
        saving.write(Path(folder) / "adapter", bank.base, bank.adapters["one"], task="chat")
        stored = read_adapter(Path(folder))
    again = bank.add("again", stored.settings, tensors=stored.tensors)
    tiny.as_dtype_(again, bank.base.dtype).load_state_(stored.tensors)  # in as many digits
    own, read = (families.run(bank, {0: name})[0][0] for name in ("one", "again"))
    families.check_same("the saved adapter", read, own, bank)


def short(text: str, bank: Bank) -> str:
    """Return an error's reasons without the model's name, its paths and what to do about it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reasons = []
    for line in lines[1:] if re.match(r"\d+ problems? in", lines[0]) else lines[:1]:
        line = line.replace(f"{bank.base.name}: ", "")
        line = re.sub(r"^(adapter\.)?(target_modules|method): |^\w+(\.\w+)+: ", "", line).removeprefix("adapter.")
        line = re.split(r", got |, not on |(?<!\d)\. |; |: it has", line)[0]
        line = re.sub(r"^'.*' matches none of \d+ (.*)", r"it goes on \1", line)
        line = re.sub(r"^[\w ]{2,20} goes on (.*?)( in this version)?$", r"it goes on \1", line)
        line = re.sub(r"tiny-[\w-]+( \(\w+\))?", "the model", line)
        line = re.sub(r"'?\b\w+(\.\w+)+\b'?", "the module", line)
        reasons.append(re.sub(rf"\ba {type(bank.base.model).__name__}\b", "it", line).rstrip(".:"))
    return " and ".join(dict.fromkeys(reasons))


def outcomes(names: tuple[str, ...]) -> dict[str, dict[str, dict[str, Outcome]]]:
    """Return variant -> column -> model -> outcome for the models of a family."""
    table: dict[str, dict[str, dict[str, Outcome]]] = {label: {} for label in families.variants()}
    for name in names:
        bank = families.bank_on(name)
        for column, named in columns_of(bank).items():
            for label, (kind, settings) in families.variants().items():
                try:
                    outcome = tried(bank, kind, settings, named)
                except Exception as error:
                    raise RuntimeError(f"{label} on {column} of {name}: {error}") from error
                table[label].setdefault(column, {})[name] = outcome
    return table


class Notes:
    """The reasons of a page, numbered as they come."""

    def __init__(self) -> None:
        self.texts: list[str] = []

    def mark(self, text: str) -> str:
        """Return the mark of a reason."""
        if text not in self.texts:
            self.texts.append(text)
        return f"[{self.texts.index(text) + 1}]"


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
    return f"{'-' if word == 'no' else word}{' ' + marks if marks else ''}"


def sections(notes: Notes) -> Iterator[str]:
    """Yield a heading and a table for each family."""
    for family, names in families.FAMILIES.items():
        table = outcomes(names)
        seen = dict.fromkeys(column for row in table.values() for column in row)
        columns = [label for label in (*ORDER, *seen) if seen.pop(label, 0) is None]
        lines = [["method", *columns], ["---"] * (1 + len(columns))]
        lines += [
            [f"`{label}`", *(cell(row.get(column, {}), notes) for column in columns)] for label, row in table.items()
        ]
        written = "\n".join("| " + " | ".join(line) + " |" for line in lines)
        yield f"## {family[0].upper()}{family[1:]}\n\nTried on {', '.join(names)}.\n\n{written}"


def page() -> str:
    """Return the page as the code says now."""
    notes = Notes()
    tables = "\n\n".join(sections(notes))
    reasons = "\n".join(f"- [{number}] {text}." for number, text in enumerate(notes.texts, 1))
    return f"""# What works on what

Every cell was tried on tiny random models, by `python -m docs.make_coverage`: adapters are built, a batch mixed of
two of them and of the bare base runs forward and backward, every row and gradient is held against the same adapter
alone, and the adapter that is read from its files against the one that was written.

- **yes**: it works, also in one batch with any other adapter.
- **alone**: it works, but shares no batch: the route names one adapter.
- **-**: refused, with an error that says why; the number is the reason, below.
- empty: no model of the family has such a layer.

*Default targets* are what the method chooses where `target_modules` is not given. A *head* is the output head;
*other embedding* is one of positions or types; *bare parameters* are a module's own that is none of the other kinds; *token rows* are `trainable_token_indices`; *whole module* is
`modules_to_save`.

{tables}

## Reasons

{reasons}
"""


def main() -> None:
    """Write the page."""
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
