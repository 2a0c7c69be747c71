"""Laws of the moving line: it fits the terminal it is on, and goes away."""

import contextlib
import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from onebase.cli import terminal, watching
from onebase.config.reading import settings_from
from onebase.train.progress import Plan, StepRecord

PLAN = Plan(
    model="tiny", dtype="float32", device="cpu", steps=123_456, first_step=0, examples=8, tokens=80, labelled_tokens=40,
    valid_examples=0, batch_size=4, micro_batch_tokens=1024, learning_rate=1e-3, warmup_steps=3, threads=1,
    trainable_parameters=100, total_parameters=1000, gradient_bytes=400, optimizer_bytes=800, adapter_bytes=400,
    layout="flat",
)  # fmt: skip


def _record(step, loss=2.0, labels=10):
    return StepRecord(
        step=step,
        loss=loss,
        learning_rate=1e-4,
        grad_norm=1.0,
        examples=4,
        tokens=1_000,
        labelled_tokens=labels,
        seconds=0.02,
    )


def _watched(monkeypatch, width, interactive=True):
    console = Console(file=io.StringIO(), width=width, force_terminal=interactive, color_system=None)
    monkeypatch.setattr(terminal, "stdout", lambda: console)
    seen = watching.Watching(settings_from({"model": "tiny", "data": {"train": __file__}}), Path("run"))
    return seen, console


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_moving_line_fits_the_terminal(monkeypatch, width):
    seen, console = _watched(monkeypatch, width)
    with seen:
        seen.started(PLAN)
        seen.stepped(_record(120_000))
        line = console.render_lines(seen._moving_line(_record(120_000)), pad=False)
    text = "".join(segment.text for segment in line[0]).rstrip()
    assert len(line) == 1
    assert "left" in text and "loss 2.0000" in text and "\u2026" not in text
    assert ("\u2501" in text) == (width > 80)


def test_the_bar_keeps_its_place_when_the_numbers_get_shorter(monkeypatch):
    seen, console = _watched(monkeypatch, 120)
    places = set()
    with seen:
        seen.started(PLAN)
        for step, seconds in ((1, 400.0), (2, 3.0), (123_455, 0.02), (123_456, 0.02)):
            record = replace(_record(step), seconds=seconds)
            seen._recent.clear()
            seen.stepped(record)
            (line,) = console.render_lines(seen._moving_line(record), pad=False)
            places.add("".join(segment.text for segment in line).index("loss"))
    assert len(places) == 1


def test_losses_shown_together_are_means_over_labelled_tokens(monkeypatch):
    seen, _ = _watched(monkeypatch, 200, interactive=False)
    with seen:
        seen.started(PLAN)
        numbers = seen._numbers
        seen.stepped(_record(1))
        assert numbers([_record(1, loss=1.0, labels=30), _record(2, loss=5.0, labels=10)])[0] == "loss 2.0000"


def test_the_line_is_gone_after_an_error(monkeypatch):
    seen, console = _watched(monkeypatch, 100)
    with contextlib.suppress(ZeroDivisionError), seen:
        seen.started(PLAN)
        seen.stepped(_record(1))
        assert console._live_stack
        raise ZeroDivisionError
    assert console._live_stack == []
