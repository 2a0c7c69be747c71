"""Weight tying (`ensure_weight_tying`): what LoRA does to an embedding, the head that reads the same weight gets too.

Whole copies (modules_to_save) are shared in copies.py, trained rows in tokens.py; here are LoRA's pairs. PEFT ties a
pair's memory but keeps two gradients and two optimiser states for it, so a step is taken twice; here it is one tensor
with one gradient, the sum of both uses. In files the numbers stand under both names, as PEFT writes them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from onebase.adapters.dense import add_product_
from onebase.adapters.embedding import EmbeddingPart
from onebase.adapters.part import Part, RowCall
from onebase.adapters.places import Places
from onebase.errors import TargetError
from onebase.ops.keyed import keep_mask


@dataclass(frozen=True, eq=False)
class TiedPair:
    """An embedding's pair, A (r, vocabulary) and B (width, r), as the head reads it: y + s A^T B^T x."""

    path: str
    embedding: EmbeddingPart

    @property
    def dropout(self) -> float:
        """The pair's dropout, on what the head gets."""
        return self.embedding.dropout

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the embedding's own tensors, under its names."""
        yield from self.embedding.parameters()

    def constants(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the same numbers under the names of the head, where PEFT's file has them again."""
        yield f"{self.path}.lora_A.weight", self.embedding.B.detach().T
        yield f"{self.path}.lora_B.weight", self.embedding.A.detach().T

    def on_output(self, y: Tensor, call: RowCall) -> Tensor:
        """Return y with the pair's update added."""
        x = call.x.to(y.dtype)
        if call.row_keys is not None and self.dropout > 0:
            x = x * keep_mask(call.row_keys, x.shape[1], self.dropout) / (1 - self.dropout)
        pair = self.embedding
        return y + pair.scaling * ((x @ pair.B.to(y.dtype)) @ pair.A.to(y.dtype))

    @torch.no_grad()
    def merge_(self, module: nn.Module) -> None:
        """Add the pair to the weight of a copy of the head."""
        A, B = self.embedding.factors()
        add_product_(module, self.path, B.T, A.T, self.embedding.scaling)


def with_tied_pairs(places: Places, parts: Sequence[Part], dora: bool) -> list[Part]:
    """Return the parts with those of modules tied to an adapted embedding replaced by the embedding's own pair.

    Raises:
        TargetError: the head is adapted and the embedding is not, or there is DoRA on them.
    """
    tied = places.tied_with_embedding
    pairs = [part for part in parts if part.path in tied]
    if not pairs:
        return list(parts)
    source = next((part for part in pairs if isinstance(part, EmbeddingPart)), None)
    if source is None:
        raise TargetError(
            f"adapter.ensure_weight_tying: {pairs[0].path} shares its weight with {tied[0]}, which is no target. Add "
            f"{tied[0]} to adapter.target_modules, or remove ensure_weight_tying."
        )
    if embeddings := [path for path in tied if path != source.path and places.kind(path) == "embedding"]:
        raise TargetError(
            f"adapter.ensure_weight_tying: {source.path} shares its weight with other embeddings ({', '.join(embeddings)}), "
            "and pairs are tied to output heads alone. Name these in adapter.target_modules, without ensure_weight_tying."
        )
    if dora:
        raise TargetError(
            f"adapter.use_dora: {source.path} and {', '.join(p for p in tied if p != source.path)} would need magnitudes of "
            "their own, so they cannot be tied. Remove use_dora or ensure_weight_tying."
        )
    others = [TiedPair(path, source) for path in tied if path != source.path]
    return [*(part for part in parts if part is source or part.path not in tied), *others]
