"""Virtual tokens (prompt and prefix tuning) before the sequences of a call that was written for PEFT.

Both methods take placeholders at the input (adapters/prompt.py, prefix.py). A call has none: here they are put before
every sequence as embeddings, and the mask is lengthened. What comes back is what PEFT returns: with a prompt, logits of
the virtual tokens too, and labels are lengthened; with a prefix the trunk alone sees them, and what is behind it (a
pooler, a head, the loss) the sequence.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from onebase.adapters.bank import Bank
from onebase.config.methods import PrefixTuning
from onebase.errors import ConfigError
from onebase.peft.config import TaskType

_IGNORED = -100


def forward(bank: Bank, name: str, task: str | None, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """Return what the model makes of a call with an adapter's virtual tokens before every sequence."""
    count = bank.adapters[name].virtual_tokens
    with bank.base.native(bank.sole_route(name)) as model:
        if isinstance(bank.adapters[name].settings, PrefixTuning):
            with _before_trunk(bank, name, model):
                return model(*args, **named)
        given = _given(model, args, named)
        call = _lengthened(bank, name, model, given)
        if (types := given.get("token_type_ids")) is not None and task in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
            call["token_type_ids"] = _before(types, count, 0)
        if (labels := given.get("labels")) is not None and task != TaskType.SEQ_CLS:
            call["labels"] = _before(labels, count, _IGNORED)
        return model(**call)


def generate(bank: Bank, name: str, args: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
    """Return what the model's `generate` returns, with an adapter's virtual tokens before every sequence."""
    given = dict(named)
    ids = args[0] if args else given.pop("inputs", given.get("input_ids"))
    if len(args) > 1 or not isinstance(ids, Tensor):
        raise ConfigError("generate: give input_ids, and everything else by name.")
    given["input_ids"] = ids
    with bank.base.native(bank.sole_route(name)) as model:
        if given.get("attention_mask") is None:
            given["attention_mask"] = torch.ones_like(ids)
        return model.generate(**_lengthened(bank, name, model, given), input_ids=ids)


@contextmanager
def _before_trunk(bank: Bank, name: str, model: Any) -> Iterator[None]:
    """Let a model's trunk be called with an adapter's virtual tokens, and return its rows without theirs."""
    trunk, count = model.base_model, bank.adapters[name].virtual_tokens

    def enter(_: Any, args: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[()], dict[str, Any]]:
        given = _given(trunk, args, named)
        call = _lengthened(bank, name, model, given)
        if (types := given.get("token_type_ids")) is not None:
            call["token_type_ids"] = _before(types, count, 0)
        return (), call

    def leave(_: Any, __: tuple[Any, ...], out: Any) -> Any:
        if not hasattr(out, "last_hidden_state"):
            raise ConfigError("return_dict: prefix tuning needs a model's named outputs. Leave it out.")
        out.last_hidden_state = out.last_hidden_state[:, count:]
        if getattr(out, "pooler_output", None) is not None:
            out.pooler_output = trunk.pooler(out.last_hidden_state)
        if getattr(out, "hidden_states", None) is not None:
            out.hidden_states = tuple(hidden[:, count:] for hidden in out.hidden_states)
        return out

    hooks = [trunk.register_forward_pre_hook(enter, with_kwargs=True), trunk.register_forward_hook(leave)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _given(module: Any, args: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments by name."""
    bound = inspect.signature(module.forward).bind_partial(*args, **named)
    given = {**bound.arguments.pop("kwargs", {}), **bound.arguments}
    if given.get("past_key_values") is not None:
        raise ConfigError("past_key_values: a call cannot go on from another with virtual tokens. Use generate.")
    return given


def _lengthened(bank: Bank, name: str, model: Any, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call's arguments with virtual tokens, and embeddings in place of ids."""
    count = bank.adapters[name].virtual_tokens
    call = {key: value for key, value in given.items() if key not in ("input_ids", "inputs_embeds")}
    call.pop("token_type_ids", None)  # as PEFT does, which says so
    if call.pop("position_ids", None) is not None:
        warnings.warn("position_ids has no effect with virtual tokens", stacklevel=4)
    embed = model.get_input_embeddings()
    own = given.get("inputs_embeds")
    if own is None:
        own = embed(given["input_ids"])
    learned = embed(torch.tensor(bank.virtual_ids(name), device=own.device).expand(own.shape[0], -1))
    call["inputs_embeds"] = torch.cat([learned.to(own.dtype), own], 1)
    if call.get("attention_mask") is not None:
        call["attention_mask"] = _before(call["attention_mask"], count, 1)
    return call


def _before(rows: Tensor, count: int, value: int) -> Tensor:
    """Return rows with `count` times a value before each."""
    return torch.cat([rows.new_full((rows.shape[0], count), value), rows], 1)
