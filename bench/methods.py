"""The methods that the benches compare, each as the settings of `adapter:` that choose it, all else at its default."""

from __future__ import annotations

from typing import Any

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"method": "lora"},
    "lora-rslora": {"method": "lora", "use_rslora": True},
    "lora-dora": {"method": "lora", "use_dora": True},
    "lora-pissa": {"method": "lora", "init_lora_weights": "pissa"},
    "lora-olora": {"method": "lora", "init_lora_weights": "olora"},
    "lora-orthogonal": {"method": "lora", "init_lora_weights": "orthogonal"},
    "lora-plus": {"method": "lora", "loraplus_lr_ratio": 16},
    "ia3": {"method": "ia3"},
    "bitfit": {"method": "bitfit"},
    "ln-tuning": {"method": "ln-tuning"},
    "bottleneck-pfeiffer": {"method": "bottleneck"},
    "bottleneck-houlsby": {"method": "bottleneck", "placement": "houlsby"},
    "prompt-tuning": {"method": "prompt-tuning"},
    "prefix-tuning": {"method": "prefix-tuning"},
    "prefix-tuning-projected": {"method": "prefix-tuning", "prefix_projection": True},
    "full": {"method": "full"},
}


def default_rate(name: str) -> float:
    """Return the learning rate that a method has where none is given."""
    from onebase.config.methods import METHODS as SETTINGS

    return SETTINGS[METHODS[name]["method"]](**METHODS[name]).usual_learning_rate
