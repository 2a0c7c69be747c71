"""Which part of a training step an operation under torch's profiler belongs to, and how many products it makes.

Forward: the innermost range that an operation lies in. `marked` puts ranges around the modules of a model by hooks, which
change nothing that is computed; `Member.run_step` has those of batching and loss. What no range tells (attention, stacked
experts) is told by the operation's name. Backward: what the forward operation was whose gradient it takes, as autograd
numbers them. So every operation has one part. Its own time, without that of operations inside, is counted once; what
is left of a step is time in which no operation ran.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.profiler import record_function

from onebase.adapters.layer import AdaptedLayer
from onebase.adapters.part import ModulePart

BATCHING = "batching"
EMBEDDING = "embedding"
ATTENTION = "attention"
FROZEN = "frozen layers"
ADAPTER = "adapter"
ELEMENTWISE = "norms and activations"
HEAD = "output head and loss"
OPTIMISER = "clipping and optimiser"
REST = "between operations"
PARTS = (BATCHING, EMBEDDING, ATTENTION, FROZEN, ADAPTER, ELEMENTWISE, HEAD, OPTIMISER, REST)
STEP = "onebase: step"

_MARK = "onebase: part "
_BACKWARD = "autograd::engine::evaluate_function: "
# What an operation that no range tells apart from the rest of the model is for.
_NAMED = {
    "_Attention": ATTENTION,
    "_Slots": ATTENTION,
    "_Rows": ATTENTION,
    "aten::scaled_dot_product_attention": ATTENTION,
    "aten::repeat_interleave": ATTENTION,
    "aten::softmax": ATTENTION,
    "aten::matmul": ATTENTION,
    "aten::bmm": ATTENTION,
    "aten::baddbmm": ATTENTION,
    "aten::linear": FROZEN,  # stacked experts, whose weights are no modules
    "aten::mm": FROZEN,
    "aten::addmm": FROZEN,
    "aten::_grouped_mm": FROZEN,
}
# Matrix products, and which of their inputs are the two factors.
_FACTORS = {"aten::mm": 0, "aten::_int_mm": 0, "aten::addmm": 1, "aten::addmm_": 1, "aten::bmm": 0, "aten::baddbmm": 1}
_COMPILED = re.compile(r"^onebase::\w+ (\d+) FLOP$")  # as ops/native.py names its calls


@dataclass(frozen=True)
class Line:
    """A part of a step, one way: seconds and floating-point operations of its products (a multiply-add is two)."""

    part: str
    way: str
    seconds: float
    flop: int


def part_range(part: str) -> record_function:
    """Return a range around what belongs to a part; without a profiler it costs 2 us."""
    return record_function(_MARK + part)


@contextmanager
def marked(trunk: nn.Module) -> Iterator[None]:
    """Put ranges around the modules of a model for as long as the block runs."""
    parts: dict[nn.Module, str] = {trunk: ELEMENTWISE}
    replaced: set[nn.Module] = set()
    for module in trunk.modules():
        if isinstance(module, AdaptedLayer):
            parts[module] = ADAPTER
            parts[module.base_layer] = ELEMENTWISE
            if any(isinstance(part, ModulePart) for part in module.parts):  # run with the adapter's own weights
                replaced.update(module.base_layer.modules())
        elif isinstance(module, nn.Embedding):
            parts[module] = EMBEDDING
        elif isinstance(weight := getattr(module, "weight", None), Tensor) and weight.dim() > 1:
            parts[module] = FROZEN
    handles = [handle for module, part in parts.items() if module not in replaced for handle in _hooks(module, part)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hooks(module: nn.Module, part: str) -> Iterator[Any]:
    running: list[record_function] = []

    def enter(*_: object) -> None:
        running.append(part_range(part))
        running[-1].__enter__()  # type: ignore[no-untyped-call]

    def leave(*_: object) -> None:
        running.pop().__exit__(None, None, None)

    yield module.register_forward_pre_hook(enter, prepend=True)
    yield module.register_forward_hook(leave, always_call=True)  # recomputation leaves a block by an exception


def split(events: Iterable[Any], *, on_device: bool) -> tuple[Line, ...]:
    """Return where the steps among a profile's events went: a mean step's lines, which add up to its time.

    Args:
        on_device: count the time of kernels on a device, which runs beside Python, not that of the calls.
    """
    events = list(events)
    calls = [event for event in events if event.device_type.name == "CPU"]
    steps = [event for event in calls if event.name == STEP]
    makers = makers_of(calls)
    microseconds: defaultdict[tuple[str, str], float] = defaultdict(float)
    flop: Counter[tuple[str, str]] = Counter()
    for event in calls:
        if event.name != STEP:
            at = part_of(event, makers)
            own = _kernels(event) if on_device else event.self_cpu_time_total
            idle = event.name.startswith(_MARK) and at[0] != BATCHING and not on_device
            microseconds[(REST, "") if idle else at] += own
            flop[at] += _flop(event)
    microseconds[REST, ""] += sum(step.cpu_time_total for step in steps) - sum(microseconds.values())
    return tuple(
        Line(part, way, microseconds[part, way] / 1e6 / len(steps), round(flop[part, way] / len(steps)))
        for part in PARTS
        for way in ("", "forward", "backward")
        if (part, way) in microseconds
    )


def makers_of(events: Iterable[Any]) -> dict[tuple[int, int], Any]:
    """Return the forward event that made each node of autograd's graph, by thread and number.

    Several events have the number of the next node: the last of them made it.
    """
    return {(e.thread, e.sequence_nr): e for e in events if e.sequence_nr >= 0 and not e.fwd_thread}


def part_of(event: Any, makers: Mapping[tuple[int, int], Any]) -> tuple[str, str]:
    """Return the part of an event and the way: forward, backward, or neither."""
    named, at = None, event
    while at is not None:
        if at.name.startswith(_MARK):
            part = at.name.removeprefix(_MARK)
            if part == ELEMENTWISE:
                part = named or part
            return part, "" if part in (BATCHING, HEAD) else "forward"
        if at.name.startswith(_BACKWARD):
            maker = makers.get((at.fwd_thread, at.sequence_nr))
            part = ADAPTER if maker is None else part_of(maker, makers)[0]
            return part, "" if part in (BATCHING, HEAD) else "backward"
        named = named or _NAMED.get(at.name)
        at = at.cpu_parent
    return OPTIMISER, ""


def _kernels(event: Any) -> float:
    """Return the microseconds of the kernels that a call started itself; a range is listed among its own."""
    return float(sum(kernel.duration for kernel in event.kernels if kernel.name != event.name))


def _flop(event: Any) -> int:
    """Return the operations of a matrix product, a multiply-add being two; 0 for all else, and for one inside of another."""
    compiled = _COMPILED.search(event.name)
    if compiled:
        return int(compiled[1])
    at = _FACTORS.get(event.name)
    if at is None or (event.cpu_parent is not None and event.cpu_parent.name in _FACTORS):
        return 0
    left, right = event.input_shapes[at : at + 2]
    return 2 * int(math.prod(left) * right[-1])
