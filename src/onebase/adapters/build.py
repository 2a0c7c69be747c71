"""From an adapter's settings to its parts: the one table of methods."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from onebase.adapters import ia3, lora
from onebase.adapters.part import Built
from onebase.adapters.places import Places
from onebase.config.methods import AdapterSettings, Ia3, Lora

BUILDERS: dict[type[Any], Callable[[Places, Any, int], Built]] = {
    Lora: lora.build,
    Ia3: ia3.build,
}
"""Settings class -> what makes its parts from (places, settings, seed)."""


def build(places: Places, settings: AdapterSettings, seed: int) -> Built:
    """Return a new adapter's parts, with their first values.

    Raises:
        TargetError: the settings name a module that is not there, or none, or one that the method does not go on.
        CapacityError: there is no memory for its tensors.
    """
    return BUILDERS[type(settings)](places, settings, seed)
