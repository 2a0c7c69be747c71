"""One layer and nothing else: the bank's parts on it beside PEFT's, with the same numbers."""

import copy
from types import SimpleNamespace
from typing import Any

import peft
import torch
from torch import nn

from onebase.adapters.build import build
from onebase.adapters.layer import AdaptedLayer
from onebase.adapters.part import MergeablePart
from onebase.adapters.places import Places
from onebase.base.model import Base
from onebase.base.route import Route, RowSpace, Slot
from onebase.config.methods import Lora
from onebase.errors import TargetError


def draws(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """Return normal numbers that follow from shape and seed."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


class Holder(nn.Module):
    """A model of one layer, at the path "layer"."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.config = SimpleNamespace(model_type="bare", to_dict=dict, get=lambda *_: None)

    def forward(self, *inputs: Any) -> Any:
        return self.layer(*inputs)

    def get_output_embeddings(self) -> None:
        return None


class Bare:
    """A frozen layer with adapters on it; adapter i owns the entries that a call gives to owner i."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = copy.deepcopy(layer).eval().requires_grad_(False)
        self.places = Places(Base(Holder(self.layer), name="bare"))
        self.slot = Slot()
        self.wrapper = AdaptedLayer(self.layer, "layer", RowSpace.TOKEN, self.slot)
        self.parts: list[tuple[Any, ...]] = []

    def add(
        self, *, seed: int = 0, dtype: torch.dtype | None = None, size: float | None = None, **settings: Any
    ) -> Any:
        """Put an adapter on; `dtype` turns its tensors, `size` fills them with normal numbers (magnitudes: around their own)."""
        built = build(self.places, Lora(**({"target_modules": ["layer"]} | settings)), seed)
        if built.refusals:
            raise TargetError(" ".join(built.refusals))
        draws = torch.Generator().manual_seed(seed + 1)
        for part in built.parts:
            for name, parameter in part.parameters():
                if size is not None:
                    noise = size * torch.randn(parameter.shape, generator=draws)
                    parameter.data = parameter.data + noise if "magnitude" in name else noise
                parameter.data = parameter.data.to(dtype or parameter.dtype)
            self.wrapper.put(len(self.parts), part)
        self.parts.append(built.parts)
        return built

    def __call__(self, x: torch.Tensor, *others: Any, owners: tuple[int, ...] = (0,), **keys: Any) -> torch.Tensor:
        with self.slot.use(Route(batch_owners=owners, **keys)):
            out: torch.Tensor = self.wrapper(x, *others)
        return out

    def parameters(self, owner: int = 0) -> dict[str, nn.Parameter]:
        return dict(pair for part in self.parts[owner] for pair in part.parameters())

    def merged(self, owner: int = 0) -> nn.Module:
        """Return a plain copy of the layer with an adapter written into it."""
        plain = copy.deepcopy(self.layer)
        for part in self.parts[owner]:
            assert isinstance(part, MergeablePart)
            part.merge_(plain)
        return plain


def peft_of(bare: Bare, owner: int = 0, **settings: Any) -> Any:
    """Return PEFT's model of the same layer with the same adapter, loaded under the names of its own format."""
    holder = Holder(copy.deepcopy(bare.layer))
    config = peft.LoraConfig(**({"target_modules": ["layer"]} | settings))
    theirs = peft.get_peft_model(holder, config, autocast_adapter_dtype=False).eval()
    state = {f"base_model.model.{name}": p.detach().clone() for name, p in bare.parameters(owner).items()}
    own = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert {n: t.shape for n, t in own.items()} == {n: t.shape for n, t in state.items()}
    report = peft.set_peft_model_state_dict(theirs, state)
    assert not report.unexpected_keys
    found = peft.get_peft_model_state_dict(theirs, save_embedding_layers=False)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    return theirs


def assert_is_pefts(bare: Bare, x: torch.Tensor, *, merges: bool = True, **settings: Any) -> None:
    """Raise unless output, gradients and merged weight are PEFT's, and a merged copy does what base and parts do."""
    theirs = peft_of(bare, **settings)
    mine, other = [x.detach().clone().requires_grad_(x.is_floating_point()) for _ in range(2)]
    y, expected = bare(mine), theirs(other)
    torch.testing.assert_close(y, expected)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(y.dtype)
    (y * weights).sum().backward()
    (expected * weights).sum().backward()
    if x.is_floating_point():
        torch.testing.assert_close(mine.grad, other.grad)
    grads = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    assert len(grads) == len(bare.parameters())
    for name, parameter in bare.parameters().items():
        key = "base_model.model." + name.removesuffix(".weight") + ".default"
        gradient = grads[key] if key in grads else grads[key + ".weight"]
        torch.testing.assert_close(parameter.grad, gradient)
    if merges:
        merged = bare.merged()
        torch.testing.assert_close(merged(x), y)
        torch.testing.assert_close(merged.weight, theirs.merge_and_unload().layer.weight)
