"""The frozen base in 4 bits, as QLoRA holds it: linear layers of NF4 numbers, through bitsandbytes, whose door this is.

A weight is cut into blocks of 64 numbers, each with its largest absolute value in 8 bits (double quantisation): about
4.13 bits a number. Both passes make the weight from them, in the base's own format, and forget it again; so gradients
are exact for the weight that the forward has, and only one layer's numbers are ever there in full.

What stays as it is: embeddings, norms, output and task heads. In a state dict such a layer is the plain one that it
stands for. Cost: less memory, and two passes over the weight beside each product.

Source: QLoRA, arXiv:2305.14314 sec. 3.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from onebase.errors import MissingExtraError

BLOCK = 64
"""How many numbers share one largest value."""


def check_installed() -> None:
    """Raise unless bitsandbytes is there.

    Raises:
        MissingExtraError: what to install.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError("quantize: nf4 needs bitsandbytes. Install it: pip install 'onebase[nf4]'")


class Nf4Linear(nn.Module):
    """A frozen linear layer in 4 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        from bitsandbytes.functional import quantize_4bit

        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        numbers = linear.weight.detach().flatten()
        # Whole blocks as rows: of other rows the kernel for AVX-512 makes wrong numbers (bitsandbytes 0.50.2, 48 inputs).
        blocks = functional.pad(numbers, (0, -numbers.numel() % BLOCK)).view(-1, BLOCK)
        codes, self._scales = quantize_4bit(blocks, blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
        self.codes = nn.Parameter(codes, requires_grad=False)
        self.bias: nn.Parameter | None = linear.bias

    @property
    def weight(self) -> Tensor:
        """(out, in), what the layer multiplies with, made anew."""
        from bitsandbytes.functional import dequantize_4bit

        numbers: Tensor = dequantize_4bit(self.codes, self._scales)
        size = self.out_features * self.in_features
        return numbers.view(-1)[:size].view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Return the output for every vector of the last dimension."""
        y: Tensor = _Nf4Product.apply(x, self)  # type: ignore[no-untyped-call]
        return y

    def plain(self) -> nn.Linear:
        """Return a linear layer that does the same and shares nothing with this one."""
        with torch.device("meta"):
            linear = nn.Linear(self.in_features, self.out_features, bias=False)
        linear.weight = nn.Parameter(self.weight, requires_grad=False)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=False)
        return linear

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self.plain()._save_to_state_dict(destination, prefix, keep_vars)


class _Nf4Product(torch.autograd.Function):
    """y = x W^T + b, with W made in each pass: autograd's own product would keep it from the one to the other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Nf4Linear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return functional.linear(x, layer.weight, layer.bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return (grad @ ctx.layer.weight.to(grad.dtype)).to(ctx.dtype), None


@torch.no_grad()
def quantise_(model: nn.Module, kept: Collection[str]) -> int:
    """Put 4-bit layers in the place of a model's linear layers, and return how many.

    Args:
        kept: paths of modules that stay as they are, with all inside them.
    """
    paths = [
        path
        for path, module in model.named_modules()
        if type(module) is nn.Linear and not any(path == p or path.startswith(f"{p}.") for p in kept)
    ]
    for path in paths:  # each is let go before the next is made
        parent, _, name = path.rpartition(".")
        linear = model.get_submodule(path)
        assert isinstance(linear, nn.Linear), "as listed above"
        setattr(model.get_submodule(parent), name, Nf4Linear(linear))
    return len(paths)


def weight_count(model: nn.Module) -> int:
    """Return how many weights a model has, tied ones counted once, whatever it holds them in."""
    packed = sum(
        module.in_features * module.out_features - module.codes.numel()
        for module in model.modules()
        if isinstance(module, Nf4Linear)
    )
    return packed + sum(p.numel() for p in model.parameters())
