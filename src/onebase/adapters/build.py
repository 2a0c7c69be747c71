"""From an adapter's settings to its parts: the one table of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from onebase.adapters import bias, bottleneck, copies, ia3, lora, prefix, prompt, tokens, tying
from onebase.adapters.matching import lies_in, matches
from onebase.adapters.part import Built, Part
from onebase.adapters.places import Places
from onebase.config.methods import (
    AdapterSettings,
    BitFit,
    Bottleneck,
    Full,
    Ia3,
    LnTuning,
    Lora,
    PrefixTuning,
    PromptTuning,
)
from onebase.errors import TargetError

BUILDERS: dict[type[Any], Callable[[Places, Any, int], Built]] = {
    Lora: lora.build,
    Ia3: ia3.build,
    BitFit: bias.build,
    Bottleneck: bottleneck.build,
    LnTuning: copies.build_norms,
    Full: copies.build_full,
    PromptTuning: prompt.build,
    PrefixTuning: prefix.build,
}
"""Settings class -> what makes its parts from (places, settings, seed)."""


def build(places: Places, settings: AdapterSettings, seed: int) -> Built:
    """Return a new adapter's parts, with their first values.

    Raises:
        TargetError: the settings name a module that is not there, or none, or one that the method does not go on.
        CapacityError: there is no memory for its tensors.
    """
    built = BUILDERS[type(settings)](places, settings, seed)
    parts, notes = list(built.parts), list(built.warnings)
    own = copies.lacking_heads(places, parts)
    heads = tuple(path for path in own if not any(matches(name, path) for name in settings.modules_to_save or ()))
    if saved := [*(settings.modules_to_save or ()), *heads]:
        tie = isinstance(settings, Lora) and settings.ensure_weight_tying
        copied, said = copies.beside(places, saved, [part.path for part in built.parts], tie=tie)
        parts, notes = [*parts, *copied], [*notes, *said]
    if isinstance(settings, Lora):
        parts, notes = _beside_lora(places, settings, built.target_paths, parts, notes)
    _check_names(parts)
    copies.draw_heads_(places, parts, seed)
    return replace(built, parts=places.in_model_order(parts), warnings=tuple(notes), heads=heads)


def _check_names(parts: Sequence[Part]) -> None:
    """Raise if two settings train two tensors of one name: a file could hold only one of them."""
    owners: dict[str, int] = {}
    named = [(name, id(tensor)) for part in parts for name, tensor in part.parameters()]
    twice = sorted({name for name, tensor in named if owners.setdefault(name, tensor) != tensor})
    if twice:
        raise TargetError(
            f"adapter: {', '.join(twice[:3])} would be trained twice, by two of the settings. Name the module in one of "
            "them only: target_modules, modules_to_save, target_parameters, trainable_token_indices or bias."
        )


def _beside_lora(
    places: Places, settings: Lora, targets: Sequence[str], parts: list[Part], notes: list[str]
) -> tuple[list[Part], list[str]]:
    """Return an adapter's parts and warnings with what LoRA's settings ask for beside its pairs."""
    if settings.ensure_weight_tying:
        if not places.tied_with_embedding:
            notes = [*notes, "ensure_weight_tying: this base ties no weights, so nothing is tied"]
        copied = [part for part in parts if isinstance(part, copies.CopyPart)]
        pairs = [part for part in parts if not isinstance(part, copies.CopyPart)]
        parts = [*tying.with_tied_pairs(places, pairs, settings.use_dora), *copied]
    else:
        notes = [*notes, *places.untied_by(targets)]
    if settings.trainable_token_indices:
        rows, said = tokens.beside(places, settings, [part.path for part in parts])
        parts, notes = [*parts, *rows], [*notes, *said]
    if settings.bias != "none":
        whole = [part.path for part in parts if isinstance(part, copies.CopyPart)]
        biases = bias.beside_lora(places, settings.bias, targets)
        parts += [part for part in biases if not any(lies_in(part.path, path) for path in whole)]  # the copy has those
    return parts, notes
