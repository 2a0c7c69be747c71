"""Memory runs out before the first step, or never: the largest micro-batch is estimated, cut to fit, and tried.

On a CPU there is no out-of-memory error to catch, the system ends the process. So a small micro-batch is run first and
the bytes that its forward keeps for the backward are counted; the largest one must fit what is available by that
count before it is tried.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from onebase.adapters.bank import Bank
from onebase.base import memory
from onebase.data.batches import FlatBatch, Front, flatten
from onebase.data.examples import Examples
from onebase.errors import CapacityError
from onebase.measure.forward import batches_of, forward_loss

AUTO_TOKENS = {"cpu": 1024, "mps": 2048, "cuda": 16384}
_PROBE_TOKENS = 64
_BESIDE_WEIGHTS = 20  # bytes a trained number: its gradient, AdamW's two, its first value, its best one
_RECOMPUTE = "train.activation_checkpointing: true"
_RESERVE = 1.2  # allocator slack, and what the backward needs besides: measured 1.05 to 1.15


def fit_budget(
    bank: Bank, name: str, examples: Examples, batch_size: int, wanted: int | str, *, recompute: bool = False
) -> int:
    """Return the tokens of a micro-batch: `wanted`, or as many as the device is fast at and memory holds for "auto".

    The largest micro-batch there can be is run forward and backward before this returns; gradients are cleared.
    `recompute` says that activations will be checkpointed.

    Raises:
        CapacityError: it does not fit; the message says what would.
    """
    automatic = wanted == "auto"
    budget = AUTO_TOKENS.get(bank.base.device.type, AUTO_TOKENS["cpu"]) if automatic else int(wanted)
    lengths = examples.lengths + len(bank.virtual_ids(name))
    longest = int(lengths.max())
    if bank.base.device.type == "cpu":
        per_token = _RESERVE * kept_bytes_per_token(bank, name, examples, recompute=recompute)
        free = memory.available_bytes() - _BESIDE_WEIGHTS * bank.adapters[name].parameter_count
        if free <= 0:
            raise CapacityError(
                f"gradients, optimiser state and copies of adapter {name!r} need "
                f"{_BESIDE_WEIGHTS * bank.adapters[name].parameter_count / 1e9:.1f} GB, "
                f"{memory.available_bytes() / 1e9:.1f} GB are free. Set a smaller adapter.r, or end other programs."
            )
        fits = int(free / per_token)
        needed = max(min(budget, int(np.sort(lengths)[-batch_size:].sum())), longest)
        if needed > fits and (not automatic or longest > fits):
            raise CapacityError(_too_little(needed, longest, fits, per_token, recompute))
        budget = min(budget, fits)
    while True:
        try:
            with bank.base.activation_checkpointing(recompute):
                _try_largest(bank, name, examples, batch_size, budget)
            return budget
        except torch.OutOfMemoryError as error:
            _clear_gradients(bank, name)
            if not automatic or budget <= longest:
                raise CapacityError(
                    f"a micro-batch of {max(budget, longest)} tokens does not fit the memory of {bank.base.device}. Set "
                    f"{'' if recompute else _RECOMPUTE + ', '}a smaller data.max_length, or dtype: bfloat16."
                ) from error
            budget = max(budget // 2, 1)


def _too_little(needed: int, longest: int, fits: int, per_token: float, recompute: bool) -> str:
    advice = (
        f"train.micro_batch_tokens: {fits}"
        if longest <= fits
        else f"data.max_length: {fits}"
        if fits >= _PROBE_TOKENS
        else "a smaller model"
    )
    return (
        f"a micro-batch of {needed} tokens needs about {needed * per_token / 1e9:.1f} GB beside the base; "
        f"{fits * per_token / 1e9:.1f} GB are free, enough for {fits} tokens. Set {advice}"
        f"{'' if recompute else f', or {_RECOMPUTE}'}, or end other programs."
    )


def kept_bytes_per_token(bank: Bank, name: str, examples: Examples, *, recompute: bool = False) -> float:
    """Return the bytes that a forward keeps for its backward, a token, counted on a few short examples.

    With `recompute` that is what the blocks' inputs and the head keep, and the activations of one block at a time.
    """
    whole = _counted_bytes_per_token(bank, name, examples)
    if not recompute:
        return whole
    with bank.base.activation_checkpointing():
        outside = _counted_bytes_per_token(bank, name, examples)
    blocks = getattr(bank.base.model.config.get_text_config(), "num_hidden_layers", 1)
    return outside + (whole - outside) / blocks


def _counted_bytes_per_token(bank: Bank, name: str, examples: Examples) -> float:
    order = np.argsort(examples.lengths, kind="stable")
    virtual = bank.virtual_ids(name)
    few = order[: 1 + int(np.searchsorted(np.cumsum(examples.lengths[order] + len(virtual)), _PROBE_TOKENS))].tolist()
    # nothing shared: what examples with a common prefix keep is never more
    batch = flatten([examples[n] for n in few], few, name, Front(virtual))
    seen: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in bank.base.model.parameters()}

    def count(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        tokens = _forward_and_backward(bank, name, batch)
    return sum(seen.values()) / tokens


def _try_largest(bank: Bank, name: str, examples: Examples, batch_size: int, budget: int) -> None:
    order = np.argsort(-examples.lengths, kind="stable").tolist()[:batch_size]
    _forward_and_backward(bank, name, next(batches_of(bank, name, examples, order, budget)))


def _forward_and_backward(bank: Bank, name: str, batch: FlatBatch) -> int:
    """Run a batch forward and backward, clear the gradients and return the number of tokens that were computed."""
    total, _ = forward_loss(bank, batch, 1 / batch.label_count, dropout_step=0)
    total.backward()  # type: ignore[no-untyped-call]
    _clear_gradients(bank, name)
    return batch.layout.token_count


def _clear_gradients(bank: Bank, name: str) -> None:
    for _, parameter in bank.adapters[name].parameters():
        parameter.grad = None
