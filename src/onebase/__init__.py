"""onebase: one frozen base model, many adapters.

Importing this package imports no torch: `onebase --help` answers at once, and settings can be read and checked on a
machine that has none. The names of the Python interface (`onebase.api`) are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from onebase.ops.bits import ask_for_batch_invariance

if TYPE_CHECKING:
    from onebase.api import (
        Adapter,
        AdapterSettings,
        Bank,
        Base,
        BitFit,
        Bottleneck,
        Full,
        Ia3,
        Job,
        Labels,
        LnTuning,
        Lora,
        PrefixTuning,
        PromptTuning,
        Result,
        Scores,
        TaskScores,
        evaluate,
        load,
        model_path,
        train,
    )

__version__ = "0.1.0"

__all__ = [
    "Adapter", "AdapterSettings", "Bank", "Base", "BitFit", "Bottleneck", "Full", "Ia3", "Job", "Labels", "LnTuning",
    "Lora", "PrefixTuning", "PromptTuning", "Result", "Scores", "TaskScores", "evaluate", "load", "model_path", "train",
]  # fmt: skip

ask_for_batch_invariance()


def __getattr__(name: str) -> Any:
    """Return a name of `onebase.api`, importing it (and torch) on first use."""
    if name not in __all__:
        raise AttributeError(f"module 'onebase' has no attribute {name!r}")
    api = importlib.import_module("onebase.api")
    # All of them: importing the api has imported the room `onebase.train`, which then stands where the function belongs.
    globals().update({found: getattr(api, found) for found in __all__})
    return globals()[name]
