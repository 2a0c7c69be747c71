"""The benches' plots as SVG: the same bytes from the same numbers, and text that stays text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib as mpl

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save(figure: Figure, path: Path) -> None:
    """Write a figure."""
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": "onebase"}):
        figure.savefig(path, format="svg", bbox_inches="tight", metadata={"Date": None})
