"""An adapter's tensors as parameters of the user's model, under PEFT's names: MODULE.lora_A.NAME.weight, ...

The bank keeps its tensors in parts, which no module knows. Optimisers, transformers' Trainer, `named_parameters`,
`state_dict` and `.to()` look for parameters in modules: `hold` puts the same ones there, in containers inside the
wrapper of their module, and `let_go` takes them away again. Nothing is computed with what is held.
"""

from __future__ import annotations

from collections.abc import Iterator, KeysView
from typing import Any

from torch import nn

from onebase.adapters.bank import Adapter
from onebase.adapters.copies import CopyPart
from onebase.adapters.layer import AdaptedLayer
from onebase.adapters.part import MemoryPart, Part
from onebase.adapters.prompt import PromptPart

SAVED = "modules_to_save"
_BIAS = "trained_bias"  # PEFT trains the base's own; ours is beside it
_BARE = ("ia3_l", "lora_embedding_A", "lora_embedding_B", "trainable_tokens_delta")
_PROMPTS = {"prompt_embeddings": "embedding.weight"}


def hold(front: nn.Module, adapter: Adapter) -> None:
    """Make an adapter's tensors parameters of `front`, which the user's model lies in."""
    layers = _layers(front)
    for part in adapter.parts:
        if isinstance(part, PromptPart | MemoryPart):
            for name, parameter in part.parameters():
                inside = _PROMPTS.get(name, name.removeprefix("prompt_encoder."))
                _put(front, ["prompt_encoder", adapter.name, *inside.split(".")], parameter)
        elif isinstance(part, CopyPart):
            where = "ln_tuning_layers" if part.prefix.endswith("ln_tuning_layers") else SAVED
            layer = layers[part.path]
            _inside(layer, where).add_module(adapter.name, part.twin.train(layer.base_layer.training))
        else:
            for name, parameter in part.parameters():
                _put(layers[part.path], _names(part, name, adapter.name), parameter)


def let_go(front: nn.Module, adapter: Adapter) -> None:
    """Take an adapter's tensors away from the modules again."""
    for module in [*front.modules()]:
        owners = module._modules if isinstance(module, AdaptedLayer) or module is front else {}
        for name, container in [*owners.items()]:
            if isinstance(container, _Held):
                _drop(container, adapter.name)
                if not container._modules and not container._parameters:
                    del owners[name]


class _Held(nn.Module):
    """A container that is only there to have names in it, which can be looked up: `layer.lora_A["default"]`."""

    def __getitem__(self, name: str) -> Any:
        return self._entries[name]

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def keys(self) -> KeysView[str]:
        """Return the names."""
        return self._entries.keys()

    @property
    def _entries(self) -> dict[str, Any]:
        return {**self._modules, **self._parameters}


def _names(part: Part, name: str, adapter_name: str) -> list[str]:
    """Return where a tensor lies in its module's wrapper: PEFT's name, with the adapter's in it."""
    inside = name.removeprefix(f"{part.path}.").split(".")
    if inside[-1] == "bias":
        return [_BIAS, adapter_name]
    if inside[-1] in _BARE:
        return [*inside, adapter_name]
    if inside[-1] == "lora_magnitude_vector":
        return [*inside, adapter_name, "weight"]
    return [*inside[:-1], adapter_name, inside[-1]]


def _layers(front: nn.Module) -> dict[str, AdaptedLayer]:
    return {module.path: module for module in front.modules() if isinstance(module, AdaptedLayer)}


def _inside(module: nn.Module, name: str) -> nn.Module:
    found = module._modules.get(name)
    if found is None:
        found = _Held()
        module.add_module(name, found)
    return found


def _put(module: nn.Module, names: list[str], parameter: nn.Parameter) -> None:
    for name in names[:-1]:
        module = _inside(module, name)
    module.register_parameter(names[-1], parameter)


def _drop(container: nn.Module, name: str) -> None:
    """Remove what an adapter has in a container, at whatever depth, and containers that are empty then."""
    container._modules.pop(name, None)
    container._parameters.pop(name, None)
    for inner_name, inner in [*_held(container)]:
        _drop(inner, name)
        if not inner._modules and not inner._parameters:
            del container._modules[inner_name]


def _held(container: nn.Module) -> Iterator[tuple[str, Any]]:
    return ((name, inner) for name, inner in container._modules.items() if isinstance(inner, _Held))
