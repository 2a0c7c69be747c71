"""Adapters on disk combined into a new one: each checked to belong to the one base, the result checked before it is there.

Where the way is exact the new adapter, read again, must add to every layer the weighted sum of what the others add; for
the others, which drop or mix on purpose, what was computed, and the distance to that sum is told. Called by `onebase merge`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onebase
from onebase.adapters.bank import Adapter, Bank
from onebase.adapters.combining import Recipe, combine
from onebase.adapters.ingredients import Ingredient, StoredPair, pairs_of
from onebase.data.building import read_template
from onebase.errors import ConfigError, list_problems
from onebase.files.atomic import write_synced
from onebase.files.model_card import CARD_NAME, CardFacts, model_card
from onebase.files.peft_format import StoredAdapter
from onebase.train import saving
from onebase.train.merging import check_out
from onebase.train.opening import fitted
from onebase.train.updates import Distance, Terms, check_updates, distance, is_nothing

_NAME = "combined"
_EXACT = "cat"


@dataclass(frozen=True)
class Combination:
    """What became of combining adapters."""

    folder: Path
    size_bytes: int
    pairs: int
    ranks: tuple[int, int]
    """The smallest and the largest rank of a layer."""
    update_difference: float
    """The largest relative difference of a layer's update, as read again."""
    distance: Distance | None
    """How far the updates are from the plain weighted sum; None where they are that."""
    seconds: float
    """Computing, writing and checking."""


def combine_to(
    bank: Bank,
    stored: Sequence[StoredAdapter],
    weights: Sequence[float],
    recipe: Recipe,
    out: Path,
    *,
    task: str = "chat",
    allow_base_mismatch: bool = False,
) -> Combination:
    """Write the adapter that `weights` and `recipe` make of others, all of this bank's base, and return what was found.

    Its rows are read as those of the first.

    Raises:
        ConfigError: `out` is there, or the adapters cannot be combined so.
        FileFormatError: one was trained on another base, unless `allow_base_mismatch`; or it lacks tensors.
        VerificationError: what was written is not the combination; nothing is left of it.
    """
    check_out(out)
    began = time.perf_counter()
    ingredients = ingredients_on(bank, stored, allow_base_mismatch=allow_base_mismatch)
    settings, tensors = combine(ingredients, weights, recipe)
    made = pairs_of(Ingredient(_NAME, settings, tensors), [])
    plain = _plain_sum(ingredients, weights)
    if is_nothing(made, plain):
        raise ConfigError(
            f"combining adapters: with weights {', '.join(f'{weight:g}' for weight in weights)} nothing is left of them "
            f"({recipe.how}), so the adapter would change nothing. Take other weights, or a larger density where there is one."
        )
    wanted = plain if recipe.how == _EXACT else {path: [(1.0, pair)] for path, pair in made.items()}
    sources = [(adapter_name(one.folder), weight) for one, weight in zip(stored, weights, strict=True)]
    added = bank.add(_NAME, settings, seed=recipe.seed, tensors=tensors)
    card = model_card(_facts(bank, added, out, task, sources, recipe))
    record = stored[0].record
    found = {}

    def verify(new: Path) -> None:
        """Complete the new folder and compare it with what was computed."""
        saving.save_tokenizer(bank.base, new, None)
        write_synced(new / CARD_NAME, card)
        found["updates"] = check_updates(new, wanted, "the combined adapter")

    combined = {**recipe.said, "from": [{"name": name, "weight": weight} for name, weight in sources]}
    try:
        saving.write(
            out,
            bank.base,
            added,
            task=task,
            revision=None if record is None else record.base_revision,
            extras={"data": None if record is None else record.extras.get("data"), "combined": combined},
            fill=verify,
        )
    finally:
        bank.remove(_NAME)
    return Combination(
        folder=out,
        size_bytes=sum(path.stat().st_size for path in out.iterdir()),
        pairs=len(made),
        ranks=(min(pair.r for pair in made.values()), max(pair.r for pair in made.values())),
        update_difference=found["updates"],
        distance=None if recipe.how == _EXACT else distance(made, plain),
        seconds=time.perf_counter() - began,
    )


def ingredients_on(
    bank: Bank, stored: Sequence[StoredAdapter], *, allow_base_mismatch: bool = False
) -> list[Ingredient]:
    """Return what `combine` takes, for adapters that were trained on the base of this bank.

    Raises:
        FileFormatError: one was trained on another base, unless `allow_base_mismatch`; or it lacks tensors.
    """
    fit = [fitted(bank, one, allow_base_mismatch=allow_base_mismatch) for one in stored]
    return [Ingredient(str(one.folder), one.settings, one.tensors) for one in fit]


def check_alike(stored: Sequence[StoredAdapter], *, allow_base_mismatch: bool = False) -> None:
    """Raise if adapters cannot be combined by what their files say alone, before a base is opened for them.

    Raises:
        ConfigError: other methods than LoRA, several tasks or several bases; all of it at once.
    """
    problems: list[str] = []
    for one in stored:
        pairs_of(Ingredient(str(one.folder), one.settings, one.tensors), problems)
    records = [(one.folder, one.record) for one in stored if one.record is not None]
    if len({record.task for _, record in records}) > 1:
        tasks = ", ".join(f"{folder} {record.task}" for folder, record in records)
        problems.append(f"they are for different tasks ({tasks}). Combine adapters of one task.")
    prints = {record.base_fingerprint for _, record in records if record.base_fingerprint is not None}
    if len(prints) > 1 and not allow_base_mismatch:
        bases = ", ".join(f"{folder} {record.base} {str(record.base_fingerprint)[:12]}" for folder, record in records)
        problems.append(
            f"they were trained on bases with different weights ({bases}). Combine adapters of one base, or pass "
            "--allow-base-mismatch if the difference is meant."
        )
    if problems:
        raise ConfigError(list_problems("combining adapters", problems, shown=10))


def asked_otherwise(stored: Sequence[StoredAdapter]) -> list[str]:
    """Return a sentence for each adapter that was trained to be asked in another way than the first, whose way is kept."""
    said = []
    first, *others = stored
    for other in others:
        if first.record is None or other.record is None:
            continue
        one, two = (_asking(each) for each in (first, other))
        names = ", ".join(sorted(name for name in {*one, *two} if one.get(name) != two.get(name)))
        if names:
            said.append(
                f"{other.folder}: was trained with another {names} than {first.folder}; the new adapter is asked as the first."
            )
    return said


def adapter_name(folder: Path) -> str:
    """Return what an adapter's folder is called: its own name, or that of the run around it."""
    path = folder.absolute()
    return path.parent.name if path.name == "adapter" else path.name


def _asking(stored: StoredAdapter) -> dict[str, object]:
    """Return how an adapter's rows were read, by the names of the settings, and its chat template."""
    data = {} if stored.record is None else stored.record.extras.get("data", {})
    template = stored.folder / "chat_template.jinja"
    told: dict[str, object] = {f"data.{name}": value for name, value in data.items()}
    return told | ({"data.template": read_template(template)} if template.is_file() else {})


def _plain_sum(ingredients: Sequence[Ingredient], weights: Sequence[float]) -> Mapping[str, Terms]:
    """Return, for each layer, the pairs of those that have it, with their weights."""
    terms: dict[str, list[tuple[float, StoredPair]]] = {}
    for one, weight in zip(ingredients, weights, strict=True):
        for path, pair in pairs_of(one, []).items():
            terms.setdefault(path, []).append((weight, pair))
    return terms


def _facts(
    bank: Bank, adapter: Adapter, out: Path, task: str, sources: Sequence[tuple[str, float]], recipe: Recipe
) -> CardFacts:
    base = bank.base
    return CardFacts(
        name=out.absolute().name,
        base=base.name,
        base_fingerprint=base.fingerprint,
        task=task,
        settings=recipe.said,
        labels=base.labels if base.own_heads else None,
        combined_from=sources,
        trainable_parameters=adapter.parameter_count,
        total_parameters=base.parameter_count + adapter.parameter_count,
        onebase_version=onebase.__version__,
    )
