"""Where a training step's time and memory go, as `onebase train --profile` shows it."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from onebase.cli import terminal

if TYPE_CHECKING:
    from rich.console import Console

    from onebase.train.profiling import Profile


def show_profile(out: "Console", found: "Profile", folder: Path) -> None:
    """Print the parts of a step, what its products would take alone, and what stands in memory."""
    rows = [
        _row(f"{line.part}, {line.way}" if line.way else line.part, line.seconds, line.flop, found.profiled_seconds)
        for line in found.lines
    ]
    rows.append(_row("a step, profiled", found.profiled_seconds, found.flop, found.profiled_seconds))
    out.print()
    out.print(terminal.table(("part", "ms", "share", "GFLOP", "GFLOP/s"), rows))
    out.print()
    out.print(terminal.facts(_facts(found, folder)))


def _row(name: str, seconds: float, flop: int, whole: float) -> tuple[str, ...]:
    products = (_giga(flop), _giga(flop / seconds)) if flop else ("", "")
    return name, f"{1000 * seconds:,.1f}", f"{100 * seconds / whole:.1f} %", *products


def _giga(number: float) -> str:
    """Return a number in thousand millions, with three digits that count."""
    value = number / 1e9
    return f"{value:,.{min(max(2 - math.floor(math.log10(value)), 0), 6)}f}"


def _facts(found: "Profile", folder: Path) -> Iterator[tuple[str, str]]:
    yield (
        "a step",
        f"{1000 * found.seconds:,.1f} ms without the profiler, the mean of {found.steps}; {found.tokens:,.0f} tokens "
        f"computed, the largest micro-batch {found.largest_micro_batch_tokens:,}",
    )
    rows, inner, columns = found.product
    yield (
        "products",
        f"{_giga(found.flop)} GFLOP a step; {_giga(found.flop_per_s)} GFLOP/s measured here, {found.dtype} "
        f"({rows:,} x {inner:,}) ({inner:,} x {columns:,}): at least {1000 * found.floor_seconds:,.1f} ms, "
        f"{terminal.percent(found.floor_seconds / found.seconds)} of the step",
    )
    size, held = terminal.size, found.memory
    yield (
        "memory",
        f"{size(held.base)} base, {size(held.adapter)} adapter, {size(held.optimizer)} optimiser state; in a step up to "
        f"{size(held.step)} more: activations, and {size(held.gradients)} of gradients",
    )
    whole = "on the device" if found.device.startswith("cuda") else "of the process, with Python and its libraries"
    yield "peak", f"{size(held.peak)} {whole}"
    yield "written", f"{folder}: profile.json, and trace.json.gz for https://ui.perfetto.dev"
