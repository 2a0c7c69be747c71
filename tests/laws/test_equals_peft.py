"""Flat batches of several adapters equal padded batches through transformers and PEFT: logits, loss and gradients."""

from functools import partial
from typing import Any

import peft
import pytest
import torch
import torch.nn.functional as F

from onebase.base.route import Route
from onebase.measure.forward import forward_loss
from onebase.ops.segments import Segments
from tests import tiny

SETTINGS: dict[str, Any] = {"r": 4, "lora_alpha": 8}
ADAPTABLE = sorted(tiny.ARCHITECTURES)
# Mixtral's own fused experts know no fp64; PEFT would adapt them.
_EAGER = {"experts_implementation": "eager"}
CHANGES: dict[str, dict[str, Any]] = {"mixtral": _EAGER, "qwen3-moe": _EAGER}
# In fp64 too models take norms, softmax or rotary angles in fp32.
TOLERANCE: dict[torch.dtype, dict[str, Any]] = {
    torch.float32: {"rtol": 1e-3, "atol": 2e-5},
    torch.float64: {"rtol": 1e-5, "atol": 2e-6},
}
# transformers' eager attention turns fp64 rows that see nothing into NaN: padding beyond a window.
NAN_WHEN_PADDED = {("gemma2", torch.float64)}


def peft_model_of(name, dtype, paths, state, **settings):
    """Return PEFT's model of the same base with an adapter of the same tensors."""
    model = tiny.model_of(name, dtype=dtype, **CHANGES.get(name, {}))
    config = peft.LoraConfig(target_modules=list(paths), **settings)
    theirs = peft.get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    own = dict(theirs.named_parameters())
    for key, tensor in state.items():
        parameter = own.pop("base_model.model." + key.removesuffix(".weight") + ".default.weight")
        parameter.data = tensor.detach().clone()
    assert not [key for key in own if "lora_" in key]
    return theirs


def padded(examples):
    """Return ids, mask and labels, padded on the right, as a collator gives them."""
    lines = [torch.from_numpy(example.token_ids.astype("int64")) for example in examples]
    marks = [torch.from_numpy(example.labelled.copy()) for example in examples]
    ids = torch.nn.utils.rnn.pad_sequence(lines, batch_first=True)
    mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(line) for line in lines], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(
        [torch.where(m, line, -100) for m, line in zip(marks, lines, strict=True)], batch_first=True, padding_value=-100
    )
    return ids, mask, labels


def peft_results(theirs, examples, one_by_one=False):
    """Return the logits of every real token, the mean loss of labelled ones, and the gradients of that."""
    found, losses = [], []
    for part in [[example] for example in examples] if one_by_one else [examples]:
        ids, mask, labels = padded(part)
        logits = theirs(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found.append(logits[mask.bool()].detach())
        losses.append(F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum"))
    loss = torch.stack(losses).sum() / sum(int(e.labelled.sum()) for e in examples)
    loss.backward()
    grads = {
        name.removeprefix("base_model.model.").replace(".default", ""): p.grad
        for name, p in theirs.named_parameters()
        if "lora_" in name
    }
    return torch.cat(found), loss.item(), grads


def _told(key: str, message: str) -> str:
    return f"{key}: {message}"


def assert_grads(found, expected, dtype):
    assert found.keys() == expected.keys()
    for key, gradient in expected.items():
        scale = float(gradient.abs().max())
        assert scale > 0, key
        bound = TOLERANCE[dtype]
        torch.testing.assert_close(
            found[key] / scale,
            gradient / scale,
            msg=partial(_told, key),
            **bound | {"atol": 10 * bound["atol"]},
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("name", ADAPTABLE)
def test_two_members_in_one_batch_equal_two_peft_models(name, dtype):
    base: Any = tiny.base_of(name, dtype=dtype, **CHANGES.get(name, {}))
    bank = tiny.bank_of(base, "one", "two", **SETTINGS)
    examples = tiny.examples_of(9, 21, 4, 16, 13)
    owners = ("one", "two", "one", "two", "one")
    batch = tiny.batch_of(examples, *owners)
    with torch.no_grad():
        hidden = base.hidden(batch.token_ids, bank.route(batch.layout))
        logits = base.head.logits(hidden, Segments.of([len(hidden)], [-1])).split(examples.lengths.tolist())
    mine = {owner: [e for e, o in zip(examples, owners, strict=True) if o == owner] for owner in ("one", "two")}
    loss, rows = forward_loss(bank, batch, 1.0)
    loss.backward()
    row_losses = rows.loss.split([n.labels for n in batch.layout.nodes])
    for owner, own in mine.items():
        adapter = bank.adapters[owner]
        theirs = peft_model_of(name, dtype, adapter.target_paths, adapter.state, **SETTINGS)
        their_logits, their_loss, their_grads = peft_results(theirs, own, (name, dtype) in NAN_WHEN_PADDED)
        found = torch.cat([piece for piece, o in zip(logits, owners, strict=True) if o == owner])
        torch.testing.assert_close(found, their_logits, **TOLERANCE[dtype])
        count = sum(int(e.labelled.sum()) for e in own)
        own_loss = sum(float(r.sum()) for r, o in zip(row_losses, owners, strict=True) if o == owner) / count
        assert own_loss == pytest.approx(their_loss, rel=TOLERANCE[dtype]["rtol"] / 10)
        grads = {key: gradient / count for key, gradient in tiny.gradients(bank, owner).items()}
        assert_grads(grads, their_grads, dtype)


@pytest.mark.parametrize("name", ["llama", "gemma3", "opt", "granite"])
def test_rslora_and_other_ranks_and_the_adapted_head_equal_peft(name):
    settings: dict[str, Any] = SETTINGS | {
        "use_rslora": True,
        "rank_pattern": {"q_proj": 2},
        "alpha_pattern": {"v_proj": 3},
    }
    base = tiny.base_of(name, dtype=torch.float64)
    bank = tiny.bank_of(base, "one", **settings, target_modules=["q_proj", "v_proj", "lm_head"])
    adapter = bank.adapters["one"]
    examples = tiny.examples_of(9, 21, 4)
    batch = tiny.batch_of(examples, "one")
    loss, _ = forward_loss(bank, batch, 1 / batch.label_count)
    loss.backward()
    theirs = peft_model_of(name, torch.float64, adapter.target_paths, adapter.state, **settings)
    _, their_loss, their_grads = peft_results(theirs, examples)
    assert loss.item() == pytest.approx(their_loss, rel=1e-6)
    assert_grads(tiny.gradients(bank, "one"), their_grads, torch.float64)


@pytest.mark.parametrize("name", sorted({*ADAPTABLE} - {"gemma2"}))
def test_padded_batches_through_the_native_model_equal_flat_ones(name):
    """The way of generation: a route of one owner, the model's own attention, a mask."""
    base: Any = tiny.base_of(name, dtype=torch.float64, **CHANGES.get(name, {}))
    bank = tiny.bank_of(base, "one", **SETTINGS)
    examples = tiny.examples_of(9, 21, 4)
    ids, mask, _ = padded(examples)
    batch = tiny.batch_of(examples, "one")
    with torch.no_grad():
        with base.native(bank.sole_route("one")) as model:
            own = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        hidden = base.hidden(batch.token_ids, bank.route(batch.layout))
        flat = base.head.logits(hidden, Segments.of([len(hidden)], [-1]))
    torch.testing.assert_close(flat, own, **TOLERANCE[torch.float64])


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt-neox", "bloom"])
def test_a_shared_prefix_gives_the_gradients_of_repeating_it(name):
    """Two members, each with a prefix of its own; the loss weighs hidden states, prefix tokens once an example."""
    from onebase.ops.layout import Layout, Node

    base = tiny.base_of(name, dtype=torch.float64)
    bank = tiny.bank_of(base, "one", "two", **SETTINGS)
    lengths = {"one": (14, [9, 17, 1]), "two": (6, [5, 16])}
    draws = torch.Generator().manual_seed(0)
    ids: list[torch.Tensor] = []
    flat_ids: list[torch.Tensor] = []
    nodes: list[Node] = []
    flat_nodes: list[Node] = []
    leaves: list[int] = []
    flat_leaves: list[int] = []
    for owner, (prefix, tails) in lengths.items():
        root, root_ids = len(nodes), torch.randint(3, 60, (prefix,), generator=draws)
        nodes.append(Node(prefix, owner))
        ids.append(root_ids)
        for tail in tails:
            tail_ids = torch.randint(3, 60, (tail,), generator=draws)
            leaves += range(sum(len(part) for part in ids), sum(len(part) for part in ids) + tail)
            nodes.append(Node(tail, owner, parent=root))
            ids.append(tail_ids)
            start = sum(len(part) for part in flat_ids) + prefix
            flat_leaves += range(start, start + tail)
            flat_nodes.append(Node(prefix + tail, owner))
            flat_ids.append(torch.cat([root_ids, tail_ids]))

    def run(ids, layout, rows):
        tiny.clear_gradients(bank)
        hidden = base.hidden(torch.cat(ids), bank.route(layout))[rows]
        weight = torch.linspace(-1, 1, hidden.numel(), dtype=torch.float64).view_as(hidden)
        (hidden * weight).sum().backward()
        return hidden, {owner: tiny.gradients(bank, owner) for owner in bank.adapters}

    shared, shared_grads = run(ids, Layout(nodes), leaves)
    repeated, repeated_grads = run(flat_ids, Layout(flat_nodes), flat_leaves)
    torch.testing.assert_close(shared, repeated, **TOLERANCE[torch.float64])
    for owner in lengths:
        assert_grads(shared_grads[owner], repeated_grads[owner], torch.float64)
    assert not any(g.any() for g in shared_grads["dummy"].values())


def test_a_sole_route_knows_no_layout_so_the_flat_attention_cannot_be_misused():
    assert tiny.bank_of(tiny.base_of(), "one").sole_route("one").layout is None
    assert Route(batch_owners=(0,)).layout is None
