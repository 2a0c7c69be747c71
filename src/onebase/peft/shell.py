"""What PEFT puts around a model, and how the model is left as it was when an adapter is put on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from onebase.adapters.bank import Bank
from onebase.adapters.layer import AdaptedLayer
from onebase.base.model import Base

_OF_FRONT = {
    "active_adapter", "active_adapters", "add_weighted_adapter", "delete_adapter", "disable_adapter_layers",
    "enable_adapter_layers", "merge_adapter", "merge_and_unload", "peft_config", "set_adapter", "set_requires_grad",
    "unload", "unmerge_adapter",
}  # fmt: skip
"""What PEFT lets be asked of base_model, and transformers' models would answer for adapters of their own."""


class Tuner(nn.Module):
    """What PEFT calls base_model: the user's model lies in it as `model`.

    Args:
        front: the PeftModel, which answers for the adapters.
    """

    def __init__(self, model: nn.Module, front: nn.Module) -> None:
        super().__init__()
        self.model = model
        self._front = (front,)  # in a tuple: no module of this one

    def forward(self, *args: Any, **named: Any) -> Any:
        """Return what the user's model makes of its inputs."""
        return self.model(*args, **named)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("model", "_front"):
                raise
            return getattr(self._front[0] if name in _OF_FRONT else self.model, name)


def bank_on(model: Any, *, flat: bool) -> Bank:
    """Return an empty bank on the user's own model, which is left as it was but that nothing in it requires a gradient.

    Args:
        flat: whether the model's attention is to be tried, as virtual tokens need it.
    """
    place = Path(str(getattr(model, "name_or_path", None) or ""))
    found = place if place.name and place.is_dir() else None
    why = "" if flat else "it is called as it is, by code written for PEFT"
    with as_it_was(model):
        base = Base(model, name=str(found or type(model).__name__), folder=found, fingerprint="unknown", why_native=why)
        bank = Bank(base, keys_dropout=True)
        base.rest()
    return bank


@contextmanager
def as_it_was(model: nn.Module, base: Base | None = None) -> Iterator[None]:
    """Run the block with the model in evaluation mode, and leave its modules' modes and its attention as they were."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for wrapper in [module for module in model.modules() if isinstance(module, AdaptedLayer)]:
            wrapper.training = wrapper.base_layer.training
        if base is not None:
            base.rest()


def let_recompute(model: Any, base: Base, options: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Let a model recompute its blocks in the backward, under the route that the forward had.

    Args:
        options: torch's, over `use_reentrant: False`.
        more: what else transformers' own method takes.
    """
    given: dict[str, Any] = {"use_reentrant": False, **options}
    if not given["use_reentrant"]:
        given.setdefault("context_fn", base.slot.for_recompute)
    if hasattr(model, "activation_checkpointing_enable"):
        model.activation_checkpointing_enable(activation_checkpointing_kwargs=given, **more)
    else:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=given, **more)
