"""Pieces are a layout's tree: every query in one, its keys before it, and tasks that never write to one place."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from onebase.ops.layout import Layout, Node
from onebase.ops.pieces import pieces_of
from tests.ops.test_layout import layouts, line_of

LONG = Layout([Node(2100), Node(700, parent=0), *[Node(30, parent=0)] * 5, Node(513), Node(512)])


@settings(max_examples=60)
@given(st.one_of(layouts(most_nodes=20), st.just(LONG)), st.booleans())
def test_every_query_has_a_piece_and_every_piece_its_ancestors(layout, causal):
    tables = pieces_of(layout, causal=causal)
    queries = list[int]()
    for start, length, depth, first_ancestor, first, count in tables.pieces.tolist():
        index = layout.starts.index(start)
        before = tables.ancestors[first_ancestor : first_ancestor + depth].tolist()
        assert [*before, *range(start, start + length)] == line_of(layout, index)
        assert causal or (first, count) == (0, length)
        queries += range(start + first, start + first + count)
    assert sorted(queries) == list(range(layout.token_count))


@settings(max_examples=60)
@given(st.one_of(layouts(most_nodes=20), st.just(LONG)), st.booleans())
def test_the_pieces_of_a_task_follow_the_same_keys_and_tasks_keep_theirs_apart(layout, causal):
    tables, apart, end = pieces_of(layout, causal=causal), 0, 0
    for first, last, place in tables.tasks.tolist():
        assert (first, place) == (end, apart)
        assert first < last
        before = {(depth, chain, query) for _, _, depth, chain, query, _ in tables.pieces[first:last].tolist()}
        assert len(before) == 1
        depth, _, query = before.pop()
        apart, end = apart + depth + query, last
    assert (end, apart) == (len(tables.pieces), tables.apart)


@settings(max_examples=40)
@given(layouts(), layouts())
def test_a_tree_is_cut_the_same_whatever_stands_beside_it(one, other):
    moved = [Node(n.length, n.owner, n.example, n.parent + len(one.nodes) * (n.parent >= 0)) for n in other.nodes]
    both, alone = pieces_of(Layout([*one.nodes, *moved]), causal=True), pieces_of(one, causal=True)
    count = len(alone.pieces)
    assert torch.equal(both.pieces[:count], alone.pieces)
    assert torch.equal(both.tasks[: len(alone.tasks)], alone.tasks)
