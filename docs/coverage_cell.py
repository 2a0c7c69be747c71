"""One cell of docs/coverage.md: a method's settings put on a model, and what comes of it. make_coverage.py asks.

Two adapters are built and moved from where they start. A mixed batch of both and of the bare base runs forward and
backward; the first one's entries and gradients must equal those of it alone, and gradients must reach every part. It is
saved to a folder, read back and put on the base again: its entries must be the same. Where its method can be merged, the
plain model with the merged weights must give them too. What refuses with an error of ours gives its reason; anything
else is raised.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests import families, tiny

from onebase.adapters.bank import Bank
from onebase.adapters.merging import merged_state
from onebase.adapters.part import Part
from onebase.config.targeting import Targeted
from onebase.errors import ConfigError, TargetError
from onebase.files.peft_format import read_adapter
from onebase.train import saving
from onebase.train.opening import fitted

OWNERS: dict[int, str | None] = {0: "one", 1: None, 2: "two", 3: "one"}
YES, ALONE, PART, NO = "yes", "alone", "part", "no"
NOT_REACHED = "no gradient reaches it (the model does not call it, or no result reads it)"


@dataclass(frozen=True)
class Outcome:
    """What came of some settings on one model: the word, why it is not yes, and why it merges into no model.

    `merged` is YES, a reason, or "" where nothing was there to be merged.
    """

    word: str
    why: str = ""
    merged: str = ""


class Bench:
    """A bank to try settings on, a plain model of the same kind for merged weights, and a folder for files."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        self.bank, self.plain = families.bank_on(name), families.bank_on(name)


@dataclass(frozen=True)
class Column:
    """The settings of one column on one model: `fixed`, and under `key` the paths of the layers, by what they are called."""

    fixed: Mapping[str, Any]
    key: str = ""
    paths: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def keys(self) -> set[str]:
        """The settings that it sets."""
        return {*self.fixed, self.key} - {""}

    def on(self, names: Iterable[str]) -> dict[str, Any]:
        """Return the settings on the layers of these names."""
        return {**self.fixed, **({self.key: [path for name in names for path in self.paths[name]]} if self.key else {})}


def tried(bench: Bench, kind: type[Any], settings: Mapping[str, Any], columns: Sequence[Column]) -> Outcome:
    """Return what comes of a method on the first of some columns that it takes."""
    if any(column.keys for column in columns) and not issubclass(kind, Targeted):
        return Outcome(NO, "it stands before the sequence, on no layer")
    known = [column for column in columns if column.keys <= set(kind.model_fields)]
    if not known:
        return Outcome(NO, f"it has no {min(columns[0].keys - set(kind.model_fields))}")
    found: list[Outcome] = []
    for column in known:
        found.append(tried_column(bench, kind, settings, column))
        if found[-1].word != NO:
            return found[-1]
    return found[0]


def tried_column(bench: Bench, kind: type[Any], settings: Mapping[str, Any], column: Column) -> Outcome:
    """Return what comes of an adapter on all layers of a column; where some are to blame, of one on the others."""
    whole = tried_one(bench, kind, settings, column.on(column.paths))
    if whole.word in (YES, PART) or len(column.paths) < 2:
        return whole
    by_reason: dict[Outcome, list[str]] = {}
    for name in column.paths:
        by_reason.setdefault(tried_one(bench, kind, settings, column.on([name]), quick=True), []).append(name)
    if len(by_reason) == 1 and whole.word == ALONE:
        return whole
    found = {reason: tried_one(bench, kind, settings, column.on(names)) for reason, names in by_reason.items()}
    words = {outcome.word for outcome in found.values()}
    merged = " and ".join(sorted({outcome.merged for outcome in found.values()} - {"", YES}))
    merged = merged or (YES if any(outcome.merged for outcome in found.values()) else "")
    if len(words) == 1:
        return Outcome(words.pop(), " and ".join(dict.fromkeys(o.why for o in found.values() if o.why)), merged)
    said = [
        outcome.why
        if outcome.word == PART
        else f"{'alone on' if outcome.word == ALONE else 'not on'} {', '.join(by_reason[reason])}: {outcome.why}"
        for reason, outcome in found.items()
        if outcome.why
    ]
    return Outcome(PART, "; ".join(said), merged)


def tried_one(
    bench: Bench, kind: type[Any], settings: Mapping[str, Any], chosen: Mapping[str, Any], *, quick: bool = False
) -> Outcome:
    """Return what comes of one adapter's settings on a model; `quick`: only whether it is built and shares a batch."""
    bank = bench.bank
    try:
        for seed, name in enumerate(("one", "two")):
            adapter = bank.add(name, kind(**{**settings, **chosen}), seed=seed)
            families.perturb_(tiny.as_dtype_(adapter, bank.base.dtype), seed)
            check_place(bank, adapter.parts, chosen)
        word, why = YES, ""
        mixed: dict[int, Any] = {}
        gradients: dict[str, dict[str, Any]] = {}
        try:
            mixed, gradients = results(bank, OWNERS)
        except ConfigError as error:
            word, why = ALONE, short(str(error), bank)
        if quick:
            return Outcome(word, why)
        entries, rest = check(bank, "one", mixed, gradients)
        check_file(bench, entries)
        if rest:
            word, why = PART, f"not on {rest}: {NOT_REACHED}"
        return Outcome(word, why, merged(bench, entries))
    except (ConfigError, TargetError) as error:
        return Outcome(NO, short(str(error), bank))
    finally:
        for name in bank.adapters:
            bank.remove(name)


def check_place(bank: Bank, parts: Sequence[Part], chosen: Mapping[str, Any]) -> None:
    """See that an adapter has a part where the settings put one: no setting is silently left out."""
    modules = [name.rpartition(".")[0] for name in chosen.get("target_parameters", ())]
    paths = [*(modules or chosen.get("target_modules", ())), *chosen.get("modules_to_save", ())]
    if "trainable_token_indices" in chosen:
        paths.append(bank.places.embedding_path)
    for path in paths:
        assert any(f"{part.path}.".startswith(f"{path}.") for part in parts), f"nothing was put on {path}"


def results(bank: Bank, owners: Mapping[int, str | None]) -> tuple[dict[int, Any], dict[str, dict[str, Any]]]:
    """Return every entry's numbers, and the gradients of every adapter."""
    tiny.clear_gradients(bank)
    numbers, loss = families.run(bank, owners)
    if loss.requires_grad:
        families.backward(loss)
    return numbers, {name: tiny.gradients(bank, name) for name in bank.adapters}


def check(
    bank: Bank, name: str, mixed: Mapping[int, Any], gradients: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[int, Any], str]:
    """Hold an adapter alone against its part of the mixed batch; return its entries, and where no gradient comes.

    Raises:
        TargetError: no gradient reaches any of it.
    """
    alone, own = results(bank, {i: owner for i, owner in OWNERS.items() if owner == name})
    assert all(gradient.isfinite().all() for gradient in own[name].values())
    for i in alone if mixed else ():
        families.check_same(f"entry {i}", mixed[i], alone[i], bank)
    for key in own[name] if mixed else ():
        families.check_same(key, gradients[name][key], own[name][key], bank)
    adapter = bank.adapters[name]
    learned = {id(p) for _, p in adapter.parameters() if p.grad is not None and p.grad.abs().max() > 0}
    if not learned:
        raise TargetError(NOT_REACHED)
    rest = [part.path for part in adapter.parts if learned.isdisjoint(id(p) for _, p in part.parameters())]
    return alone, ", ".join(dict.fromkeys(name_of(path) for path in rest))


def name_of(path: str) -> str:
    """Return a path without the numbers of layers: what layers of one name have in common."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", path)


def check_file(bench: Bench, entries: Mapping[int, Any]) -> None:
    """See that an adapter is the same when it was saved and read again."""
    bank = bench.bank
    saving.write(bench.folder, bank.base, bank.adapters["one"], task="text")
    stored = fitted(bank, read_adapter(bench.folder), allow_base_mismatch=False)
    again = bank.add("again", stored.settings, tensors=stored.tensors)
    tiny.as_dtype_(again, bank.base.dtype).load_state_(stored.tensors)
    found = families.entries(bank, dict.fromkeys(entries, "again"))
    for i, entry in entries.items():
        families.check_same(f"entry {i} of the file", found[i], entry, bank)


def merged(bench: Bench, entries: Mapping[int, Any]) -> str:
    """Return YES where a plain model with the merged weights gives the adapter's entries, or why there is none."""
    try:
        state = merged_state(bench.bank, "one")
    except (ConfigError, TargetError) as error:
        return short(str(error), bench.bank)
    bench.plain.base.model.load_state_dict(state)
    found = families.entries(bench.plain, dict.fromkeys(entries))
    for i, entry in entries.items():
        families.check_same(f"entry {i} of the merged model", found[i], entry, bench.plain)
    return YES


def short(text: str, bank: Bank) -> str:
    """Return an error's reasons without the model's name, its paths and what to do about it."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reasons = []
    for line in lines[1:] if re.match(r"\d+ problems? in", lines[0]) else lines[:1]:
        if line.startswith(("Merge with the weights untied", "... and")):  # what to do, and how many more
            continue
        line = line.replace(f"{bank.base.name}: ", "")
        line = re.sub(r"^adapter 'one' \([\w-]+\) cannot be merged: ", "", line)
        line = re.sub(r"^\S+ and \S+ are one weight in the base, and would", "a tied weight would", line)
        line = (
            re.sub(r"^(adapter\.)?(target_modules|method): |^\w+(\.\w+)+: ", "", line)
            .removeprefix("adapter.")
            .removeprefix("adapter: ")
        )
        line = re.split(r", got |, not on |(?<!\d)\. |\. Set |; |: it has", line)[0]
        line = re.sub(r"^(prompt|prefix)-tuning (?=puts|gives)", "it ", line)
        line = re.sub(r"^'.*' matches none of \d+ (.*)", r"it goes on \1", line)
        line = re.sub(r"^[\w ]{2,20} goes on (.*?)( in this version)?$", r"it goes on \1", line)
        line = re.sub(r"tiny-[\w-]+( \(\w+\))?", "the model", line)
        line = re.sub(r"'?\b\w+(\.\w+)+\b'?", "the module", line)
        reasons.append(re.sub(rf"\ba {type(bank.base.model).__name__}\b", "it", line).rstrip(".:"))
    return " and ".join(dict.fromkeys(reasons))
