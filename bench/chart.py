"""Plain SVG for the benches' plots: axes, dots, whiskers, bars and text; nothing to install."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

_BLUE, _GREY = "#1f6feb", "#8b949e"


@dataclass(frozen=True)
class Axis:
    """From values to places between `start` and `stop`, linear or logarithmic."""

    low: float
    high: float
    start: float
    stop: float
    log: bool = False

    @staticmethod
    def of(values: Sequence[float], start: float, stop: float, *, log: bool = False) -> Axis:
        """Return an axis that holds all values (above 0 where it is logarithmic)."""
        low, high = min(values), max(values)
        return Axis(low, high, start, stop, log)

    def __call__(self, value: float) -> float:
        """Return a value's place."""
        low, high, value = (math.log10(max(v, 1e-12)) if self.log else v for v in (self.low, self.high, value))
        share = 0.5 if high == low else (value - low) / (high - low)
        return round(self.start + share * (self.stop - self.start), 1)

    def marks(self) -> list[float]:
        """Return the values that are written at the axis: powers of ten, or a few even steps."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high) + 1e-9)
            return [10.0**power for power in range(first, last + 1)] or [self.low]
        return sorted({self.low, (self.low + self.high) / 2, self.high})


class Chart:
    """A drawing that grows by what is put on it."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self._parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
            'font-size="12">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
        ]
        self._labels: list[tuple[float, float, int]] = []
        self.text(width / 2, 28, title, size=14)

    def text(self, x: float, y: float, words: str, *, anchor: str = "middle", size: int = 12, turn: str = "") -> None:
        """Write words at a place; `turn` is an SVG transformation."""
        turned = f' transform="{turn}"' if turn else ""
        self._parts.append(
            f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}"{turned}>{escape(words)}</text>'
        )

    def scatter_axes(self, x: Axis, y: Axis, x_title: str, y_title: str) -> None:
        """Draw two axes with their marks and titles."""
        for value in x.marks():
            self._line(x(value), y.start, x(value), y.stop, "#eaeef2")
            self.text(x(value), y.start + 34, f"{value:,.0f}")
        for value in y.marks():
            self.text(x.start - 12, y(value) + 4, f"{value:.3f}", anchor="end")
        self.text((x.start + x.stop) / 2, y.start + 54, x_title)
        middle = (y.start + y.stop) / 2
        self.text(26, middle, y_title, turn=f"rotate(-90 26 {middle})")

    def dot(self, x: float, y: float, label: str) -> None:
        """Draw a dot with its name beside it, moved down where another name is already."""
        self._parts.append(f'<circle cx="{x}" cy="{y}" r="4" fill="{_BLUE}"/>')
        place = y + 4
        while any(
            abs(place - other) < 13 and x < end and left < x + 7 * len(label) for left, other, end in self._labels
        ):
            place += 13
        self._labels.append((x, place, round(x + 7 * len(label))))
        self.text(x + 8, place, label, anchor="start")

    def whisker(self, x: float, low: float, high: float) -> None:
        """Draw a spread upright."""
        self._line(x, low, x, high, _BLUE)

    def span(self, left: float, right: float, y: float) -> None:
        """Draw a spread lying."""
        self._line(left, y, right, y, "black")

    def bar(self, left: float, right: float, y: float, words: str) -> None:
        """Draw a lying bar with words behind it."""
        width = max(right - left, 1)
        self._parts.append(f'<rect x="{left}" y="{y - 6}" width="{width}" height="12" fill="{_GREY}" opacity="0.5"/>')
        self.text(left + width + 6, y + 4, words, anchor="start", size=11)

    def svg(self) -> str:
        """Return the drawing."""
        return "\n".join([*self._parts, "</svg>\n"])

    def _line(self, x1: float, y1: float, x2: float, y2: float, colour: str) -> None:
        self._parts.append(f'<line x1="{x1}" y1="{y1}" x2="{x2}" y2="{y2}" stroke="{colour}" stroke-width="1.5"/>')
