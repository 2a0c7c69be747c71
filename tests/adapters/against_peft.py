"""An adapter of ours and one of PEFT's with the same tensors, on two copies of one tiny model: all that must be equal."""

import copy
import warnings
from functools import partial
from typing import Any

import peft
import torch
import torch.nn.functional as F

from onebase.adapters.bank import Bank
from onebase.measure.forward import forward_loss
from tests import tiny

PREFIX = "base_model.model."
# Of a gradient's largest number: in fp64 too models take softmax and rotary angles in fp32.
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-6}


def filled(bank: Bank, name: str, settings: Any, *, size: float = 0.3) -> Any:
    """Add an adapter of fp64 whose tensors are some way off their start."""
    adapter = bank.add(name, settings, seed=3)
    draws = torch.Generator().manual_seed(7)
    for _, parameter in adapter.parameters():
        noise = torch.randn(parameter.shape, generator=draws, dtype=torch.float64)
        parameter.data = parameter.data.double() + size * noise
    return adapter


def theirs_of(model: Any, config: Any, adapter: Any, **saving: Any) -> Any:
    """Return PEFT's model around `model` with the tensors of our adapter, after comparing names and shapes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
        own = peft.get_peft_model_state_dict(theirs, **saving)
        state = {PREFIX + name: tensor for name, tensor in adapter.state.items()}
        assert {k: tuple(v.shape) for k, v in own.items()} == {k: tuple(v.shape) for k, v in state.items()}
        peft.set_peft_model_state_dict(theirs, {name: tensor.clone() for name, tensor in state.items()})
    return theirs


def gradients_of(theirs: Any, **saving: Any) -> dict[str, torch.Tensor]:
    """Return PEFT's gradients under the names of its file."""
    values = {name: p.grad if p.grad is not None else torch.zeros_like(p) for name, p in theirs.named_parameters()}
    state = dict(theirs.state_dict())
    state.update({name: value for name, value in values.items() if name in state})
    found = peft.get_peft_model_state_dict(theirs, state_dict=state, **saving)
    return {name.removeprefix(PREFIX): tensor for name, tensor in found.items()}


def their_loss(model: Any, examples: Any) -> Any:
    """Return the mean loss of the labelled tokens, each example run alone."""
    losses, count = [], 0
    for example in examples:
        ids = torch.from_numpy(example.token_ids.astype("int64"))
        targets = torch.where(torch.from_numpy(example.labelled.copy()), ids, -100)[1:]
        logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        losses.append(F.cross_entropy(logits, targets, reduction="sum"))
        count += int((targets >= 0).sum())
    return torch.stack(losses).sum() / count


def assert_equal_to_peft(
    architecture: str, settings: Any, config: Any, *, merges: bool = True, saving: Any = None, **changes: Any
) -> tuple[Any, Any]:
    """Compare names, loss, gradients and merged weights with PEFT's; return the adapter and PEFT's model."""
    base = tiny.base_of(architecture, dtype=torch.float64, **changes)
    bank = Bank(base)
    filled(bank, "dummy", settings, size=0.7)
    adapter = filled(bank, "one", settings)
    model = tiny.model_of(architecture, dtype=torch.float64, **changes)
    theirs = theirs_of(model, config, adapter, **(saving or {}))
    examples = tiny.examples_of(9, 21, 4)
    batch = tiny.batch_of(examples, "one")
    loss, _ = forward_loss(bank, batch, 1 / batch.label_count)
    loss.backward()
    expected = their_loss(theirs, examples)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-8, atol=1e-10)
    without, _ = forward_loss(bank, tiny.batch_of(examples, None), 1 / batch.label_count)
    assert abs(without - loss) > 1e-4
    own, others = tiny.gradients(bank, "one"), gradients_of(theirs, **(saving or {}))
    assert own.keys() == others.keys()
    largest = max(gradient.abs().max() for gradient in others.values())
    for name, gradient in others.items():
        assert gradient.any(), name
        scale = max(gradient.abs().max(), 1e-6 * largest)  # the bias of keys without positions moves no softmax
        torch.testing.assert_close(own[name] / scale, gradient / scale, **CLOSE, msg=partial(_told, name))
    assert not any(g.any() for g in tiny.gradients(bank, "dummy").values())
    merged = theirs.merge_and_unload()
    if merges:
        assert_merges(bank, adapter, merged)
    return adapter, merged


def _told(name: str, message: str) -> str:
    return f"{name}: {message}"


def assert_merges(bank: Bank, adapter: Any, merged: Any) -> None:
    """The parts of each module, written into a copy of it in their order, give the weights of PEFT's merged model."""
    modules = dict(merged.named_modules())
    copies = {part.path: copy.deepcopy(bank.places.module(part.path)) for part in adapter.parts}
    for part in adapter.parts:
        part.merge_(copies[part.path])
    for path, module in copies.items():
        expected = dict(modules[path].named_parameters())
        for name, tensor in module.named_parameters():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-12)
