"""First values as PEFT draws them: from torch's global generator, layer by layer in model order.

So the same `torch.manual_seed` before `get_peft_model` gives the same adapter as with peft, and leaves the generator
where peft leaves it. torch's own layers are made and thrown away, because their making draws too. What is drawn here:
pairs on linear layers, convolutions and embeddings (True, False, "gaussian"), virtual tokens and prefixes. Other
starts (orthogonal, PiSSA, OLoRA, a random IA3) keep the bank's, which follow from seed and path: where they are random
they are others than PEFT's.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from onebase.adapters.bank import Adapter
from onebase.adapters.conv import ConvPart
from onebase.adapters.embedding import EmbeddingPart
from onebase.adapters.lora import LoraPart
from onebase.adapters.prefix import PrefixPart
from onebase.adapters.prompt import PromptPart
from onebase.adapters.start import PLAIN
from onebase.base import pretrained
from onebase.config.methods import Lora
from onebase.peft.config import PromptTuningInit

_KAIMING = math.sqrt(5)


@torch.no_grad()
def draw_(adapter: Adapter, config: Any, embedding: Any) -> None:
    """Give an adapter that is new the first values that PEFT would draw now.

    Args:
        embedding: the base's input embedding.
    """
    init = adapter.settings.init_lora_weights if isinstance(adapter.settings, Lora) else True
    for part in adapter.parts:
        if isinstance(part, LoraPart | ConvPart | EmbeddingPart) and init in PLAIN:
            pair = _embedding_pair(part, init) if isinstance(part, EmbeddingPart) else _layer_pair(part, init)
            for (_, parameter), drawn in zip(part.parameters(), pair, strict=True):
                parameter.copy_(drawn)
        elif isinstance(part, PromptPart):
            part.prompt_embeddings.copy_(_prompt(tuple(part.prompt_embeddings.shape), config, embedding))
        elif isinstance(part, PrefixPart):
            for (_, parameter), drawn in zip(part.parameters(), _prefix(part, config), strict=True):
                parameter.copy_(drawn)


def _layer_pair(part: Any, init: bool | str) -> tuple[Tensor, Tensor]:
    """Return A and B of a linear layer or a convolution.

    Source: peft 0.21.2, tuners/lora/layer.py, LoraLayer.update_layer, _ConvNd.update_layer, reset_lora_parameters.
    """
    A, B = (torch.empty(p.shape) for _, p in part.parameters())
    for tensor in (A, B):  # as torch's layers start
        nn.init.kaiming_uniform_(tensor, a=_KAIMING)
    if init is True:
        nn.init.kaiming_uniform_(A, a=_KAIMING)
    elif init == "gaussian":
        nn.init.normal_(A, std=1 / A.shape[0])
    return A, B if init is False else torch.zeros_like(B)


def _embedding_pair(part: EmbeddingPart, init: bool | str) -> tuple[Tensor, Tensor]:
    """Return A and B of an embedding: A zero, B normal."""
    A, B = (torch.randn(p.shape) for _, p in part.parameters())
    if init is False:
        return A, B
    return torch.zeros_like(A), nn.init.normal_(B)


def _prompt(shape: tuple[int, ...], config: Any, embedding: Any) -> Tensor:
    """Return virtual tokens: normal, of tokens drawn from the vocabulary, or of a text."""
    drawn = torch.randn(shape)
    if config.prompt_tuning_init == PromptTuningInit.SAMPLE_VOCAB:
        return _rows(embedding, torch.randint(0, embedding.num_embeddings, shape[:1]))
    if config.prompt_tuning_init == PromptTuningInit.TEXT:
        place = pretrained.locate(config.tokenizer_name_or_path)
        tokenizer, _ = pretrained.open_tokenizer(place)
        ids = list(tokenizer(config.prompt_tuning_init_text)["input_ids"])
        return _rows(embedding, torch.tensor((ids * -(-shape[0] // len(ids)))[: shape[0]]))
    return drawn


def _rows(embedding: Any, ids: Tensor) -> Tensor:
    rows: Tensor = embedding(ids.to(embedding.weight.device)).detach().float()
    return rows


def _prefix(part: PrefixPart, config: Any) -> Iterator[Tensor]:
    """Yield the values of a prefix's tensors in their order: the embedding, then weights and biases of the network."""
    drawn = torch.randn(part.embedding.shape)
    layers = [name for name in part.network if name.endswith(".weight")]
    network: dict[str, Tensor] = {}
    for name in layers:
        outputs, inputs = part.network[name].shape
        layer = nn.Linear(inputs, outputs)
        network |= {name: layer.weight, name.replace("weight", "bias"): layer.bias}
    if config.init_weights == "zero":
        last = [name for name in network if name.startswith(layers[-1].partition(".")[0])] if layers else []
        network |= {name: torch.zeros_like(network[name]) for name in last}
        drawn = drawn if layers else torch.zeros_like(drawn)
    yield drawn
    yield from (network[name] for name in part.network)
