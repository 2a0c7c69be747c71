"""An adapter made of others, with the configuration that PEFT gives it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from onebase.adapters.combining import Recipe, combine
from onebase.adapters.ingredients import ingredient_of
from onebase.errors import ConfigError
from onebase.peft.config import LoraConfig

if TYPE_CHECKING:
    from torch import Tensor

    from onebase.adapters.bank import Adapter
    from onebase.config.methods import Lora
    from onebase.peft.config import PeftConfig

_FIELDS = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights")


def weighted(
    sources: Sequence[tuple[Adapter, PeftConfig]], weights: Sequence[float], how: str, recipe: Mapping[str, Any]
) -> tuple[Lora, dict[str, Tensor], LoraConfig]:
    """Return settings, tensors and configuration of the adapter that `weights` and `how` make of others.

    One that is named twice counts twice, as in PEFT.

    Raises:
        ConfigError: all that cannot be combined so.
    """
    configs = [config for _, config in sources if isinstance(config, LoraConfig)]
    if not configs or len(configs) < len(sources):
        raise ConfigError(
            "add_weighted_adapter: LoRA adapters alone can be combined, got "
            f"{', '.join(adapter.name for adapter, _ in sources) or 'none'}."
        )
    unknown = sorted(recipe.keys() - {"svd_rank", "density", "majority_sign_method"})
    if unknown:
        raise ConfigError(
            f"add_weighted_adapter: {', '.join(unknown)} is not known here; there are svd_rank, density and "
            "majority_sign_method. Remove it."
        )
    ingredients = [ingredient_of(adapter) for adapter, _ in sources]
    settings, tensors = combine(ingredients, weights, Recipe(how, **recipe))
    named: list[Any] = [config.target_modules for config in configs]
    sets = all(isinstance(names, set) for names in named)
    targets = set().union(*named) if sets else settings.target_modules
    values = {field: getattr(settings, field) for field in _FIELDS}
    return settings, tensors, replace(configs[0], target_modules=targets, **values)
