"""`onebase eval` for classes and numbers: metrics with intervals, of all rows and by slices."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from onebase.cli import terminal
from onebase.cli.counting import counting
from onebase.cli.opening import Opened
from onebase.cli.scores import check_number, class_table, estimate_rows, slice_table
from onebase.errors import ConfigError

if TYPE_CHECKING:
    from onebase.measure.by_class import ClassScores
    from onebase.measure.judge import TaskScores
    from onebase.measure.metrics import Estimate, SliceScores
    from onebase.train.data import Prepared

_SCHEMA_VERSION = 1


@dataclass(frozen=True)
class _Found:
    """What one evaluation found: of all rows, of each class and of each slice."""

    scores: "TaskScores"
    overall: "Mapping[str, Estimate]"
    by_class: "Sequence[ClassScores]"
    by_slice: "Sequence[SliceScores]"
    seconds: float


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
    labels = opened.bank.base.labels
    found = _Found(
        scores,
        scores.intervals(),
        scores.by_class(() if labels is None else labels.names),
        scores.slices(prepared.examples, columns),
        seconds,
    )
    if as_json:
        terminal.print_json(_as_json(opened, adapter, data, found))
    else:
        _show(opened, data, found)


def _show(opened: Opened, data: str, found: _Found) -> None:
    out, scores = terminal.stdout(), found.scores
    out.print(
        f"{data}: {terminal.counted(scores.examples, 'example')}; base {opened.base_line}; loss {terminal.loss(scores.loss)}, "
        f"{scores.examples / found.seconds:.1f} examples/s",
        soft_wrap=True,
    )
    out.print(terminal.table(("", "value", "95 % interval"), estimate_rows(found.overall)))
    if found.by_class:
        out.print()
        out.print(class_table(found.by_class))
    if found.by_slice:
        out.print()
        out.print(slice_table(found.by_slice))


def _as_json(opened: Opened, adapter: str | None, data: str, found: _Found) -> dict[str, Any]:
    """Return what is printed: each metric at the top, its interval beside it, the classes and the slices."""
    base = opened.bank.base
    numbers = {
        "schema_version": _SCHEMA_VERSION,
        "adapter": opened.label if adapter else None,
        "model": base.name,
        "base_fingerprint": base.fingerprint,
        "dtype": str(base.dtype).removeprefix("torch."),
        "device": str(base.device),
        "task": opened.task,
        "data": data,
        **found.scores.as_dict(),
        "intervals": {name: [one.low, one.high] for name, one in found.overall.items()},
        "slices": [
            {**asdict(one), "scores": {name: asdict(score) for name, score in one.scores.items()}}
            for one in found.by_slice
        ],
        "seconds": found.seconds,
        "examples_per_s": found.scores.examples / found.seconds,
    }
    return {**numbers, "classes": [asdict(one) for one in found.by_class]} if found.by_class else numbers
