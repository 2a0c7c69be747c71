"""What will be compiled sees only tensors: a valid custom operation, and one graph whatever the segments."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from onebase.ops.keyed import mix, position_keys
from onebase.ops.segments import NO_OWNER, Segments
from tests.ops.test_low_rank import low_rank_of, numbers


def index_of(low_rank, segments, keys):
    index = [low_rank.scaling, low_rank.dropout, low_rank.pair_of_owner, segments.offsets, segments.owners]
    return index if keys is None else [*index, keys]


def detached(low_rank):
    return [A.detach() for A in low_rank.lora_A], [B.detach() for B in low_rank.lora_B]


@pytest.mark.parametrize("with_keys", [False, True])
def test_both_operations_keep_what_their_schemas_promise(with_keys):
    low_rank = low_rank_of([2, 3], [0, NO_OWNER, 1], dropout=0.3, dtype=torch.float32)
    segments, keys = Segments.of([2, 3, 1], [0, 1, 2]), position_keys(mix(1), 0, 6) if with_keys else None
    index, (lora_A, lora_B) = index_of(low_rank, segments, keys), detached(low_rank)
    x, y = numbers(6, 5, dtype=torch.float32), numbers(6, 6, seed=2, dtype=torch.float32)
    checks = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.onebase.low_rank_backward.default, (y, x, numbers(6, 3, dtype=torch.float32), lora_A, lora_B, index, [True, True]), test_utils=checks)  # fmt: skip
    torch.library.opcheck(torch.ops.onebase.low_rank_backward.default, (y, x, numbers(6, 3, dtype=torch.float32), lora_A, lora_B, index, [False, True]), test_utils="test_schema")  # fmt: skip
    torch.library.opcheck(torch.ops.onebase.low_rank_backward.default, (y, x, numbers(6, 3, dtype=torch.float32), lora_A, lora_B, index, [True, False]), test_utils=checks)  # fmt: skip
    # h is written where a row has an owner alone, so its other numbers differ from call to call: shapes only
    torch.library.opcheck(torch.ops.onebase.low_rank_forward.default, (y, x, lora_A, lora_B, index), test_utils=("test_schema", "test_faketensor"))  # fmt: skip


@pytest.mark.parametrize("case", ["same-bucket", "other-rows"])
def test_one_graph_without_a_break_serves_all_segments(case):
    """Other segments in one bucket, and with dynamic shapes other numbers of rows, compile nothing anew."""
    command = [sys.executable, "-m", "tests.laws.compiled_call", case]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == ["1"]
