"""An adapted layer's arithmetic, compiled: run as a process of its own, without the hook that checks shapes.

Prints the number of graphs that were compiled, and raises where a compiled result differs from an eager one.
"""

import sys

import torch
from torch._dynamo.testing import CompileCounterWithBackend

from onebase.ops.keyed import mix, position_keys
from onebase.ops.low_rank import LowRank, add_low_rank_
from onebase.ops.segments import NO_OWNER, Segments
from tests.ops.test_low_rank import low_rank_of, numbers

SAME_BUCKET = [
    ([3, 4, 5], [0, 1, NO_OWNER]),
    ([12], [1]),
    ([1, 2, 4, 5], [1, 0, NO_OWNER, 0]),
    ([6, 6], [NO_OWNER, 0]),
]
OTHER_ROWS = [*SAME_BUCKET, ([7, 2], [0, 1]), ([3, 3, 11], [0, 1, 0]), ([64], [0])]


class Call(torch.nn.Module):
    """A frozen layer and the update, with everything that changes from batch to batch as a tensor."""

    def __init__(self, low_rank: LowRank) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(5, 6).requires_grad_(False).double()
        self.low_rank = low_rank

    def forward(self, x, offsets, owners, keys):
        y = self.linear(x.sin())
        return add_low_rank_(y, x, self.low_rank, Segments(offsets, owners), keys).cos()


def run(function, low_rank, lengths, owners):
    segments = Segments.of(lengths, owners)
    x = numbers(segments.row_count, 5).requires_grad_()
    out = function(x, segments.offsets, segments.owners, position_keys(mix(1), 0, segments.row_count))
    parts = [x, *low_rank.lora_A, *low_rank.lora_B]
    return [out.detach(), *torch.autograd.grad(out.sum(), parts, materialize_grads=True)]


def graphs_of(batches, *, dynamic: bool | None) -> int:
    low_rank = low_rank_of([2, 3], [0, 1], dropout=0.3)
    module, counter = Call(low_rank), CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(module, backend=counter, fullgraph=True, dynamic=dynamic)
    for batch in batches:
        for one, other in zip(run(compiled, low_rank, *batch), run(module, low_rank, *batch), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    return counter.frame_count


if __name__ == "__main__":
    case = sys.argv[1]
    print(graphs_of(SAME_BUCKET, dynamic=None) if case == "same-bucket" else graphs_of(OTHER_ROWS, dynamic=True))
