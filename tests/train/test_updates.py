"""Laws of comparing updates that are never made dense: what the dense matrices say."""

import math
from typing import Any

import pytest
import torch

from onebase.adapters.bank import Bank
from onebase.adapters.ingredients import StoredPair
from onebase.config.methods import Lora
from onebase.errors import VerificationError
from onebase.train import saving
from onebase.train.updates import check_updates, distance
from tests import tiny


def pair(seed: int, r: int = 3, scaling: float = 0.7) -> StoredPair:
    draws = torch.Generator().manual_seed(seed)
    A, B = torch.randn(r, 6, generator=draws), torch.randn(5, r, generator=draws)
    return StoredPair(A=A, B=B, scaling=scaling, names=("a", "b"), inputs=(6,), ones=())


def dense(*terms: tuple[float, StoredPair]) -> torch.Tensor:
    return torch.stack([weight * one.scaling * (one.B.double() @ one.A.double()) for weight, one in terms]).sum(0)


def test_the_distance_is_that_of_the_dense_updates_over_all_layers_and_on_the_worst():
    found = {"x": pair(0), "y": pair(1, scaling=2.0)}
    others: Any = {"x": [(0.5, pair(2)), (-1.5, pair(3, r=2))], "y": [(1.0, pair(4, scaling=5.0))]}
    apart = {path: torch.linalg.matrix_norm(dense((1.0, found[path])) - dense(*others[path])) for path in found}
    size = {path: torch.linalg.matrix_norm(dense(*others[path])) for path in found}
    told = distance(found, others)
    assert told.worst_layer == max(found, key=lambda path: float(apart[path] / size[path]))
    assert told.worst == pytest.approx(max(float(apart[path] / size[path]) for path in found), rel=1e-9)
    whole = math.hypot(*apart.values()) / math.hypot(*size.values())
    assert told.whole == pytest.approx(whole, rel=1e-9)


def test_a_sum_that_cancels_is_at_no_distance_from_nothing_and_infinitely_far_from_anything():
    one = pair(0)
    nothing = StoredPair(one.A, torch.zeros_like(one.B), 1.0, one.names, one.inputs, one.ones)
    assert distance({"x": nothing}, {"x": [(1.0, one), (-1.0, one)]}).whole == 0
    assert distance({"x": one}, {"x": [(1.0, one), (-1.0, one)]}).whole == math.inf


def test_a_folder_is_held_against_every_layer_and_one_too_many_or_too_few_is_named(tmp_path):
    base = tiny.base_of("llama")
    settings = Lora(r=2, lora_alpha=2, target_modules=["q_proj"])
    adapter = tiny.fill_(Bank(base).add("a", settings))
    saving.write(tmp_path / "a", base, adapter, task="text")
    wanted = {}
    for part in adapter.parts:
        A, B = part.factors()
        wanted[part.path] = [(1.0, StoredPair(A=A, B=B, scaling=1.0, names=("A", "B"), inputs=(32,), ones=()))]
    assert 0 <= check_updates(tmp_path / "a", wanted, "it") < 1e-7
    first, second = sorted(wanted)
    for changed, told in (
        ({first: wanted[first]}, f"{second} differs by"),
        (wanted | {"gone": wanted[first]}, "gone has no pair"),
        (wanted | {first: [(1 + 1e-5, wanted[first][0][1])]}, f"{first} differs by"),
        (wanted | {first: [(0.5, wanted[first][0][1])] * 2}, ""),
    ):
        if not told:
            check_updates(tmp_path / "a", changed, "it")
            continue
        with pytest.raises(VerificationError, match=told) as caught:
            check_updates(tmp_path / "a", changed, "it")
        assert "1 problem in it, written and read again" in str(caught.value)
    scaled = tiny.fill_(Bank(tiny.base_of("llama")).add("b", settings.model_copy(update={"lora_alpha": 4})))
    saving.write(tmp_path / "b", base, scaled, task="text")
    with pytest.raises(VerificationError, match=r"is scaled by 2\.0, not 1"):
        check_updates(tmp_path / "b", wanted, "it")
