"""Memory runs out before the first step or never, and the message says what would fit."""

import pytest

from onebase.data.batches import cut_by_tokens
from onebase.measure import memory
from tests.train import runs
from tests.train.runs import FEW, Watching


def test_micro_batches_are_cut_to_the_memory_there_is(shop, tmp_path, monkeypatch):
    settings = shop.settings(adapter=FEW, train={"steps": 2, "batch_size": 8})
    runs.run(settings, tmp_path / "roomy", watching=(roomy := Watching()))
    monkeypatch.setattr(memory, "available_bytes", lambda: 1_000_000)
    runs.run(settings, tmp_path / "narrow", watching=(narrow := Watching()))
    assert 50 < narrow.plans[0].micro_batch_tokens < roomy.plans[0].micro_batch_tokens == 1024
    lengths = [40] * 8
    assert len(cut_by_tokens(lengths, narrow.plans[0].micro_batch_tokens)) > 1
    assert [s.loss for s in narrow.steps] == pytest.approx([s.loss for s in roomy.steps], rel=1e-5)
