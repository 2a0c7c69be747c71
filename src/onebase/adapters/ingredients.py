"""What adapters are combined from: the low-rank pairs of trained LoRA adapters, read out of their files' tensors.

Here: which adapters have nothing but pairs that are two matrices, and these by the path of their module. What is made of
them is combining.py's. Refused, by name: methods other than LoRA, DoRA's magnitudes, biases, token rows, whole modules,
stacked experts and grouped convolutions, none of which is a product of two matrices that a pair of another rank could
hold. PEFT drops some of these in silence.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from onebase.adapters import start
from onebase.adapters.bank import Adapter
from onebase.adapters.lora import rank_and_alpha, settings_in_file
from onebase.adapters.pair import scaling_of
from onebase.config.methods import AdapterSettings, Lora

_NAME = re.compile(r"(?P<path>.+)\.lora_(?P<embedding>embedding_)?(?P<letter>[AB])(?:\.weight)?")
_INSTEAD = (
    "Merge the adapters into their base one after the other instead (onebase merge A --out MODEL, then onebase merge B "
    "--model MODEL --allow-base-mismatch --out BOTH), or train without it."
)


@dataclass(frozen=True)
class Ingredient:
    """A trained adapter that others are combined with: settings and tensors as its file has them.

    `name` is what errors call it. A file's adapter with PiSSA's or OLoRA's start is a plain pair of twice the rank.
    """

    name: str
    settings: AdapterSettings
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class StoredPair:
    """A pair as matrices, scaling * B @ A, and its tensors' names and shapes: (r, *inputs) and (out, r, *ones)."""

    A: Tensor
    B: Tensor
    scaling: float
    names: tuple[str, str]
    inputs: tuple[int, ...]
    ones: tuple[int, ...]

    @property
    def r(self) -> int:
        """The rank of the pair."""
        return int(self.A.shape[0])

    @property
    def layer(self) -> tuple[tuple[str, str], int, tuple[int, ...]]:
        """What must be equal for two pairs to lie on one layer."""
        return self.names, int(self.B.shape[0]), self.inputs

    def tensors(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """Return other matrices for the same layer as a file's tensors."""
        shaped = A.reshape(A.shape[0], *self.inputs), B.reshape(*B.shape, *self.ones)
        return {name: tensor.contiguous() for name, tensor in zip(self.names, shaped, strict=True)}


def ingredient_of(adapter: Adapter) -> Ingredient:
    """Return an adapter of a bank as its file would have it."""
    settings = adapter.settings
    return Ingredient(
        adapter.name, settings_in_file(settings) if isinstance(settings, Lora) else settings, adapter.file_tensors
    )


def pairs_of(ingredient: Ingredient, problems: list[str]) -> dict[str, StoredPair]:
    """Return an adapter's pairs by the path of their module; what keeps it from being combined becomes a problem."""
    settings = ingredient.settings
    if not isinstance(settings, Lora):
        problems.append(
            f"{ingredient.name}: is {settings.title}; only LoRA adapters can be combined. Merge it into its base "
            "(onebase merge ADAPTER --out MODEL) and train the others on that, or leave it out."
        )
        return {}
    if start.takes_from_base(settings.init_lora_weights):
        problems.append(
            f"{ingredient.name}: init_lora_weights: {settings.init_lora_weights} keeps its start beside the pair in a bank. "
            "Combine the adapter as its file has it (ingredient_of)."
        )
        return {}
    if beside := beside_pairs(settings):
        problems.append(f"{ingredient.name}: {', '.join(beside)} cannot be combined. {_INSTEAD}")
        return {}
    found: dict[str, dict[str, str]] = {}
    others = []
    for name in ingredient.tensors:
        if match := _NAME.fullmatch(name):
            found.setdefault(match["path"], {})[match["letter"]] = name
        else:
            others.append(name)
    if others:
        problems.append(f"{ingredient.name}: {_listed(others)} cannot be combined, only pairs can. {_INSTEAD}")
    if not found:
        problems.append(f"{ingredient.name}: has no lora_A and no lora_B. Leave it out.")
    pairs: dict[str, StoredPair] = {}
    wrong: dict[str, list[str]] = {}
    for path, names in found.items():
        pair = _pair(path, names, settings, ingredient.tensors)
        if isinstance(pair, str):
            wrong.setdefault(pair, []).append(path)
        else:
            pairs[path] = pair
    problems += [f"{ingredient.name}: {_listed(paths)} {what}" for what, paths in wrong.items()]
    return pairs


def tied_heads(ingredients: Sequence[Ingredient], pairs: Sequence[Mapping[str, StoredPair]]) -> dict[str, str]:
    """Return head -> embedding where every adapter that has the head's pair has the embedding's in it, tied.

    Their combination must be one pair again, which the single numbers of head and embedding would not give: a weight's
    sign goes to A, and the head's A is the embedding's B.
    """
    if not all(isinstance(one.settings, Lora) and one.settings.ensure_weight_tying for one in ingredients):
        return {}
    embeddings = {path for own in pairs for path, pair in own.items() if "lora_embedding" in pair.names[0]}
    heads = {path for own in pairs for path in own} - embeddings
    return {
        head: embedding
        for head in sorted(heads)
        for embedding in sorted(embeddings)
        if all(_is_tied(own, head, embedding) for own in pairs if head in own or embedding in own)
    }


def _is_tied(pairs: Mapping[str, StoredPair], head: str, embedding: str) -> bool:
    if head not in pairs or embedding not in pairs:
        return False
    return torch.equal(pairs[head].A, pairs[embedding].B.T) and torch.equal(pairs[head].B, pairs[embedding].A.T)


def beside_pairs(settings: Lora) -> list[str]:
    """Return what settings have beside pairs, as a user wrote it."""
    given = {
        "use_dora": settings.use_dora,
        f"bias: {settings.bias}": settings.bias != "none",
        f"modules_to_save: {settings.modules_to_save}": settings.modules_to_save,
        "trainable_token_indices": settings.trainable_token_indices,
        f"target_parameters: {settings.target_parameters}": settings.target_parameters,
    }
    return [name for name, there in given.items() if there]


def _pair(path: str, names: Mapping[str, str], settings: Lora, tensors: Mapping[str, Tensor]) -> StoredPair | str:
    """Return the pair of one module, or why it is none that can be combined, to follow the module's name."""
    if missing := [f"lora_{letter}" for letter in "AB" if letter not in names]:
        return f"must have a whole pair, {missing[0]} is missing. Get an undamaged copy."
    A, B = tensors[names["A"]].detach(), tensors[names["B"]].detach()
    r, lora_alpha = rank_and_alpha(settings, path)
    if A.dim() > 2 and A.shape[0] != B.shape[1]:
        return f"cannot be combined: a convolution with groups, which its pair mixes. {_INSTEAD}"
    if A.dim() < 2 or A.dim() != B.dim() or A.shape[0] != r or B.shape[1] != r:
        return f"must have rank {r} by its settings, got {tuple(A.shape)} and {tuple(B.shape)}. Get an undamaged copy."
    if not (torch.isfinite(A).all() and torch.isfinite(B).all()):
        return "has numbers that are NaN or infinite. Train it again, or leave it out."
    return StoredPair(
        A=A.flatten(1),
        B=B.flatten(1),
        scaling=scaling_of(r, lora_alpha, settings.use_rslora),
        names=(names["A"], names["B"]),
        inputs=tuple(A.shape[1:]),
        ones=tuple(B.shape[2:]),
    )


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
