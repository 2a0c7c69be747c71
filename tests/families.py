"""What the laws over model families share: one forward of a batch with several owners, on any tiny model."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F

from onebase.adapters.bank import Bank
from onebase.adapters.build import BUILDERS
from onebase.config.methods import (
    BitFit,
    Bottleneck,
    Full,
    Ia3,
    LnTuning,
    Lora,
    PrefixTuning,
    PromptTuning,
)
from onebase.data.batches import FlatBatch
from onebase.data.examples import Examples
from onebase.measure.forward import batches_of, forward_loss
from onebase.ops.layout import NO_PARENT, Layout, Node
from tests import tiny

FAMILIES: dict[str, tuple[str, ...]] = {
    "decoders": (
        *("llama", "llama-tied", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "gpt2", "gpt-neox", "opt"),
        "bloom",
    ),
    "mixture of experts": ("qwen3-moe", "mixtral"),
    "encoders": ("bert", "roberta", "distilbert", "modernbert"),
    "encoder-decoder": ("t5",),
    "vision": ("vit",),
    "any module": ("plain",),
}
EXACT: dict[str, Any] = {"rtol": 1e-6, "atol": 1e-7}
# What a model computes in fp32 whatever its dtype (norms, rotary angles, softmax) is rounded by where it lies.
TOLERANCE: dict[str, dict[str, Any]] = {
    "gemma2": {"rtol": 1e-5, "atol": 2e-6},
    "gemma3": {"rtol": 1e-5, "atol": 2e-6},
    "bloom": {"rtol": 1e-5, "atol": 5e-5},  # gradients of up to 35
}
_EAGER: dict[str, Any] = {"experts_implementation": "eager"}
EAGER: dict[str, dict[str, Any]] = {"qwen3-moe": _EAGER, "mixtral": _EAGER}
"""What lets a model run in fp64: the fused experts of transformers do not know it."""
ALL = tuple(name for names in FAMILIES.values() for name in names)
LENGTHS = tuple(5 + 7 * number % 19 for number in range(40))
"""The lengths of the examples of a model of tokens; every model has as many entries."""

VARIANTS: dict[str, tuple[type[Any], dict[str, Any]]] = {
    "lora": (Lora, {"r": 4}),
    "lora+dora": (Lora, {"r": 4, "use_dora": True}),
    "lora+pissa": (Lora, {"r": 4, "init_lora_weights": "pissa"}),
    "lora+olora": (Lora, {"r": 4, "init_lora_weights": "olora"}),
    "lora+orthogonal": (Lora, {"r": 4, "init_lora_weights": "orthogonal"}),
    "lora+bias": (Lora, {"r": 4, "bias": "all"}),
    "lora+lora-only-bias": (Lora, {"r": 4, "bias": "lora_only"}),
    "lora+tying": (Lora, {"r": 4, "ensure_weight_tying": True}),
    "ia3": (Ia3, {}),
    "bitfit": (BitFit, {}),
    "ln-tuning": (LnTuning, {}),
    "bottleneck-pfeiffer": (Bottleneck, {"reduction_factor": 4}),
    "bottleneck-houlsby": (Bottleneck, {"reduction_factor": 4, "placement": "houlsby"}),
    "prompt-tuning": (PromptTuning, {"num_virtual_tokens": 3}),
    "prefix-tuning": (PrefixTuning, {"num_virtual_tokens": 3}),
    "prefix-tuning+projection": (PrefixTuning, {"num_virtual_tokens": 3, "prefix_projection": True}),
    "full": (Full, {}),
}
"""Every method in its kinds: the settings class and what of it is set."""
SAME: dict[str, tuple[str, type[Any], dict[str, Any]]] = {
    "lora+rslora": ("lora", Lora, {"r": 4, "use_rslora": True}),
    "lora+gaussian": ("lora", Lora, {"r": 4, "init_lora_weights": "gaussian"}),
    "lora+loraplus": ("lora", Lora, {"r": 4, "loraplus_lr_ratio": 16}),
    "lora+pissa_niter_4": ("lora+pissa", Lora, {"r": 4, "init_lora_weights": "pissa_niter_4"}),
    "prompt-tuning+random": ("prompt-tuning", PromptTuning, {"num_virtual_tokens": 3, "prompt_tuning_init": "RANDOM"}),
    "prompt-tuning+text": (
        "prompt-tuning",
        PromptTuning,
        {"num_virtual_tokens": 3, "prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "a text"},
    ),
}
"""Kinds that differ from another one in first values, rates or scales alone: that one's label, and as above."""


def variants() -> dict[str, tuple[type[Any], dict[str, Any]]]:
    """Return the variants of the methods that can be built now; none may be missing above."""
    assert set(BUILDERS) <= {kind for kind, _ in VARIANTS.values()}
    return {label: variant for label, variant in VARIANTS.items() if variant[0] in BUILDERS}


def perturb_(adapter: Any, seed: int, size: float = 0.1) -> Any:
    """Move every tensor of an adapter from where it starts, so that it changes the base and gradients reach all of it."""
    draws = torch.Generator().manual_seed(seed)
    for _, parameter in adapter.parameters():
        parameter.data += size * torch.randn(parameter.shape, generator=draws).to(parameter.dtype)
    return adapter


def bank_on(name: str, dtype: torch.dtype = torch.float64) -> Bank:
    """Return an empty bank on a tiny model."""
    return Bank(tiny.base_of(name, dtype=dtype, **EAGER.get(name, {})))


def name_of(bank: Bank) -> str:
    return bank.base.name.removeprefix("tiny-")


def run(bank: Bank, owners: Mapping[int, str | None]) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    """Return what each entry (number: its owner) of a batch comes to, and the sum of their losses.

    Entry i is the same example or image whoever owns it and whatever stands beside it.
    """
    if bank.base.layout_kind == "native":
        return _run_native(bank, owners)
    examples = tiny.examples_of(*LENGTHS)
    batch = joined([_one_batch(bank, owner, examples, numbers) for owner, numbers in _stretches(bank, owners)])
    if bank.base.head is not None:
        loss, rows = forward_loss(bank, batch, 1.0)
        pieces = rows.loss.split([node.labels for node in batch.layout.nodes])
    else:
        hidden = bank.base.hidden(batch.token_ids, bank.route(batch.layout))
        pieces = hidden.split([node.length for node in batch.layout.nodes])
    own = {node.example: p for node, p in zip(batch.layout.nodes, pieces, strict=True) if node.virtual < node.length}
    found = {i: own[i][-len(examples[i].token_ids) :] for i in owners}
    if bank.base.head is None:
        loss = sum((_distance(found[i], i) for i in owners), torch.zeros(()))
    return {i: piece.detach() for i, piece in found.items()}, loss


@torch.no_grad()
def entries(bank: Bank, owners: Mapping[int, str | None]) -> dict[int, torch.Tensor]:
    """Return what each entry of a batch comes to, without a gradient."""
    return run(bank, owners)[0]


def token_ids(bank: Bank) -> list[int]:
    """Return tokens that entries 0 and 2 hold, of a model that reads tokens."""
    if bank.base.layout_kind != "native":
        return [int(tiny.examples_of(*LENGTHS)[i].token_ids[1]) for i in (0, 2)]
    held = tiny.native_inputs(name_of(bank), len(LENGTHS))
    return [int(held[key][i, 1]) for key in ("input_ids", "decoder_input_ids") for i in (0, 2)]


def backward(loss: torch.Tensor) -> None:
    """Let gradients reach the adapters."""
    loss.backward()


def check_same(what: str, found: torch.Tensor, expected: torch.Tensor, bank: Bank) -> None:
    """Raise unless two results of one model are equal, to the rounding of fp64 (of fp32, where it computes in that)."""
    tolerance = TOLERANCE.get(name_of(bank), EXACT)
    torch.testing.assert_close(found, expected, **tolerance, msg=lambda text: f"{what}: {text}")


def _stretches(bank: Bank, owners: Mapping[int, str | None]) -> list[tuple[str | None, list[int]]]:
    """Return who owns which entries, in order; what has virtual tokens has its entries together, behind them."""
    found: list[tuple[str | None, list[int]]] = []
    for i, owner in owners.items():
        if not bank.virtual_ids(owner):
            found.append((owner, [i]))
        elif all(owner != other for other, _ in found):
            found.append((owner, [j for j, other in owners.items() if other == owner]))
    return found


def _one_batch(bank: Bank, owner: str | None, examples: Examples, numbers: list[int]) -> FlatBatch:
    [batch] = batches_of(bank, owner, examples, numbers, 10**9)
    return batch


def _run_native(bank: Bank, owners: Mapping[int, str | None]) -> tuple[dict[int, torch.Tensor], torch.Tensor]:
    entries = torch.tensor(list(owners))
    inputs = {
        key: (value.to(bank.base.dtype) if value.is_floating_point() else value)[entries]
        for key, value in tiny.native_inputs(name_of(bank), len(LENGTHS)).items()
    }
    out = tiny.native_outputs(bank.base, bank.batch_route(list(owners.values())), inputs)
    labels = [torch.full(rows.shape[:-1], i % rows.shape[-1]) for i, rows in zip(owners, out, strict=True)]
    losses = [F.cross_entropy(rows, label) for rows, label in zip(out, labels, strict=True)]
    return {i: rows.detach() for i, rows in zip(owners, out, strict=True)}, torch.stack(losses).sum()


def _distance(hidden: torch.Tensor, entry: int) -> torch.Tensor:
    """Return the mean squared distance of an encoder's hidden states to fixed random ones."""
    draws = torch.Generator().manual_seed(entry)
    return F.mse_loss(hidden, torch.randn(hidden.shape, generator=draws).to(hidden.dtype))


def joined(pieces: list[FlatBatch]) -> FlatBatch:
    """Return flat batches as one."""
    starts = torch.tensor([0, *(len(piece.token_ids) for piece in pieces)]).cumsum(0).tolist()
    nodes: list[Node] = []
    for piece in pieces:
        before = len(nodes)
        for node in piece.layout.nodes:
            parent = node.parent if node.parent == NO_PARENT else node.parent + before
            nodes.append(Node(**{**vars(node), "parent": parent}))
    return FlatBatch(
        torch.cat([piece.token_ids for piece in pieces]),
        Layout(nodes),
        torch.cat([piece.label_rows + start for piece, start in zip(pieces, starts, strict=False)]),
        torch.cat([piece.label_ids for piece in pieces]),
        sum((piece.examples for piece in pieces), ()),
    )
