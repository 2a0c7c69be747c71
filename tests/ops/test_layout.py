"""A layout is a tree of nodes: positions, ancestors, groups and slots, whatever its shape."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from onebase.ops.keyed import mix, position_keys
from onebase.ops.layout import NO_PARENT, Layout, Node, length_bucket


@st.composite
def layouts(draw, most_nodes=9, longest=40):
    """Trees of depth up to 3, in any order that puts parents first; several owners."""
    nodes: list[Node] = []
    depth: list[int] = []
    for index in range(draw(st.integers(1, most_nodes))):
        parents = [i for i in range(index) if depth[i] < 3]
        parent = draw(st.sampled_from([NO_PARENT, NO_PARENT, *parents]))
        owner = draw(st.sampled_from([None, "a", "b"])) if parent == NO_PARENT else nodes[parent].owner
        nodes.append(Node(draw(st.integers(1, longest)), owner, draw(st.integers(0, 99)), parent))
        depth.append(0 if parent == NO_PARENT else depth[parent] + 1)
    return Layout(nodes)


def line_of(layout, index):
    """Return the flat rows of a node's example up to its own last token, found by walking up."""
    start = sum(node.length for node in layout.nodes[:index])
    own = list(range(start, start + layout.nodes[index].length))
    parent = layout.nodes[index].parent
    return (line_of(layout, parent) if parent != NO_PARENT else []) + own


@given(layouts())
def test_positions_count_from_the_root_and_ancestors_come_in_order(layout):
    for index, node in enumerate(layout.nodes):
        line = line_of(layout, index)
        assert layout.ancestor_rows(index) + line[-node.length :] == line
        own = layout.position_ids[0, line[-node.length :]].tolist()
        assert own == list(range(len(line) - node.length, len(line)))
        assert layout.depths[index] == len(line) - node.length
        assert layout.starts[index] == line[-node.length]
    assert layout.token_count == sum(node.length for node in layout.nodes)


@given(layouts())
def test_every_token_has_a_slot_of_its_own_in_its_nodes_group(layout):
    slots = layout.slots.tolist()
    assert len(set(slots)) == len(slots) == layout.token_count
    assert max(slots) < layout.slot_count == sum(group.count * group.width for group in layout.groups)
    found = {}
    for group in layout.groups:
        for line in range(group.count):
            first = group.first_slot + line * group.width
            length = int(group.lengths[line])
            assert length <= group.width
            found[first] = (group, line, length)
    assert len(found) == len(layout.nodes)
    for index, node in enumerate(layout.nodes):
        own = slots[layout.starts[index] : layout.starts[index] + node.length]
        group, line, length = found[own[0]]
        assert own == list(range(own[0], own[0] + length))
        assert length == node.length
        count = int(group.ancestor_count[line])
        assert count == layout.depths[index]
        ancestors = [] if group.ancestors is None else group.ancestors[line].tolist()
        assert ancestors[:count] == layout.ancestor_rows(index)
        assert all(layout.starts[index] <= row < layout.starts[index] + length for row in ancestors[count:])


@given(layouts(), layouts())
def test_the_shape_a_node_is_attended_in_does_not_depend_on_its_neighbours(one, other):
    def shapes(layout, skip=0):
        by_length = {}
        for group in layout.groups:
            prefix = 0 if group.ancestors is None else group.ancestors.shape[1]
            for length, depth in zip(group.lengths.tolist(), group.ancestor_count.tolist(), strict=True):
                by_length[(length, depth)] = (group.width, prefix)
        return by_length

    moved = [Node(n.length, n.owner, n.example, n.parent + len(one.nodes) * (n.parent >= 0)) for n in other.nodes]
    together = shapes(Layout([*one.nodes, *moved]))
    assert together == shapes(one) | shapes(other)


@given(st.integers(0, 5000))
def test_length_buckets_hold_the_length_and_waste_less_than_a_step(length):
    bucket = length_bucket(length)
    assert length <= bucket < length + (16 if length <= 128 else 64)
    assert length_bucket(bucket) == bucket


@given(layouts(), st.integers(0, 5), st.integers(0, 5))
def test_row_keys_are_those_of_seed_step_example_and_position(layout, seed, step):
    seeds = [seed + len(node.owner or "") for node in layout.nodes]
    keys = layout.row_keys(seeds, step)
    for index, node in enumerate(layout.nodes):
        for row in line_of(layout, index)[-node.length :]:
            position = int(layout.position_ids[0, row])
            assert keys[row] == position_keys(mix(seeds[index], step, node.example), position, 1)[0]


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([Node(2), Node(0)], "at least one token"),
        ([Node(2, parent=0)], "must come before it"),
        ([Node(2), Node(2, parent=1)], "must come before it"),
        ([Node(2), Node(2, parent=-2)], "must come before it"),
        ([Node(2, "a"), Node(2, "b", parent=0)], "has a parent of 'a'"),
        ([Node(2, "a"), Node(2, None, parent=0)], "has a parent of 'a'"),
    ],
)
def test_what_is_no_tree_of_one_owner_raises(nodes, message):
    with pytest.raises(ValueError, match=message):
        Layout(nodes)


def test_a_layout_without_nodes_raises():
    with pytest.raises(ValueError, match="node"):
        Layout([])


def test_positions_are_on_the_cpu_and_whole_numbers():
    assert Layout([Node(3)]).position_ids.dtype == torch.int64
