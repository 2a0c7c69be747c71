"""What a layer's attention asks for is honoured or refused, never ignored."""

from typing import Any

import pytest
import torch
from torch import nn

from onebase.base.flat import NotFlatError, flat_attention_of
from onebase.base.route import Route, Slot
from onebase.ops import attention
from onebase.ops.attention import AttentionRule
from onebase.ops.layout import Layout, Node

reference: Any = attention.reference
LAYOUT = Layout([Node(5), Node(12), Node(4, parent=1)])


def attend(layout=LAYOUT, *, causal_module=True, batch=1, tokens=None, attention_mask=None, **arguments) -> Any:
    slot, module = Slot(), nn.Module()
    if causal_module is not None:
        module.is_causal = causal_module
    count = tokens or layout.token_count
    draws = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(batch, heads, count, 4, generator=draws) for heads in (4, 2, 2))
    with slot.use(Route(layout=layout, batch_owners=(0,)) if layout else None):
        out, weights = flat_attention_of(slot)(module, query, key, value, attention_mask, **arguments)
    assert weights is None
    return out, (query[0], key[0], value[0])


@pytest.mark.parametrize(
    ("arguments", "rule"),
    [
        ({}, AttentionRule(True)),
        ({"scaling": 0.3}, AttentionRule(True, scale=0.3)),
        ({"sliding_window": 3}, AttentionRule(True, window=3)),
        ({"softcap": 1.5}, AttentionRule(True, soft_cap=1.5)),
        ({"is_causal": False}, AttentionRule(False)),
        ({"causal_module": False}, AttentionRule(False)),
        ({"causal_module": False, "is_causal": True}, AttentionRule(True)),
        ({"causal_module": None}, AttentionRule(True)),
        ({"use_cache": False, "position_ids": torch.zeros(1), "s_aux": None}, AttentionRule(True)),
    ],
    ids=str,
)
def test_what_the_layer_says_of_itself_is_the_rule(arguments, rule):
    out, parts = attend(**arguments)
    torch.testing.assert_close(out[0], reference(*parts, LAYOUT, rule), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"s_aux": torch.zeros(4)}, "s_aux"),
        ({"head_mask": torch.ones(4), "alibi": 1}, "alibi, head_mask"),
        ({"attention_mask": torch.zeros(1, 1, 21, 21)}, "a mask"),
        ({"dropout": 0.1}, "drops"),
        ({"batch": 2}, "several rows"),
        ({"tokens": 20}, "21 tokens"),
        ({"layout": None, "tokens": 20}, "without a layout"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_flat_does_not_offer_is_refused_by_name(arguments, word):
    with pytest.raises(NotFlatError, match=word):
        attend(**arguments)
