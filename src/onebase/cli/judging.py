"""`onebase eval` for classes and numbers: metrics with intervals, of all rows and by slices."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from onebase.cli import terminal
from onebase.cli.counting import counting
from onebase.cli.opening import Opened
from onebase.cli.scores import check_number, estimate_rows, slice_table
from onebase.errors import ConfigError

if TYPE_CHECKING:
    from onebase.measure.judge import TaskScores
    from onebase.measure.metrics import Estimate, SliceScores
    from onebase.train.data import Prepared

_SCHEMA_VERSION = 1


def judge_whole(
    opened: Opened, adapter: str | None, prepared: "Prepared", data: str, slices: Sequence[str] | None, *, as_json: bool
) -> None:
    """Measure the adapter on rows with classes or numbers, and print what was found."""
    from onebase.measure.evaluate import EVALUATION_TOKENS
    from onebase.measure.judge import judge, members_of

    head = opened.bank.base.task_head
    if adapter is None and not isinstance(head, str) and head.fresh:
        raise ConfigError(
            f"{opened.bank.base.name}: its files hold no head for this task ({', '.join(head.fresh)}), so there is nothing to "
            "measure without an adapter. Leave --base-only away."
        )
    columns, option = (opened.slices, "eval.slices") if slices is None else (slices, "--slice")
    members_of(prepared.examples, columns, option=option)  # a column that is not there is told before the work
    started = time.perf_counter()
    label = f"adapter {opened.label}" if adapter else f"base {opened.bank.base.name}"
    with counting(label, len(prepared.examples), "rows") as advance:
        scores = judge(
            opened.bank,
            adapter,
            prepared.examples,
            batch_tokens=opened.batch_tokens or EVALUATION_TOKENS,
            objective=opened.objective,
            on_progress=lambda done, _: advance(done),
        )
    seconds = time.perf_counter() - started
    check_number(scores.loss, label, data)
    overall = scores.intervals()
    by_slice = scores.slices(prepared.examples, columns)
    if as_json:
        terminal.print_json(_as_json(opened, adapter, data, scores, overall, by_slice, seconds))
        return
    out = terminal.stdout()
    out.print(
        f"{data}: {terminal.counted(scores.examples, 'example')}; base {opened.base_line}; loss {terminal.loss(scores.loss)}, "
        f"{scores.examples / seconds:.1f} examples/s",
        soft_wrap=True,
    )
    out.print(terminal.table(("", "value", "95 % interval"), estimate_rows(overall)))
    if by_slice:
        out.print()
        out.print(slice_table(by_slice))


def _as_json(
    opened: Opened,
    adapter: str | None,
    data: str,
    scores: "TaskScores",
    overall: "dict[str, Estimate]",
    by_slice: "Sequence[SliceScores]",
    seconds: float,
) -> dict[str, Any]:
    """Return what is printed: each metric at the top, its interval beside it, and the slices."""
    base = opened.bank.base
    return {
        "schema_version": _SCHEMA_VERSION,
        "adapter": opened.label if adapter else None,
        "model": base.name,
        "base_fingerprint": base.fingerprint,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "task": opened.task,
        "data": data,
        **scores.as_dict(),
        "intervals": {name: [found.low, found.high] for name, found in overall.items()},
        "slices": [
            {**asdict(one), "scores": {name: asdict(found) for name, found in one.scores.items()}} for one in by_slice
        ],
        "seconds": seconds,
        "examples_per_s": scores.examples / seconds,
    }
