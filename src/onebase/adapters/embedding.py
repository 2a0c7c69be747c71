"""LoRA on embeddings: token i gets s * B a_i more, a_i the i-th column of A.

    y_i = e * (w_i + s * B a_i),  A: (r, vocabulary), zero at first;  B: (dimensions, r), normal;  e: the base's own scale

Names and start are PEFT's, as is e (Gemma multiplies by the root of the width). A row's input is its one id, so dropout
drops a token's whole update, keyed by row; PEFT drops nothing here. Cost: a gather of r numbers and r * dimensions
multiply-adds a token; the gradient of A is as large as A. Source: PEFT, tuners/lora/layer.py Embedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from onebase.adapters.dense import add_product_
from onebase.adapters.pair import PairPlan
from onebase.adapters.part import RowCall
from onebase.errors import TargetError
from onebase.ops.keyed import keep_mask


@dataclass(frozen=True, eq=False)
class EmbeddingPart:
    """One adapter's pair on one embedding: A is (r, vocabulary), B is (dimensions, r), both fp32."""

    path: str
    A: nn.Parameter
    B: nn.Parameter
    lora_alpha: float
    scaling: float
    dropout: float

    @property
    def r(self) -> int:
        """The rank of the pair."""
        return int(self.A.shape[0])

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the tensors under PEFT's names, which have no ".weight"."""
        yield f"{self.path}.lora_embedding_A", self.A
        yield f"{self.path}.lora_embedding_B", self.B

    def factors(self) -> tuple[Tensor, Tensor]:
        """Return A as (r, vocabulary) and B as (dimensions, r)."""
        return self.A.detach(), self.B.detach()

    def on_output(self, y: Tensor, call: RowCall) -> Tensor:
        """Return y with the tokens' updates added."""
        module: Any = call.module
        h = F.embedding(call.x, self.A.T, padding_idx=module.padding_idx).to(y.dtype)
        if call.row_keys is not None and self.dropout > 0:
            h = h * keep_mask(call.row_keys, 1, self.dropout) / (1 - self.dropout)
        return y + (h @ self.B.T.to(y.dtype)) * (self.scaling * float(getattr(module, "embed_scale", 1.0)))

    def merge_(self, module: nn.Module) -> None:
        """Add every token's update to a copy of its embedding, in fp32 at least."""
        add_product_(module, self.path, *self.factors(), self.scaling)


def make_embedding(plan: PairPlan, module: nn.Embedding) -> EmbeddingPart:
    """Return a new pair for an embedding; with `init` False both are normal, which changes the base from the start.

    Raises:
        TargetError: the embedding shortens its own vectors (max_norm).
    """
    if module.max_norm is not None:
        raise TargetError(
            f"adapter.target_modules: {plan.path} has max_norm {module.max_norm:g}, so it writes to its own weight when it is "
            "called. Leave it out: adapter.exclude_modules."
        )
    draws = plan.generator()
    A, B = torch.zeros(plan.r, module.num_embeddings), torch.randn(module.embedding_dim, plan.r, generator=draws)
    if plan.init is False:
        A.normal_(generator=draws)
    device = module.weight.device
    return EmbeddingPart(
        path=plan.path,
        A=nn.Parameter(A.to(device)),
        B=nn.Parameter(B.to(device)),
        lora_alpha=plan.lora_alpha,
        scaling=plan.scaling,
        dropout=plan.dropout,
    )
