"""Which tensors learn at another rate than the schedule's: LoRA+.

lora_B starts at zero and, for wide layers, should move faster than lora_A (arXiv:2402.12354 sec. 4): it learns at
`loraplus_lr_ratio` times the rate. What else does is PEFT's choice (create_loraplus_optimizer): vectors, such as DoRA's
magnitudes and trained biases. An embedding's pair learns at the plain rate; PEFT gives it 1e-6 whatever the rate is,
which would leave it where it starts.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from onebase.config.methods import AdapterSettings, Lora


def parameter_groups(
    settings: AdapterSettings, named: Iterable[tuple[str, nn.Parameter]], learning_rate: float
) -> list[dict[str, Any]]:
    """Return an optimiser's groups, each with its first rate and its `ratio` to the schedule's."""
    ratio = settings.loraplus_lr_ratio if isinstance(settings, Lora) else None
    groups: dict[float, list[nn.Parameter]] = {1.0: []}
    for name, parameter in named:
        fast = ratio is not None and _learns_fast(name, parameter)
        groups.setdefault(float(ratio) if fast and ratio is not None else 1.0, []).append(parameter)
    return [
        {"params": parameters, "lr": learning_rate * ratio, "ratio": ratio}
        for ratio, parameters in groups.items()
        if parameters
    ]


def _learns_fast(name: str, parameter: nn.Parameter) -> bool:
    """Return whether LoRA+ multiplies the rate of a tensor."""
    if "lora_embedding_" in name:
        return False
    return re.search(r"\.lora_B\b", name) is not None or parameter.ndim == 1
