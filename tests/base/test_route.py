"""Routes never change, the slot is one plain place, and a row count of another space raises."""

import dataclasses
import threading
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import nn

from onebase.adapters.layer import AdaptedLayer
from onebase.adapters.lora import make_linear, plan_of
from onebase.base.route import Route, RowSpace, Slot
from onebase.config.methods import Lora
from onebase.ops.layout import Layout, Node
from onebase.ops.segments import NO_OWNER, Segments


def test_a_route_cannot_be_changed():
    route: Any = Route(batch_owners=(0,))
    with pytest.raises(dataclasses.FrozenInstanceError):
        route.batch_owners = (1,)
    with pytest.raises(TypeError):
        route.rows[RowSpace.TOKEN] = Segments.of([1], [0])


def test_a_route_does_not_follow_the_mapping_it_was_made_of():
    rows = {RowSpace.TOKEN: Segments.of([4], [0])}
    keys = {RowSpace.TOKEN: torch.zeros(4, dtype=torch.int64)}
    route = Route(rows=rows, row_keys=keys)
    rows[RowSpace.TOKEN] = Segments.of([4], [1])
    keys.clear()
    assert list(route.segments(RowSpace.TOKEN, 4)) == [(0, 4, 0)]
    assert RowSpace.TOKEN in route.row_keys


def test_the_slot_puts_back_what_was_there_also_after_an_error():
    slot, first, second = Slot(), Route(batch_owners=(0,)), Route(batch_owners=(1,))
    with slot.use(first):
        with slot.use(second):
            assert slot.route is second
        assert slot.route is first
        with suppress(KeyError), slot.use(second):
            raise KeyError
        assert slot.route is first
    assert slot.route is None


def test_the_slot_is_seen_by_every_thread():
    slot, route, seen = Slot(), Route(batch_owners=(0,)), []
    with slot.use(route):
        thread = threading.Thread(target=lambda: seen.append(slot.route))
        thread.start()
        thread.join()
    assert seen == [route]


def test_recomputation_gets_the_route_of_its_forward_as_often_as_it_runs():
    slot, first, second = Slot(), Route(batch_owners=(0,)), Route(batch_owners=(1,))
    with slot.use(first):
        forward, again = slot.for_recompute()
        with forward:
            assert slot.route is first
    with slot.use(second):
        for _ in range(2):
            with again:
                assert slot.route is first
            assert slot.route is second


@pytest.mark.parametrize("space", list(RowSpace))
def test_a_space_with_another_number_of_rows_raises(space):
    route = Route(rows={space: Segments.of([3, 4], [0, 1])})
    assert list(route.segments(space, 7)) == [(0, 3, 0), (3, 7, 1)]
    for count in (0, 6, 8):
        with pytest.raises(RuntimeError, match=f"{count} rows of the {space.value} space"):
            route.segments(space, count)


@pytest.mark.parametrize("space", list(RowSpace))
def test_a_space_that_the_route_does_not_know_raises_even_where_the_count_fits_another(space):
    others = {other: Segments.of([7], [0]) for other in RowSpace if other is not space}
    with pytest.raises(RuntimeError, match=space.value):
        Route(rows=others).segments(space, 7)


def test_a_sole_owner_has_every_row_of_every_space():
    for space in RowSpace:
        assert list(Route(batch_owners=(5,)).segments(space, 9)) == [(0, 9, 5)]
    assert list(Route(batch_owners=(NO_OWNER,)).segments(RowSpace.TOKEN, 9)) == [(0, 9, NO_OWNER)]


@pytest.mark.parametrize("space", list(RowSpace))
def test_a_wrapper_reads_its_own_space_only(space):
    """Both spaces have as many rows; only the wrapper's own says that they are adapted."""
    slot = Slot()
    linear = torch.nn.Linear(5, 6).requires_grad_(False)
    layer = AdaptedLayer(linear, "a.b", space, slot)
    dummy, target = (
        make_linear(plan_of(Lora(r=r, init_lora_weights=False), "a.b", r), nn.Linear(5, 6)) for r in (2, 3)
    )
    layer.put(0, dummy)
    layer.put(1, target)
    x = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    rows = {other: Segments.of([7], [NO_OWNER]) for other in RowSpace} | {space: Segments.of([3, 4], [NO_OWNER, 1])}
    with slot.use(Route(layout=Layout([Node(7)]), rows=rows)):
        out = layer(x)
        with pytest.raises(RuntimeError, match=space.value):
            layer(x[:6])
    assert torch.equal(out[:3], linear(x)[:3])
    expected = linear(x[3:]) + target.scaling * x[3:] @ target.lora_A.T @ target.lora_B.T
    torch.testing.assert_close(out[3:], expected)
