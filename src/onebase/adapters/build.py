"""From an adapter's settings to its parts: the one table of methods."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from onebase.adapters import bias, copies, ia3, lora, prefix, prompt
from onebase.adapters.part import Built, Part
from onebase.adapters.places import Places
from onebase.config.methods import AdapterSettings, BitFit, Full, Ia3, LnTuning, Lora, PrefixTuning, PromptTuning

BUILDERS: dict[type[Any], Callable[[Places, Any, int], Built]] = {
    Lora: lora.build,
    Ia3: ia3.build,
    BitFit: bias.build,
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
    beside = _beside(places, settings, built.target_paths)
    return replace(built, parts=places.in_model_order([*built.parts, *beside])) if beside else built


def _beside(places: Places, settings: AdapterSettings, targets: Sequence[str]) -> list[Part]:
    """Return the parts that settings ask for beside those of the method itself."""
    parts: list[Part] = []
    if isinstance(settings, Lora) and settings.bias != "none":
        parts += bias.beside_lora(places, settings.bias, targets)
    if saved := getattr(settings, "modules_to_save", None):
        parts += copies.beside(places, saved, targets)
    return parts
