"""The wrapper adds each row's own update to what the frozen layer says, in whatever shape the rows come."""

from typing import Any

import pytest
import torch
from torch import nn

from onebase.adapters.bank import Bank
from onebase.adapters.layer import AdaptedLayer
from onebase.adapters.lora import make_linear, plan_of
from onebase.base.model import Base
from onebase.base.route import Route, RowSpace, Slot
from onebase.config.methods import LnTuning, Lora
from onebase.data.examples import Examples
from onebase.ops.keyed import keep_mask, mix, mix_rows, position_keys
from onebase.ops.segments import NO_OWNER, Segments
from tests import tiny


def adapted(*owners, path="blocks.0.proj", bias=True, dropout=0.0):
    linear = nn.Linear(5, 6, bias=bias).requires_grad_(False)
    layer = AdaptedLayer(linear, path, RowSpace.TOKEN, Slot())
    targets = {}
    for owner in owners:
        settings = Lora(r=2 + owner, init_lora_weights=False, lora_dropout=dropout)
        targets[owner] = make_linear(plan_of(settings, path, owner), linear)
        layer.put(owner, targets[owner])
    return layer, targets


def inputs(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def by_hand(layer, target, rows):
    return layer.base_layer(rows) + target.scaling * rows @ target.lora_A.T @ target.lora_B.T


def route_of(lengths, owners, **keys):
    return Route(rows={RowSpace.TOKEN: Segments.of(lengths, owners)}, **keys)


@pytest.mark.parametrize("shape", [(7, 5), (1, 7, 5), (7, 1, 5)])
def test_each_row_gets_its_owners_update_in_any_shape(shape):
    layer, targets = adapted(0, 2, 5)  # numbers with gaps, as after a removal
    x = inputs(*shape)
    with layer._slot.use(route_of([2, 1, 3, 1], [5, NO_OWNER, 0, 1])):
        out = layer(x)
    rows = x.reshape(7, 5)
    expected = torch.cat(
        [by_hand(layer, targets[5], rows[:2]), layer.base_layer(rows[2:3]), by_hand(layer, targets[0], rows[3:6]),
         layer.base_layer(rows[6:])]
    ).view(*shape[:-1], 6)  # fmt: skip
    assert out.shape == expected.shape
    torch.testing.assert_close(out, expected)


def test_without_a_route_it_is_the_frozen_layer():
    layer, _ = adapted(0)
    x = inputs(2, 3, 5)
    assert torch.equal(layer(x), layer.base_layer(x))


def test_taking_off_leaves_the_others_and_frees_the_number():
    layer, targets = adapted(0, 1)
    x = inputs(4, 5)
    layer.take_off(0)
    layer.take_off(7)
    assert not layer.is_bare
    with layer._slot.use(route_of([2, 2], [0, 1])):
        out = layer(x)
    torch.testing.assert_close(out, torch.cat([layer.base_layer(x[:2]), by_hand(layer, targets[1], x[2:])]))
    layer.take_off(1)
    assert layer.is_bare
    with layer._slot.use(route_of([4], [1])):
        assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("bias", [True, False])
def test_weight_and_bias_are_the_frozen_layers(bias):
    layer, _ = adapted(0, bias=bias)
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias


def test_pairs_are_no_parameters_of_the_model():
    layer, _ = adapted(0, 1)
    assert sorted(dict(layer.named_parameters())) == ["base_layer.bias", "base_layer.weight"]
    assert sorted(layer.state_dict()) == ["base_layer.bias", "base_layer.weight"]


def test_dropout_masks_the_updates_input_by_row_key_and_target():
    layer, targets = adapted(0, dropout=0.5)
    other, _ = adapted(0, path="blocks.1.proj", dropout=0.5)
    x, keys = inputs(30, 5), position_keys(mix(1, 2, 3), 0, 30)
    with layer._slot.use(route_of([30], [0], row_keys={RowSpace.TOKEN: keys})):
        out = layer(x)
    kept = keep_mask(mix_rows(keys, layer._key), 5, 0.5)
    seen = x * kept / 0.5
    target = targets[0]
    torch.testing.assert_close(
        out, layer.base_layer(x) + target.scaling * seen @ target.lora_A.T @ target.lora_B.T, rtol=1e-4, atol=1e-5
    )
    assert not torch.equal(kept, keep_mask(mix_rows(keys, other._key), 5, 0.5))


def test_the_input_keeps_its_bytes():
    layer, _ = adapted(0)
    x = inputs(4, 5)
    before = x.clone()
    with layer._slot.use(route_of([4], [0])):
        layer(x)
    assert torch.equal(x, before)


@pytest.mark.parametrize("heads_first", [False, True])
def test_rows_of_attention_heads_belong_to_their_tokens_owner_wherever_the_heads_are(heads_first):
    layer, targets = adapted(0, 1, dropout=0.5)
    layer.tokens_at = 2 if heads_first else 1
    keys = position_keys(mix("test"), 0, 4)
    x = inputs(4, 3, 5)  # tokens, heads
    laid = x.transpose(0, 1)[None] if heads_first else x[None]
    with layer._slot.use(route_of([1, 2, 1], [1, NO_OWNER, 0], row_keys={RowSpace.TOKEN: keys})):
        out = layer(laid)[0]
        with pytest.raises(RuntimeError, match="rows"):
            layer(inputs(11, 5))
    out = out.transpose(0, 1) if heads_first else out
    for token, owner in enumerate([1, None, None, 0]):
        expected = layer.base_layer(x[token])
        if owner is not None:
            kept = keep_mask(mix_rows(keys, layer._key)[token : token + 1], 5, 0.5) / 0.5
            target = targets[owner]
            expected = expected + target.scaling * (x[token] * kept) @ target.lora_A.T @ target.lora_B.T
        torch.testing.assert_close(out[token], expected)


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe", "gemma3", "heads first"])
def test_as_many_tokens_as_heads_are_told_apart_in_the_first_batch(name):
    model = tiny.model_of("qwen3" if name == "heads first" else name, num_attention_heads=4, num_key_value_heads=4)
    bank = Bank(Base(turned(model) if name == "heads first" else model))
    for seed, owner in enumerate(("one", "two")):
        tiny.fill_(bank.add(owner, LnTuning(target_modules=["q_norm", "k_norm"])), seed=seed)
    examples = tiny.examples_of(2, 2)
    both = hidden_of(bank, tiny.batch_of(examples, "one", "two"))
    for number, owner in enumerate(("one", "two")):
        alone = tiny.batch_of(Examples([examples[number]]), owner)
        rows = both[2 * number : 2 * number + 2]
        torch.testing.assert_close(rows, hidden_of(bank, alone), rtol=1e-4, atol=1e-4)
        bank.remove(owner)
        bank.add(owner, LnTuning(target_modules=["q_norm"]))  # fresh: the base's own
        assert not torch.allclose(rows, hidden_of(bank, alone), atol=1e-2)


def hidden_of(bank: Bank, batch: Any) -> torch.Tensor:
    return bank.base.hidden(batch.token_ids, bank.route(batch.layout))


class Turned(nn.Module):
    """A norm on heads that is given all tokens head by head."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.q_norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.q_norm(x.transpose(1, 2)).transpose(1, 2)


def turned(model: Any) -> Any:
    for layer in model.model.layers:
        layer.self_attn.q_norm = Turned(layer.self_attn.q_norm)
    return model


def test_an_input_of_which_the_tokens_place_is_not_known_is_refused():
    layer, _ = adapted(0, 1)
    with layer._slot.use(route_of([1, 2], [1, 0])), pytest.raises(RuntimeError, match=r"cannot tell 3 tokens from"):
        layer(inputs(1, 3, 3, 5))
