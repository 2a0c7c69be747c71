"""Writes docs/coverage.md: what works, method by method, layer kind by layer kind, on every model family.

    python -m docs.make_coverage

No cell is written by hand. Each is tried on the tiny random models of the tests: two adapters are built and moved from
where they start, a mixed batch of both and of the bare base runs forward and backward, gradients must reach every
tensor, and every entry and gradient must equal the same adapter alone. What refuses with an error of ours gives its
reason; anything else that goes wrong ends this script. tests/test_coverage.py holds the page against the code.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests import families, tiny

from onebase.adapters.bank import Bank
from onebase.adapters.part import Part
from onebase.adapters.places import NORM
from onebase.config.targeting import Targeted
from onebase.errors import ConfigError, TargetError

PAGE = Path(__file__).with_name("coverage.md")
DEFAULT = "default targets"
OWNERS: dict[int, str | None] = {0: "one", 1: None, 2: "two", 3: "one"}
YES, ALONE = "yes", "alone"
NAMES = {"linear": "linear", "transposed-linear": "GPT-2's Conv1D", "conv1d": "Conv1d", "conv2d": "Conv2d"}


@dataclass(frozen=True)
class Outcome:
    """What came of one cell on one model: it works, works but shares no batch, or why not."""

    word: str
    why: str = ""


def columns_of(bank: Bank) -> dict[str, dict[str, Any]]:
    """Return the settings that put an adapter on one layer of each kind that the model has, by the kind's name."""
    places = bank.places
    found: dict[str, dict[str, Any]] = {DEFAULT: {}}
    for candidate in places.owners:
        module = places.module(candidate.path)
        kind = candidate.kind
        label = NAMES.get(kind, kind)
        if candidate.path == places.head_path:
            tied = places.embedding_path is not None and module.weight is places.module(places.embedding_path).weight
            label = "tied head" if tied else "head"
        elif kind == "embedding":
            label = "token embedding" if places.reads_tokens(candidate.path) else "other embedding"
            if label in found and candidate.path != places.embedding_path:  # T5 calls copies of what it names
                found[label] = {"target_modules": [candidate.path]}
        elif getattr(module, "groups", 1) > 1:
            label = "grouped convolution"
        elif kind not in (*NAMES, NORM, "experts"):
            label = "bare parameters"
        found.setdefault(label, {"target_modules": [candidate.path]})
    if "experts" in found:
        [path] = found["experts"]["target_modules"]
        name = next(name for name, p in places.module(path).named_parameters() if p.ndim == 3)
        found["experts"] |= {"target_parameters": [f"{path}.{name}"]}
    if places.embedding_path is not None:
        found["token rows"] = {"trainable_token_indices": [3, 5]}
    whole = next((c.path for c in reversed(places.owners) if c.kind in ("linear", NORM)), None)
    found["whole module"] = {"modules_to_save": [whole]}
    return found


def settings_of(kind: type[Any], settings: Mapping[str, Any], column: Mapping[str, Any]) -> Any:
    """Return a method's settings for one column; stacked experts are named as parameters where it knows them so.

    Raises:
        ConfigError: the method has no such setting.
    """
    if "target_parameters" in column:
        name = "target_parameters" if "target_parameters" in kind.model_fields else "target_modules"
        column = {name: column[name]} | ({"target_modules": "attention"} if name == "target_parameters" else {})
    if column and not issubclass(kind, Targeted):
        raise ConfigError("it stands before the sequence, on no layer")
    for name in column:
        if name not in kind.model_fields:
            raise ConfigError(f"it has no {name}")
    return kind(**{**settings, **column})


def tried(bank: Bank, kind: type[Any], settings: Mapping[str, Any], column: Mapping[str, Any]) -> Outcome:
    """Return what comes of a method's settings on a model, see above."""
    try:
        chosen = settings_of(kind, settings, column)
        for seed, name in enumerate(("one", "two")):
            adapter = bank.add(name, chosen, seed=seed)
            families.perturb_(tiny.as_dtype_(adapter, bank.base.dtype), seed)
            check_place(bank, adapter.parts, column)
        try:
            mixed, gradients = results(bank, OWNERS)
            word = YES
        except ConfigError as error:
            mixed, gradients, word, why = {}, {}, ALONE, str(error)
        for name in ("one", "two"):
            check(bank, name, mixed, gradients)
        return Outcome(word, "" if word == YES else short(why, bank))
    except (ConfigError, TargetError) as error:
        return Outcome("no", short(str(error), bank))
    finally:
        for name in bank.adapters:
            bank.remove(name)


def check_place(bank: Bank, parts: Sequence[Part], column: Mapping[str, Any]) -> None:
    """See that an adapter has a part where the column's settings put one: no setting is silently left out."""
    paths = [*column.get("target_modules", ()), *column.get("modules_to_save", ())]
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


def short(text: str, bank: Bank) -> str:
    """Return an error's reasons without the model's name, its paths and what to do about it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reasons = []
    for line in lines[1:] if re.match(r"\d+ problems? in", lines[0]) else lines[:1]:
        line = re.sub(r"^adapter\.|^target_modules: ", "", line.replace(f"{bank.base.name}: ", ""))
        line = re.split(r", got |(?<!\d)\. |; |: it has", line.removeprefix("target_modules: "))[0]
        line = re.sub(r"^'.*' matches none of \d+ (.*)", r"it goes on \1", line)
        line = re.sub(r"^.* goes on (.*?)( in this version)?$", r"it goes on \1", line)
        line = re.sub(r"tiny-[\w-]+( \(\w+\))?", "the model", line)
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
        columns = list(dict.fromkeys(column for row in table.values() for column in row))
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
two of them and of the bare base runs forward and backward, and every row and gradient is held against the same
adapter alone.

- **yes**: it works, also in one batch with any other adapter.
- **alone**: it works, but shares no batch: the route names one adapter.
- **-**: refused, with an error that says why; the number is the reason, below.
- empty: no model of the family has such a layer.

*Default targets* are what the method chooses where `target_modules` is not given. A *head* is the output head;
*other embedding* is one of positions or types; *token rows* are `trainable_token_indices`; *whole module* is
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
