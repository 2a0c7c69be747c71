"""Which modules a setting names: target_modules, exclude_modules, layers_to_transform and the patterns.

The meanings are PEFT's (peft.tuners.tuners_utils.check_target_module_exists, 0.21): a string is a regular expression
for the whole path, a list holds names or path ends, "all-linear" is every linear layer but the output head. The
presets "attention" and "mlp" are ours. Where PEFT is silent when one pattern of several matches nothing, this raises.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from onebase.config.targeting import PRESETS, in_preset
from onebase.errors import TargetError, list_problems

_V = TypeVar("_V")


@dataclass(frozen=True)
class Candidate:
    """A module that an adapter may be put on: where it is, what it is, and the part of a block that it belongs to."""

    path: str
    kind: str  # "linear", "transposed-linear", "experts", "embedding", ...
    role: str  # "attention", "mlp", "head", "router", "embedding", "other"

    def layer(self, layers_pattern: str | Sequence[str] | None = None) -> int | None:
        """Return the number of the block it lies in: after a list of blocks of that name, or after any."""
        names = (
            [r"[^.]+"]
            if not layers_pattern
            else [layers_pattern]
            if isinstance(layers_pattern, str)
            else layers_pattern
        )
        for name in names:
            found = re.search(rf"(?:^|\.){name}\.(\d+)\.", self.path)
            if found:
                return int(found.group(1))
        return None


@dataclass(frozen=True)
class Reach:
    """What a method goes on: kinds of modules, and how an error says it ("{method} goes on {noun}")."""

    method: str
    noun: str
    kinds: frozenset[str]

    def holds(self, candidate: Candidate) -> bool:
        """Return whether the method goes on this module."""
        return candidate.kind in self.kinds


LINEAR_KINDS = frozenset({"linear", "transposed-linear", "quantised-linear"})
"""What the presets are about."""
LINEAR = frozenset({"linear"})
ON_LINEAR = Reach("LoRA", "linear layers", LINEAR)


@dataclass(frozen=True)
class Match:
    """What settings came to: the paths, in model order, and what a user should be told."""

    paths: tuple[str, ...]
    warnings: tuple[str, ...]


def matches(pattern: str, path: str) -> bool:
    """Return whether a name or path end of a list names `path`."""
    return path == pattern or path.endswith("." + pattern)


def lies_in(path: str, parent: str) -> bool:
    """Return whether a module is another one, or a part of it."""
    return path == parent or path.startswith(parent + ".")


def for_path(patterns: Mapping[str, _V], path: str, otherwise: _V) -> _V:
    """Return the value of the first pattern that means `path`, or `otherwise`."""
    return next((value for pattern, value in patterns.items() if pattern_matches(pattern, path)), otherwise)


def pattern_matches(pattern: str, path: str) -> bool:
    """Return whether a key of rank_pattern or alpha_pattern means `path`.

    Source: peft.utils.other.get_pattern_key: each key is a regular expression for the path or its end.
    """
    return re.match(rf"(.*\.)?({pattern})$", path) is not None


def check_patterns(patterns: Mapping[str, Iterable[str]], paths: Sequence[str], model_name: str) -> None:
    """Raise unless every key of rank_pattern and alpha_pattern (`patterns`, by setting) means one of the targets.

    Raises:
        TargetError: all keys that mean none.
    """
    ends = sorted({path.rpartition(".")[2] for path in paths})
    problems = [
        f"adapter.{setting}: {key!r} matches none of the {len(paths)} targets; {_closest(key, ends)}. List them: "
        f"onebase targets {model_name}"
        for setting, keys in patterns.items()
        for key in keys
        if not any(pattern_matches(key, path) for path in paths)
    ]
    if problems:
        raise TargetError(list_problems("adapter", problems))


def choose_targets(
    candidates: Sequence[Candidate],
    target_modules: str | Sequence[str],
    *,
    exclude_modules: str | Sequence[str] | None = None,
    layers_to_transform: int | Sequence[int] | None = None,
    layers_pattern: str | Sequence[str] | None = None,
    model_name: str,
    reach: Reach = ON_LINEAR,
) -> Match:
    """Return the modules that the settings name.

    Raises:
        TargetError: a pattern, an exclusion or a layer that matches nothing, or a module beyond the method's reach.
    """
    problems: list[str] = []
    chosen = _named(candidates, target_modules, "adapter.target_modules", problems, model_name, reach)
    if exclude_modules is not None:
        out = set(_named(candidates, exclude_modules, "adapter.exclude_modules", problems, model_name, reach))
        chosen = [c for c in chosen if c not in out]
    warnings: list[str] = []
    if target_modules in PRESETS:
        linear = Reach(reach.method, "linear layers by a preset", reach.kinds & LINEAR_KINDS)
        if not any(linear.holds(c) for c in chosen):
            reach = linear
        elif left_out := _out_of_reach(chosen, linear):
            chosen = [c for c in chosen if linear.holds(c)]
            warnings.append(f"{target_modules} means linear layers and leaves out {', '.join(left_out)}")
    warnings += _partial(candidates, chosen)
    if layers_to_transform is not None:
        chosen = _in_layers(chosen, layers_to_transform, layers_pattern, problems)
    if wrong := _out_of_reach(chosen, reach):
        problems.append(
            f"adapter.target_modules: {reach.method} goes on {reach.noun} in this version, got {', '.join(wrong)}. "
            f"List them: onebase targets {model_name}"
            + (
                " Stacked experts go into adapter.target_parameters."
                if any(c.kind == "experts" for c in chosen)
                else ""
            )
        )
    if not problems and not chosen:
        problems.append(f"adapter.target_modules: nothing is left to adapt. List them: onebase targets {model_name}")
    if problems:
        raise TargetError(list_problems("adapter", problems))
    return Match(tuple(c.path for c in chosen), tuple(warnings))


def _named(
    candidates: Sequence[Candidate],
    names: str | Sequence[str],
    where: str,
    problems: list[str],
    model_name: str,
    reach: Reach,
) -> list[Candidate]:
    """Return the candidates that a setting names; every name that matches none becomes a problem."""
    if isinstance(names, str) and names in PRESETS:
        found = [c for c in candidates if in_preset(c.role, names)]
        if not found:
            problems.append(f"{where}: {names!r} matches none of the layers of {model_name}.")
        return found
    if isinstance(names, str):
        try:
            found = [c for c in candidates if re.fullmatch(names, c.path)]
        except re.error as error:
            problems.append(f"{where}: {names!r} is not a regular expression: {error}.")
            return []
        if not found:
            problems.append(
                f"{where}: the regular expression {names!r} matches none of {len(candidates)} layers; it must match "
                f"a whole path, such as {candidates[0].path!r}. Name parts in a list instead: [{names}]"
            )
        return found
    keep = []
    for name in names:
        hits = [c for c in candidates if matches(name, c.path)]
        if not hits:
            problems.append(f"{where}: {name!r} {_nothing(name, candidates, model_name, reach)}")
        keep += hits
    return [c for c in candidates if c in keep]


def _in_layers(
    chosen: Sequence[Candidate],
    numbers: int | Sequence[int],
    layers_pattern: str | Sequence[str] | None,
    problems: list[str],
) -> list[Candidate]:
    """Return those that lie in the layers of these numbers; numbers of layers without any become a problem."""
    wanted = {numbers} if isinstance(numbers, int) else set(numbers)
    layers = {c.path: c.layer(layers_pattern) for c in chosen}
    missing = sorted(wanted - {layer for layer in layers.values() if layer is not None})
    if missing and chosen:
        problems.append(
            f"adapter.layers_to_transform: no target lies in layer {', '.join(map(str, missing))}; the targets lie "
            f"in layers {_spread(layers.values())}."
        )
    return [c for c in chosen if layers[c.path] in wanted]


def _out_of_reach(chosen: Sequence[Candidate], reach: Reach) -> list[str]:
    """Return the names of those that the method does not go on, each with what it is."""
    return sorted({f"{c.path.rpartition('.')[2]} ({c.kind})" for c in chosen if not reach.holds(c)})


def _nothing(name: str, candidates: Sequence[Candidate], model_name: str, reach: Reach) -> str:
    """Return the sentence about a name that matches nothing."""
    if name in PRESETS:
        return f"is a preset, which stands alone and not in a list: {name}. Beside it, name modules in full."
    within = [c for c in candidates if reach.holds(c)]
    ends = sorted({c.path.rpartition(".")[2] for c in within} | set(PRESETS))
    hint = _closest(name, ends)
    return f"matches none of {len(within)} {reach.noun}; {hint}. List them: onebase targets {model_name}"


def _closest(name: str, ends: Sequence[str]) -> str:
    """Return which of the last names was perhaps meant, or all of them."""
    close = difflib.get_close_matches(name.rpartition(".")[2], ends, 1, 0.5)
    return f"closest is {close[0]!r}" if close else f"there are {', '.join(ends)}"


def _partial(candidates: Sequence[Candidate], chosen: Sequence[Candidate]) -> list[str]:
    """Return a warning for every module name that is chosen in some of the blocks only."""
    blocks = {layer for c in candidates if (layer := c.layer()) is not None}
    warnings = []
    by_end: dict[str, set[int]] = {}
    for candidate in chosen:
        if (layer := candidate.layer()) is not None:
            by_end.setdefault(candidate.path.rpartition(".")[2], set()).add(layer)
    for end, layers in by_end.items():
        if len(layers) < len(blocks):
            warnings.append(f"{end} is adapted in {len(layers)}/{len(blocks)} blocks")
    return warnings


def _spread(layers: Iterable[int | None]) -> str:
    numbers = sorted(layer for layer in layers if layer is not None)
    return f"{numbers[0]} to {numbers[-1]}" if numbers else "without a number"
