"""attention.c is the reference to the rounding of fp32, and its bits depend on the example alone."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.base.kernels import use_kernels
from onebase.ops import attention, native
from onebase.ops.attention import AttentionRule
from onebase.ops.layout import Layout, Node
from tests.ops.test_layout import layouts, line_of

flat_attention: Any = attention.flat_attention
reference: Any = attention.reference
slot_attention: Any = attention.slot_attention
HEADS = st.sampled_from([(1, 1), (4, 2), (9, 3), (4, 1), (2, 2)])
SIZES = st.sampled_from([(64, 64), (8, 8), (16, 48), (20, 3), (1, 17), (136, 256)])
CAUSAL = AttentionRule(True)


@pytest.fixture(scope="module", autouse=True)
def compiled():
    why = use_kernels()
    if why:
        pytest.skip(why)


@st.composite
def rules(draw):
    window = draw(st.sampled_from([None, 1, 5, 16, 33, 70]))
    return AttentionRule(draw(st.booleans()), scale=draw(st.sampled_from([None, 0.3])), window=window)


def qkv(layout, heads=(4, 2), sizes=(16, 16), seed=0, size=1.5) -> Any:
    """Return queries, keys and values as a model's layers leave them: heads side by side in one token's numbers."""
    draws = torch.Generator().manual_seed(seed)
    shapes = ((heads[0], sizes[0]), (heads[1], sizes[0]), (heads[1], sizes[1]))
    joined = torch.randn(layout.token_count, sum(h * d for h, d in shapes), generator=draws).mul_(size)
    parts = joined.split([h * d for h, d in shapes], 1)
    return [
        part.view(-1, *shape).transpose(0, 1).detach().requires_grad_()
        for part, shape in zip(parts, shapes, strict=True)
    ]


def weight_of(shape, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(5)).to(dtype)


def results(parts, layout, rule, attend=flat_attention) -> list[Any]:
    """Return the output and the gradients of a random sum of it, all of them (tokens, heads, size)."""
    out = attend(*parts, layout, rule)
    grads = torch.autograd.grad((out * weight_of(out.shape, out.dtype)).sum(), parts)
    return [out.detach(), *(grad.transpose(0, 1) for grad in grads)]


def by_slots(query, key, value, layout, rule):
    return slot_attention(*(part.transpose(0, 1) for part in (query, key, value)), layout, rule)


def largest_term(parts, layout, rule) -> float:
    """Return a bound of the terms whose difference is a score's gradient, times what it is multiplied with."""
    query, key, value = (part.detach() for part in parts)
    weight = weight_of((layout.token_count, len(query), value.shape[2]))
    scale = query.shape[2] ** -0.5 if rule.scale is None else rule.scale
    product = weight.norm(dim=-1).max() * value.norm(dim=-1).max()
    return scale * float(product * max(query.abs().max(), key.abs().max()))


def assert_meant(parts, layout, rule):
    """The reference is computed in fp64; fp32 may cost as much as in torch's attention, to a small factor."""
    expected = results([part.detach().double().requires_grad_() for part in parts], layout, rule, reference)
    torchs, term = results(parts, layout, rule, by_slots), largest_term(parts, layout, rule)
    for one, other, meant in zip(results(parts, layout, rule), torchs, expected, strict=True):
        cost = float((other - meant).abs().max())
        few = (16 * max(1.0, float(meant.abs().max())) + 2 * term) * torch.finfo(torch.float32).eps
        torch.testing.assert_close(one.double(), meant, rtol=0, atol=4 * cost + few)


@settings(max_examples=150)
@given(layouts(longest=90), rules(), HEADS, SIZES)
def test_outputs_and_gradients_equal_the_reference(layout, rule, heads, sizes):
    parts = qkv(layout, heads, sizes)
    assert_meant(parts, layout, rule)


@pytest.mark.parametrize("rule", [CAUSAL, AttentionRule(False), AttentionRule(True, window=50)])
@pytest.mark.parametrize("parent", [None, 0])
def test_every_length_up_to_130_equals_the_reference(rule, parent):
    layout = Layout([Node(45), *[Node(n) if parent is None else Node(n, parent=parent) for n in range(1, 131)]])
    parts = qkv(layout, (3, 1), (16, 16))
    assert_meant(parts, layout, rule)


@pytest.mark.parametrize("rule", [CAUSAL, AttentionRule(False), AttentionRule(True, window=200)])
def test_examples_of_many_blocks_and_parts_equal_the_reference(rule):
    layout = Layout([Node(1300), Node(530, parent=0), Node(3, parent=0), Node(40, parent=1), Node(1025)])
    parts = qkv(layout, (2, 1), (24, 16))
    assert_meant(parts, layout, rule)


@pytest.mark.parametrize("size", [1e-6, 30.0])
def test_scores_of_any_size_give_finite_weights(size):
    """At 30 the scores reach thousands: a weight is 0 or 1."""
    layout = Layout([Node(100), Node(30, parent=0)])
    parts = qkv(layout, size=size)
    assert all(bool(part.isfinite().all()) for part in results(parts, layout, CAUSAL))
    assert_meant(parts, layout, CAUSAL)


@settings(max_examples=60)
@given(layouts(longest=90), layouts(), rules(), HEADS)
def test_an_examples_bits_do_not_depend_on_its_neighbours_nor_on_its_place(one, other, rule, heads):
    moved = [Node(n.length, n.owner, n.example, n.parent + len(other.nodes) * (n.parent >= 0)) for n in one.nodes]
    both, count = Layout([*other.nodes, *moved]), other.token_count
    parts = qkv(both, heads)
    alone = [part.detach()[:, count:].requires_grad_() for part in parts]
    weight = torch.randn(both.token_count, heads[0], 16, generator=torch.Generator().manual_seed(5))
    out, out_alone = flat_attention(*parts, both, rule), flat_attention(*alone, one, rule)
    assert torch.equal(out[count:], out_alone)
    found = torch.autograd.grad((out * weight).sum(), parts)
    expected = torch.autograd.grad((out_alone * weight[count:]).sum(), alone)
    assert all(torch.equal(f[:, count:], e) for f, e in zip(found, expected, strict=True))


@settings(max_examples=60)
@given(layouts(longest=90), rules(), HEADS)
def test_a_shared_prefix_leaves_an_examples_outputs_byte_identical(layout, rule, heads):
    if not rule.causal:
        rule = AttentionRule(True, rule.scale, rule.window)
    parts = [part.detach() for part in qkv(layout, heads)]
    together = flat_attention(*parts, layout, rule)
    for index, node in enumerate(layout.nodes):
        rows = line_of(layout, index)
        alone = flat_attention(*(part[:, rows] for part in parts), Layout([Node(len(rows))]), rule)
        assert torch.equal(together[rows[-node.length :]], alone[-node.length :])


def test_bits_do_not_depend_on_the_number_of_threads():
    layout = Layout([Node(28), *[Node(20 + n, parent=0) for n in range(16)], Node(700)])
    parts, threads, found = qkv(layout, (9, 3), (64, 64)), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(parts, layout, CAUSAL))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(one, two) for one, two in zip(found[0], other, strict=True))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3])
def test_a_nan_stays_with_its_example_and_leaves_every_other_byte_identical(causal, window):
    """Row 40 belongs to a sibling: what it shares is the prefix, whose keys' gradient is the sum over both."""
    layout = Layout([Node(33), Node(20, parent=0), Node(18, parent=0), Node(6), Node(2, parent=3), Node(90)])
    rule = AttentionRule(causal, window=window)
    prefix, sibling = range(33), range(33, 53)
    rest = [row for row in range(layout.token_count) if row not in sibling]
    unshared = [row for row in rest if row not in prefix]

    def run(poisoned):
        parts = qkv(layout)
        for part in parts if poisoned else []:
            part.data[:, 40] = float("nan")
        out = flat_attention(*parts, layout, rule)
        query, *grads = torch.autograd.grad(out.sin()[rest].sum(), parts)
        return [out[rest], query[:, rest], *(grad[:, unshared] for grad in grads)], out[sibling]

    (clean, _), (dirty, own) = run(False), run(True)
    assert all(torch.equal(one, other) for one, other in zip(clean, dirty, strict=True))
    assert own.isnan().any()


def test_it_runs_in_fp32_on_a_cpu_without_a_soft_cap_and_nowhere_else(monkeypatch):
    layout, calls, real = Layout([Node(9)]), list[torch.dtype](), native.attention

    def told(parts, *args, **kinds):
        calls.append(parts[0].dtype)
        return real(parts, *args, **kinds)

    monkeypatch.setattr(native, "attention", told)
    for parts, rule, expected in [
        (qkv(layout), CAUSAL, 1),
        ([part.double() for part in qkv(layout)], CAUSAL, 0),
        ([part.bfloat16() for part in qkv(layout)], CAUSAL, 0),
        (qkv(layout), AttentionRule(True, soft_cap=2.0), 0),
        (qkv(layout, sizes=(257, 8)), CAUSAL, 0),
        (qkv(layout, heads=(193, 1), sizes=(2, 2)), CAUSAL, 0),
    ]:
        calls.clear()
        flat_attention(*parts, layout, rule)
        assert len(calls) == expected


def test_gradients_that_are_one_number_repeated_are_taken_as_any_others():
    """sum().backward() hands down a gradient without strides."""
    layout = Layout([Node(20)])
    parts = qkv(layout)
    out = flat_attention(*parts, layout, CAUSAL)
    found = torch.autograd.grad(out.sum(), parts, retain_graph=True)
    assert all(map(torch.equal, found, torch.autograd.grad(out, parts, torch.ones_like(out))))
