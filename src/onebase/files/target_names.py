"""Which modules an adapter file says it is on, in PEFT's words: the few plain names that say it exactly.

PEFT matches the names of all modules against four fields of adapter_config.json. `name_targets` finds the shortest
values of those fields that match the chosen modules and no other; `TargetNames.matches` is PEFT's rule, which is what
the fields mean. What a user may write in settings, and which modules that chooses, is the business of `adapters`.
"""

import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from onebase.adapters.matching import for_path, matches

Value = TypeVar("Value")
Names = tuple[str, ...] | str


@dataclass(frozen=True)
class TargetNames:
    """The fields of adapter_config.json that choose modules.

    A tuple holds names or endings of names, a string is a regular expression for whole names.
    """

    target_modules: Names
    exclude_modules: Names | None = None
    layers_to_transform: tuple[int, ...] | int | None = None
    layers_pattern: Names | None = None

    def matches(self, name: str) -> bool:
        """Return whether PEFT puts the adapter on the module of this name.

        Source: peft 0.21.2, tuners_utils.check_target_module_exists.
        """
        if self.exclude_modules and _chosen_by(self.exclude_modules, name):
            return False
        if not _chosen_by(self.target_modules, name):
            return False
        if isinstance(self.target_modules, str) or name in self.target_modules:
            return True
        if self.layers_to_transform is None or self.layers_to_transform == ():
            return True
        return self._layer_of(name) in _as_tuple(self.layers_to_transform)

    def _layer_of(self, name: str) -> int | None:
        """Return the first number of the name that stands where a layer's number may stand."""
        if self.layers_pattern:
            patterns = [rf"(?:^|.*?\.){pattern}\.(\d+)\." for pattern in _as_tuple(self.layers_pattern)]
        else:
            patterns = [r".*?\.[^.]*\.(\d+)\."]
        found = next((match for pattern in patterns if (match := re.match(pattern, name))), None)
        return int(found[1]) if found else None


def name_targets(chosen: Iterable[str], module_names: Iterable[str], wanted: TargetNames) -> TargetNames:
    """Return the shortest fields that match exactly the `chosen` among `module_names` (all modules of the model).

    Tried in this order: last names; last names with the layers and exclusions `wanted`; the shortest endings that only
    chosen modules have; one regular expression that lists the whole names.
    """
    everything = set(module_names)
    picked = set(chosen)
    assert picked <= everything, f"targets that are no modules: {sorted(picked - everything)}"
    last_names = tuple(sorted({name.rpartition(".")[2] for name in picked}))
    plain = TargetNames(last_names)
    pattern = None if wanted.layers_to_transform is None else wanted.layers_pattern  # PEFT refuses it alone
    filtered = replace(wanted, target_modules=last_names, layers_pattern=pattern)
    listed = TargetNames("|".join(re.escape(name) for name in sorted(picked)))
    endings = TargetNames(_endings(picked, everything))
    exact = (fields for fields in (plain, filtered, endings) if _is_exact(fields, picked, everything))
    return next(exact, listed)


def name_endings(chosen: Iterable[str], module_names: Iterable[str]) -> tuple[str, ...]:
    """Return the shortest names of modules by the bare ends of their paths, as PEFT reads modules_to_save.

    "norm" would mean "input_layernorm" too, so a name is only as short as it means the chosen modules alone.
    """
    everything, picked = set(module_names), set(chosen)
    last_names = tuple(sorted({name.rpartition(".")[2] for name in picked}))
    exact = {name for name in everything if name.endswith(last_names)} == picked if picked else True
    return last_names if exact else tuple(sorted(picked))


def name_feedforward(targets: TargetNames, paths: Iterable[str], feedforward: Collection[str]) -> Names:
    """Return IA3's feed-forward targets as PEFT finds them among `paths`: a part of the target names, or an expression."""
    names = targets.target_modules
    if not feedforward:
        return ()
    if not isinstance(names, str):
        part = tuple(name for name in names if any(path.endswith(name) for path in feedforward))
        if all(path.endswith(part) == (path in feedforward) for path in paths):
            return part
    return "|".join(re.escape(name) for name in sorted(feedforward))


def order_free_patterns(patterns: Mapping[str, Value], names: Iterable[str]) -> dict[str, Value]:
    """Return sorted patterns that mean the same on `names`: the first match counts, and PEFT sorts what it saves.

    Where sorting would change what a name gets, each name that some pattern matches gets a pattern of its own.
    """
    ordered = {key: patterns[key] for key in sorted(patterns)}
    first_keys = {key: key for key in patterns}
    given = {name: for_path(first_keys, name, "") for name in names}
    if all(for_path({key: key for key in ordered}, name, "") == key for name, key in given.items()):
        return ordered
    return {re.escape(name): patterns[given[name]] for name in sorted(given) if given[name]}


def _is_exact(fields: TargetNames, picked: set[str], everything: set[str]) -> bool:
    return all(fields.matches(name) == (name in picked) for name in everything)


def _chosen_by(names: Names, name: str) -> bool:
    if isinstance(names, str):
        return re.fullmatch(names, name) is not None
    return any(matches(one, name) for one in names)


def _endings(picked: Collection[str], everything: Collection[str]) -> tuple[str, ...]:
    """Return for each picked name its shortest ending, cut at dots, that no other module's name has."""
    in_all = Counter(ending for name in everything for ending in _cut(name))
    in_picked = Counter(ending for name in picked for ending in _cut(name))
    shortest = (next((end for end in _cut(name) if in_all[end] == in_picked[end]), name) for name in picked)
    return tuple(sorted(set(shortest)))


def _cut(name: str) -> list[str]:
    """Return the endings of a dotted name, shortest first."""
    parts = name.split(".")
    return [".".join(parts[start:]) for start in reversed(range(len(parts)))]


def _as_tuple(value: Sequence[Value] | Value) -> tuple[Value, ...]:
    return tuple(value) if isinstance(value, (tuple, list)) else (value,)  # type: ignore[return-value]
