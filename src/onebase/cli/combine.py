"""`onebase merge A B ...`: one adapter made of several, on the base that they share."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from onebase.cli import terminal
from onebase.cli.opening import BaseOptions, Opened, open_adapter
from onebase.errors import ConfigError, list_problems

if TYPE_CHECKING:
    from onebase.adapters.combining import Recipe
    from onebase.train.combining import Combination

_SCHEMA_VERSION = 1
_HOW = "cat"


@dataclass(frozen=True)
class CombineOptions:
    """How adapters are to be combined, as the command line says; None where it does not."""

    weights: str | None = None
    how: str | None = None
    density: float | None = None
    svd_rank: int | None = None
    majority_sign_method: str | None = None
    seed: int | None = None

    @property
    def wanted(self) -> bool:
        """Whether even one adapter is to be combined, that is scaled, pruned or cut."""
        return self.weights is not None or self.how is not None

    @property
    def details(self) -> dict[str, object]:
        """What says more of how to combine, by the option's name, where it was given."""
        options = {
            "--density": self.density,
            "--svd-rank": self.svd_rank,
            "--majority-sign-method": self.majority_sign_method,
            "--seed": self.seed,
        }
        return {name: value for name, value in options.items() if value is not None}

    def recipe(self) -> "Recipe":
        """Return these options as what `combine` takes, unchecked."""
        from onebase.adapters.combining import Recipe

        how = (self.how or _HOW).lower()
        return Recipe(how, self.svd_rank, self.density, self.majority_sign_method or "total", self.seed or 0)


def combine(
    adapters: Sequence[str],
    out: Path,
    options: CombineOptions,
    on: BaseOptions,
    *,
    not_for_this: Mapping[str, object],
    as_json: bool,
) -> None:
    """Write one adapter made of several and say what was found.

    `not_for_this` are options of a plain model's, by name; one that was given is refused.
    """
    weights, recipe = _checked(len(adapters), options, not_for_this)
    from onebase.files.peft_format import find_adapter, read_adapter
    from onebase.train.combining import asked_otherwise, check_alike, combine_to
    from onebase.train.merging import check_out

    check_out(out)
    stored = [read_adapter(find_adapter(Path(adapter).expanduser())) for adapter in adapters]
    check_alike(stored, allow_base_mismatch=on.allow_base_mismatch)
    for text in (*(note for other in stored[1:] for note in other.notes), *asked_otherwise(stored)):
        terminal.say(text)
    opened = open_adapter(adapters[0], on)
    terminal.say(f"combining {terminal.counted(len(stored), 'adapter')}")
    found = combine_to(
        opened.bank,
        stored,
        weights,
        recipe,
        out,
        task=opened.task,
        allow_base_mismatch=on.allow_base_mismatch,
    )
    sources = list(zip(adapters, weights, strict=True))
    if as_json:
        terminal.print_json(_as_json(opened, sources, recipe, found))
    else:
        terminal.stdout().print(terminal.facts(_facts(opened, sources, recipe, found)))


def _checked(count: int, options: CombineOptions, not_for_this: Mapping[str, object]) -> tuple[list[float], "Recipe"]:
    """Return weights and recipe.

    Raises:
        ConfigError: every option that is wrong, or has no use here.
    """
    from onebase.adapters.combining import WAYS, weight_problems

    recipe = options.recipe()
    problems = [
        f"{name}: is for a plain model, and this makes an adapter. Remove it."
        for name, value in not_for_this.items()
        if value is not None
    ]
    weights, wrong = _weights(count, options.weights)
    wrong = wrong or weight_problems(count, weights)
    problems += [_as_option(text) for text in (*wrong, *recipe.problems())]
    if options.majority_sign_method == "total" and recipe.how in WAYS and "ties" not in recipe.how:
        problems.append(f"--majority-sign-method: {recipe.how} elects no sign. Remove it, or take ties.")
    if options.seed is not None and recipe.how in WAYS and not recipe.draws:
        problems.append(f"--seed: {recipe.how} draws nothing. Remove it, or take dare_linear or dare_ties.")
    if problems:
        raise ConfigError(list_problems("the options of merge", problems))
    return weights, recipe


def _weights(count: int, given: str | None) -> tuple[list[float], list[str]]:
    """Return the weights that were written, or what is wrong with them; one adapter's is 1 where there is none."""
    if given is None and count == 1:
        return [1.0], []
    example = f"For example --weights {','.join([f'{1 / count:.2g}'] * count)}"
    numbers = "1 number" if count == 1 else f"{count} numbers with commas between, one for each adapter"
    if given is None:
        return [], [f"weights: is missing; it takes {numbers}. {example}"]
    try:
        weights = [float(word) for word in given.split(",")]
    except ValueError:
        return [], [f"weights: must be {numbers}, got {given!r}. {example}"]
    wrong = [] if len(weights) == count else [f"weights: must be {numbers}, got {len(weights)}. {example}"]
    return weights, wrong


def _as_option(problem: str) -> str:
    """Return a problem with the name of its setting as the command line has it."""
    name, _, text = problem.partition(":")
    return f"--{name.replace('_', '-')}:{text}"


def _as_json(
    opened: Opened, sources: Sequence[tuple[str, float]], recipe: "Recipe", found: "Combination"
) -> dict[str, Any]:
    distance = found.distance
    return {
        "schema_version": _SCHEMA_VERSION,
        "adapters": [{"adapter": name, "weight": weight} for name, weight in sources],
        **recipe.said,
        "model": opened.bank.base.name,
        "base_fingerprint": opened.bank.base.fingerprint,
        "combined": str(found.folder),
        "size_bytes": found.size_bytes,
        "pairs": found.pairs,
        "smallest_rank": found.ranks[0],
        "largest_rank": found.ranks[1],
        "update_difference": found.update_difference,
        "distance": None if distance is None else distance.whole,
        "worst_layer": None if distance is None else distance.worst_layer,
        "worst_layer_distance": None if distance is None else distance.worst,
        "seconds": found.seconds,
    }


def _facts(
    opened: Opened, sources: Sequence[tuple[str, float]], recipe: "Recipe", found: "Combination"
) -> list[tuple[str, str]]:
    least, most = found.ranks
    ranks = f"rank {most}" if least == most else f"ranks {least} to {most}"
    summed = " + ".join(f"{weight:g} x {name}" for name, weight in sources).replace("+ -", "- ")
    said = ", ".join(f"{name} {value}" for name, value in recipe.said.items() if name != "how")
    distance = found.distance
    against = "the weighted sum" if distance is None else "what was computed"
    facts = [
        ("combined", f"{found.folder}: {terminal.size(found.size_bytes)}, LoRA of {ranks}"),
        ("from", f"{summed} on {opened.base_line}, {terminal.counted(found.pairs, 'pair')}"),
        ("how", f"{recipe.how}, {said}" if said else recipe.how),
        (
            "verified",
            f"read again: updates differ from {against} by at most {found.update_difference:.1e} of their size",
        ),
    ]
    if distance is not None:
        worst = f"most in {distance.worst_layer}: {terminal.percent(distance.worst)}"
        facts.append(("distance", f"{terminal.percent(distance.whole)} from the plain weighted sum, {worst}"))
    return [*facts, ("combining", terminal.duration(found.seconds)), ("next", f"onebase eval {found.folder}")]
