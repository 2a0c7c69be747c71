"""What a run prints at its end."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from rich.console import Console

from onebase.cli.summary import show_result
from onebase.measure.judge import TaskScores


def test_each_score_stands_beside_itself_where_one_is_undefined_at_one_end() -> None:
    """F1 of several labels is, as long as none occurs and none is predicted."""
    nothing = np.zeros((2, 3))
    before: dict[str, float] = {"accuracy": 0.5, "macro_f1": 0.25, "ece": 0.125}
    ends = [before, {"accuracy": 0.75, "ece": 0.0625}]
    problem: Any = "multi_label_classification"
    scores: Any = {
        step: TaskScores(problem, 1.0 - step / 8, metrics, 2, 9, nothing, nothing)
        for step, metrics in zip((0, 4), ends, strict=True)
    }
    result: Any = SimpleNamespace(
        valid_loss=0.5, valid_loss_before=1.0, best_step=None, steps=4, peak_rss_bytes=1, peak_device_bytes=0,
        seconds=1.0, examples_per_s=1.0, tokens_per_s=1.0, train_loss=1.0, adapter_bytes=1,
    )  # fmt: skip
    out = Console(record=True, width=100)
    show_result(out, result, scores, Path("run"), "classify")
    shown = [line.split() for line in out.export_text().splitlines()]
    assert ["macro", "F1", "0.2500", "-"] in shown
    assert ["ECE", "0.1250", "0.0625"] in shown
