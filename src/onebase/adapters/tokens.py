"""Single rows of an embedding that an adapter trains: new or rare tokens (`trainable_token_indices`), and tied heads.

A part holds the rows themselves, as PEFT stores them, and stands in for the base's rows of those ids; a fresh one
changes no bit. Trained: ids * width numbers. Where the head reads the same weight, the logits of those ids get
(rows - frozen rows) . h added, with the same tensor, so that both uses learn as one; only the embedding's is saved.
An id that is the embedding's padding is trained like any other, since a flat batch has no padding.

Source: PEFT, tuners/trainable_tokens and utils.other.set_additional_trainable_modules, for names and what is tied.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from onebase.adapters.matching import LINEAR_KINDS, Reach, lies_in
from onebase.adapters.part import Part, RowCall
from onebase.adapters.places import Places, bare_copy
from onebase.config.methods import Lora
from onebase.errors import TargetError

REACH = Reach("trainable_token_indices", "embeddings and linear layers", LINEAR_KINDS | {"embedding"})
_NAME = "token_adapter.trainable_tokens_delta"


@dataclass(frozen=True, eq=False)
class EmbeddingRows:
    """One adapter's rows of one embedding, in the order of their ids. `twin` is the embedding with them for a weight."""

    path: str
    key: str
    ids: tuple[int, ...]
    rows: nn.Parameter
    twin: nn.Module
    order: Tensor  # the places of the ids, from the smallest id to the largest
    ordered: Tensor  # the ids in that order

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the rows under PEFT's name."""
        yield self.key, self.rows

    def on_output(self, y: Tensor, call: RowCall) -> Tensor:
        """Return y with the vectors of the trained ids in their places."""
        found = torch.searchsorted(self.ordered, call.x).clamp_(max=len(self.ids) - 1)
        hit = self.ordered[found] == call.x
        own = functional_call(self.twin, {"weight": self.rows}, (self.order[found],))
        return torch.where(hit[..., None], own.to(y.dtype), y)

    @torch.no_grad()
    def merge_(self, module: Any) -> None:
        """Write the rows over the module's own."""
        module.weight[list(self.ids)] = self.rows.to(module.weight)


@dataclass(frozen=True, eq=False)
class HeadRows:
    """The same rows, or one's own, where a linear layer reads them: the outputs of those ids."""

    path: str
    key: str
    ids: tuple[int, ...]
    rows: nn.Parameter
    frozen: Tensor

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the rows under PEFT's name; tied ones bear the embedding's."""
        yield self.key, self.rows

    def on_output(self, y: Tensor, call: RowCall) -> Tensor:
        """Return y + (rows - frozen rows) . x at the trained ids."""
        index = torch.tensor(self.ids, device=y.device)
        change = (self.rows - self.frozen[index]).to(y.dtype)
        return y.index_add(1, index, F.linear(call.x.to(y.dtype), change))

    @torch.no_grad()
    def merge_(self, module: Any) -> None:
        """Write the rows over the module's own."""
        module.weight[list(self.ids)] = self.rows.to(module.weight)


def beside(places: Places, settings: Lora, taken: Sequence[str]) -> tuple[tuple[Part, ...], tuple[str, ...]]:
    """Return the parts that `trainable_token_indices` asks for, and what is to be said.

    Args:
        taken: the paths that the adapter trains in another way.

    Raises:
        TargetError: a name that matches nothing, an id that is not there or comes twice, tied modules that differ, or a
            module that is trained in another way too.
    """
    asked = _asked(places, settings)
    if both := [path for path in asked if any(lies_in(path, other) for other in taken)]:
        raise TargetError(
            f"adapter.trainable_token_indices: {both[0]} is in target_modules or modules_to_save too. Remove it from one."
        )
    tied = places.tied_with_embedding
    named = [path for path in tied if path in asked]
    alike = len({tuple(asked[path]) for path in named}) < 2
    if not alike and settings.ensure_weight_tying:
        raise TargetError(
            f"adapter.trainable_token_indices: {' and '.join(named)} share one weight, so with ensure_weight_tying they "
            "need the same ids. Give them the same, or remove ensure_weight_tying."
        )
    parts: list[Part] = []
    source = tied[0] if tied else None
    for path, ids in asked.items():
        if path in tied[1:] and source in asked and alike:
            continue  # it follows its embedding
        rows = _rows(places, path, ids)
        parts.append(_part(places, path, path, ids, rows))
        if path == source and alike:
            parts += [_part(places, other, path, ids, rows) for other in tied[1:]]
    return tuple(parts), _apart(tied, asked, alike, settings)


def _apart(tied: list[str], asked: Mapping[str, Sequence[int]], alike: bool, settings: Lora) -> tuple[str, ...]:
    """Return what a user should know about modules that could be tied and are not."""
    if tied and (not alike or (tied[0] not in asked and set(tied) & set(asked))):
        return (f"{' and '.join(tied)} share one weight in the base; their trained rows are apart",)
    return ()


def _asked(places: Places, settings: Lora) -> dict[str, list[int]]:
    """Return the ids by module path, checked."""
    given = settings.trainable_token_indices
    if isinstance(given, list):
        source = places.embedding_path
        if source is None:
            raise TargetError(
                f"adapter.trainable_token_indices: {places.base.name} embeds no tokens. Name the module: {{name: [ids]}}"
            )
        given = {source: given}
    asked: dict[str, list[int]] = {}
    for name, ids in (given or {}).items():
        for path in places.choose_named([name], "trainable_token_indices", REACH):
            count = places.module(path).weight.shape[0]
            if beyond := [i for i in ids if i >= count]:
                raise TargetError(
                    f"adapter.trainable_token_indices: {path} has {count} rows, 0 to {count - 1}, got {beyond[0]}. "
                    "Enlarge the model's embedding first, or remove the id."
                )
            if len(set(ids)) < len(ids):
                raise TargetError(f"adapter.trainable_token_indices: an id of {path} comes twice. Write each once.")
            if path in asked:
                raise TargetError(
                    f"adapter.trainable_token_indices: {path} is named twice, the second time by {name!r}. Name it once, "
                    "with all its ids."
                )
            asked[path] = ids
    return asked


def _rows(places: Places, path: str, ids: Sequence[int]) -> nn.Parameter:
    weight = places.module(path).weight.detach()
    return nn.Parameter(weight[list(ids)].to(torch.promote_types(weight.dtype, torch.float32), copy=True))


def _part(places: Places, path: str, source: str, ids: Sequence[int], rows: nn.Parameter) -> Part:
    """Return a module's part for rows that are saved under the path `source`."""
    module, key = places.module(path), f"{source}.{_NAME}"
    if not isinstance(module, nn.Embedding):
        return HeadRows(path, key, tuple(ids), rows, module.weight.detach())
    twin: Any = bare_copy(module, {})
    twin.padding_idx = None
    order = torch.tensor(ids).argsort()
    device = rows.device
    return EmbeddingRows(path, key, tuple(ids), rows, twin, order.to(device), torch.tensor(ids)[order].to(device))
