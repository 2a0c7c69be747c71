"""Flat attention equals its reference, and the reference equals dense attention over each example alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.ops import attention
from onebase.ops.attention import AttentionRule
from onebase.ops.layout import NO_PARENT, Layout, Node
from tests.ops.test_layout import layouts, line_of

flat_attention: Any = attention.flat_attention
reference: Any = attention.reference
EXACT: dict[str, Any] = {"rtol": 1e-9, "atol": 1e-11}


def qkv(layout, heads, kv_heads, dim=4, dim_v=3, dtype=torch.float64, seed=0) -> Any:
    draws = torch.Generator().manual_seed(seed)
    shapes = ((heads, dim), (kv_heads, dim), (kv_heads, dim_v))
    return [
        torch.randn(h, layout.token_count, d, generator=draws, dtype=dtype).mul_(1.5).requires_grad_()
        for h, d in shapes
    ]


@st.composite
def rules(draw):
    causal = draw(st.booleans())
    return AttentionRule(
        causal,
        scale=draw(st.sampled_from([None, 0.3])),
        window=draw(st.sampled_from([None, 1, 5, 16, 33])),
        soft_cap=draw(st.sampled_from([None, 2.0])),
    )


@settings(max_examples=120)
@given(layouts(), rules(), st.sampled_from([(1, 1), (4, 2), (2, 2), (4, 1)]))
def test_outputs_and_gradients_equal_the_reference(layout, rule, heads):
    parts = qkv(layout, *heads)
    ours, meant = flat_attention(*parts, layout, rule), reference(*parts, layout, rule)
    torch.testing.assert_close(ours, meant, **EXACT)
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found, expected = (torch.autograd.grad((out * weight).sum(), parts) for out in (ours, meant))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, **EXACT)


@settings(max_examples=60)
@given(layouts(), st.lists(rules(), min_size=2, max_size=4))
def test_layers_that_share_a_layout_and_its_masks_equal_layers_that_share_nothing(layout, rules):
    parts = qkv(layout, 4, 2)
    for rule in [*rules, *rules]:
        alone = flat_attention(*parts, Layout(layout.nodes), rule)
        assert torch.equal(flat_attention(*parts, layout, rule), alone)


@settings(max_examples=40)
@given(layouts(most_nodes=5), rules())
def test_the_reference_is_dense_attention_over_each_line_alone(layout, rule):
    """Written out for one example at a time, query by query."""
    query, key, value = (part.detach() for part in qkv(layout, 2, 1))
    found = reference(query, key, value, layout, rule)
    scale = 4**-0.5 if rule.scale is None else rule.scale
    for index, node in enumerate(layout.nodes):
        line = line_of(layout, index)
        for place in range(len(line) - node.length, len(line)):
            seen = [
                other
                for other in range(len(line))
                if not (rule.causal and other > place) and not (rule.window and abs(place - other) >= rule.window)
            ]
            rows = [line[other] for other in seen]
            for head in range(2):
                scores = key[0, rows] @ query[head, line[place]] * scale
                if rule.soft_cap:
                    scores = rule.soft_cap * (scores / rule.soft_cap).tanh()
                torch.testing.assert_close(found[line[place], head], scores.softmax(0) @ value[0, rows], **EXACT)


@settings(max_examples=40)
@given(layouts(), layouts(), rules())
def test_an_example_attends_the_same_whoever_its_neighbours_are(one, other, rule):
    moved = [Node(n.length, n.owner, n.example, n.parent + len(one.nodes) * (n.parent >= 0)) for n in other.nodes]
    both = Layout([*one.nodes, *moved])
    parts = [p.detach() for p in qkv(both, 4, 2)]
    together = flat_attention(*parts, both, rule)
    count = one.token_count
    torch.testing.assert_close(together[:count], flat_attention(*(p[:, :count] for p in parts), one, rule), **EXACT)
    torch.testing.assert_close(together[count:], flat_attention(*(p[:, count:] for p in parts), other, rule), **EXACT)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_a_nan_of_one_example_leaves_every_other_byte_identical(causal, window, soft_cap):
    layout = Layout([Node(5), Node(3, parent=0), Node(7, parent=0), Node(6), Node(2, parent=3), Node(9), Node(20)])
    spoiled = {*range(5), *range(5, 8), *range(8, 15)}  # the first tree
    rest = [row for row in range(layout.token_count) if row not in spoiled]
    rule = AttentionRule(causal, window=window, soft_cap=soft_cap)

    def run(poisoned):
        parts = qkv(layout, 4, 2, dtype=torch.float32)
        if poisoned:
            for part in parts:
                part.data[:, [1, 6, 9]] = float("nan")
        out = flat_attention(*parts, layout, rule)
        grads = torch.autograd.grad(out[rest].sin().sum(), parts)
        return [out[rest], *(grad[:, rest] for grad in grads)], out[sorted(spoiled)]

    (clean, _), (dirty, first) = run(False), run(True)
    assert all(torch.equal(one, other) for one, other in zip(clean, dirty, strict=True))
    assert first.isnan().any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_coarser_numbers_are_as_close_as_their_rounding(dtype):
    layout = Layout([Node(30), Node(17, parent=0), Node(3)])
    for soft_cap in (None, 2.0):
        rule = AttentionRule(True, soft_cap=soft_cap)
        parts = qkv(layout, 4, 2)
        ours = flat_attention(*(p.to(dtype) for p in parts), layout, rule)
        assert ours.dtype == dtype
        meant = reference(*(p.to(dtype).double() for p in parts), layout, rule)
        torch.testing.assert_close(ours.double(), meant, rtol=0, atol=16 * torch.finfo(dtype).eps)


def test_a_single_token_sees_itself():
    layout = Layout([Node(1, parent=NO_PARENT)])
    query, key, value = (p.detach() for p in qkv(layout, 2, 2))
    out = flat_attention(query, key, value, layout, AttentionRule(True))
    torch.testing.assert_close(out, value.transpose(0, 1), **EXACT)


@settings(max_examples=40)
@given(layouts(most_nodes=4), rules(), st.sampled_from([(4, 2), (2, 2)]))
def test_attention_with_a_mask_of_its_own_equals_the_reference_and_padding_holds_no_nan(layout, rule, heads):
    """The tree as one mask over the flat row, beside an entry of nothing but padding."""
    query, key, value = (part.detach() for part in qkv(layout, *heads))
    mask = torch.zeros(2, 1, layout.token_count, layout.token_count, dtype=torch.bool)
    for index, node in enumerate(layout.nodes):
        start, line = layout.starts[index], line_of(layout, index)
        for place in range(node.length):
            here = len(line) - node.length + place
            for there, row in enumerate(line):
                before = here - there
                near = rule.window is None or (before < rule.window and (rule.causal or before > -rule.window))
                mask[0, 0, start + place, row] = near and (before >= 0 or not rule.causal)
    twice = [torch.stack([part, part]) for part in (query, key, value)]
    masked_attention: Any = attention.masked_attention
    out = masked_attention(*twice, mask, rule)
    torch.testing.assert_close(out[0], reference(query, key, value, layout, rule), **EXACT)
    assert bool(out.isfinite().all())


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_without_a_mask_several_queries_are_causal_and_a_single_one_sees_everything(soft_cap):
    layout = Layout([Node(7)])
    query, key, value = (part.detach() for part in qkv(layout, 4, 2))
    rule = AttentionRule(True, soft_cap=soft_cap)
    expected = reference(query, key, value, layout, rule)
    whole = attention.masked_attention(query[None], key[None], value[None], None, rule)
    last = attention.masked_attention(query[None, :, -1:], key[None], value[None], None, rule)
    torch.testing.assert_close(whole[0], expected, **EXACT)
    torch.testing.assert_close(last[0], expected[-1:], **EXACT)


@pytest.mark.parametrize("soft_cap", [None, 2.0])
def test_dropout_takes_attention_weights_and_scales_what_is_left(soft_cap):
    """With values that are one-hot the output is the weights themselves: each is 0, or twice what it was."""
    query, key = torch.randn(2, 1, 2, 6, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = torch.eye(6, dtype=torch.float64).expand(1, 2, 6, 6)
    rule = AttentionRule(False, soft_cap=soft_cap)
    weights = attention.masked_attention(query, key, value, None, rule)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        found = attention.masked_attention(query, key, value, None, rule, 0.5)
    kept = found != 0
    assert 0 < int(kept.sum()) < kept.numel()
    torch.testing.assert_close(found[kept], 2 * weights[kept], **EXACT)
