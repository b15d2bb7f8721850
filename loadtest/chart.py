"""Charts as inline SVG: colours come from the page's style sheet, so they follow its light and dark schemes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 480, 230
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 12, 38
COLOURS = 6
"""Classes ``c0`` ... of the style sheet."""


@dataclass(frozen=True)
class Line:
    """One line; None in ``y`` is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int
    dots: bool = False
    labels: Sequence[str] = ()
    """Shown when the mouse rests on a dot."""
    dashed: bool = False


@dataclass(frozen=True)
class Mark:
    """A point with words, like a knee."""

    x: float
    y: float
    text: str
    colour: int


def lines(
    drawn: Sequence[Line],
    *,
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    limits: Sequence[tuple[float, str]] = (),
    log_x: bool = False,
    log_y: bool = False,
    y_top: float | None = None,
    x_tight: bool = False,
    shares: bool = False,
) -> str:
    """An SVG element.

    Args:
        limits: (y, words) of horizontal lines.
        y_top: the axis ends there, whatever little is above it.
        x_tight: the axis is as long as the lines' ``x``, where there is data and where there is none.
        shares: y goes from 0 to 1 and is shown in percent.
    """
    xs = [x for line in drawn for x, y in zip(line.x, line.y, strict=True) if x_tight or y is not None]
    ys = [y for line in drawn for y in line.y if y is not None]
    if not ys:
        return ""
    # A limit far above the data would press the data flat; then it is named and not drawn.
    shown = [limit for limit in limits if limit[0] <= 3 * max(ys)]
    x_axis = _Axis.over(min(xs), max(xs), LEFT, WIDTH - RIGHT, log_x, tight=x_tight)
    top = 1.0 if shares else y_top or max([*ys, *(y for y, _ in shown)])
    y_axis = _Axis.over(min(ys) if log_y else 0.0, top, HEIGHT - BOTTOM, TOP, log_y)
    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(y_label)}">']
    parts += [_y_tick(y_axis, value, shares) for value in y_axis.ticks()]
    parts += [_x_tick(x_axis, value) for value in x_axis.ticks()]
    parts.append(f'<text class="label" x="{LEFT}" y="{HEIGHT - 4}">{escape(x_label)}</text>')
    for y, words in shown:
        at = y_axis.at(y)
        parts.append(f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        beside = at - 4 if at > TOP + 10 else at + 13
        parts.append(
            f'<text class="label" x="{WIDTH - RIGHT}" y="{beside:.1f}" text-anchor="end">{escape(words)}</text>'
        )
    for line in drawn:
        parts += _line(line, x_axis, y_axis)
    for mark in marks:
        x, y = x_axis.at(mark.x), y_axis.at(mark.y)
        anchor, dx = ("end", -10) if x > WIDTH * 0.6 else ("start", 10)
        parts.append(f'<circle class="mark c{mark.colour}" cx="{x:.1f}" cy="{y:.1f}" r="8"/>')
        parts.append(
            f'<text class="word" x="{x + dx:.1f}" y="{y - 9:.1f}" text-anchor="{anchor}">{escape(mark.text)}</text>'
        )
    return "".join([*parts, "</svg>"])


def _line(line: Line, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    paths, pen = [], False
    for x, y in zip(line.x, line.y, strict=True):
        if y is None:
            pen = False
            continue
        paths.append(f"{'L' if pen else 'M'}{x_axis.at(x):.1f} {y_axis.at(y):.1f}")
        pen = True
    dash = " dashed" if line.dashed else ""
    parts = [f'<path class="line{dash} c{line.colour}" d="{"".join(paths)}"/>']
    if line.dots:
        labels = line.labels or [""] * len(line.x)
        for x, y, words in zip(line.x, line.y, labels, strict=True):
            if y is not None:
                parts.append(
                    f'<circle class="dot c{line.colour}" cx="{x_axis.at(x):.1f}" cy="{y_axis.at(y):.1f}" r="3.6">'
                    f"<title>{escape(words)}</title></circle>"
                )
    return parts


def intervals(rows: Sequence[tuple[str, float, float | None, float | None]]) -> str:
    """Ratios with their intervals on a logarithmic axis with a line at 1; rows are (words, value, low, high)."""
    values = [v for _, value, low, high in rows for v in (value, low, high) if v]
    if not values:
        return ""
    row_height, left, width = 26, 236, 720
    height = row_height * len(rows) + 26
    axis = _Axis.over(min(0.8, *values) * 0.95, max(1.25, *values) * 1.05, left, width - RIGHT, True)
    parts = [f'<svg class="chart" viewBox="0 0 {width} {height}" role="img" aria-label="ratios">']
    for value in axis.ticks():
        at = axis.at(value)
        parts.append(f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="{height - 20}"/>')
        parts.append(
            f'<text class="tick" x="{at:.1f}" y="{height - 6}" text-anchor="middle">{tick(value)}×</text>'
        )
    at = axis.at(1.0)
    parts.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="4" y2="{height - 20}"/>')
    for index, (words, value, low, high) in enumerate(rows):
        y = row_height * index + 16
        parts.append(f'<text class="word" x="0" y="{y + 4}">{escape(words)}</text>')
        if low and high:
            parts.append(
                f'<line class="bar c0" x1="{axis.at(low):.1f}" x2="{axis.at(high):.1f}" y1="{y}" y2="{y}"/>'
            )
        parts.append(f'<circle class="dot c0" cx="{axis.at(value):.1f}" cy="{y}" r="4.5"/>')
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Axis:
    """From values to places."""

    low: float
    high: float
    start: float
    end: float
    log: bool

    @classmethod
    def over(cls, low: float, high: float, start: float, end: float, log: bool, tight: bool = False) -> _Axis:
        if log and low > 0:
            return cls(low, high if high > low else low * 2, start, end, True)
        if not low < high:
            low, high = (0.0, 1.0) if high == 0 else (min(0.0, low), high if high > 0 else 1.0)
        if low < high and not log and not tight:
            step = nice_step((high - low) / 4)
            low, high = math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step
        return cls(low, high, start, end, False)

    def at(self, value: float) -> float:
        if self.log:
            share = math.log(max(value, 1e-12) / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + min(1.02, share) * (self.end - self.start)

    def ticks(self) -> list[float]:
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
                found = [s * 10.0**d for d in decades for s in steps if self.low <= s * 10.0**d <= self.high]
                if len(found) >= 3:
                    break
            return found[:: math.ceil(len(found) / 8)] if found else [self.low]
        step = nice_step((self.high - self.low) / 4)
        return [self.low + i * step for i in range(math.floor((self.high - self.low) / step + 1e-9) + 1)]


def nice_step(rough: float) -> float:
    """The least of 1, 2, 2.5, 5 times a power of ten that is not below."""
    power = 10.0 ** math.floor(math.log10(rough))
    return next(f * power for f in (1, 2, 2.5, 5, 10) if f * power >= rough * 0.999)


def _y_tick(axis: _Axis, value: float, shares: bool) -> str:
    at = axis.at(value)
    words = f"{100 * value:.0f} %" if shares else tick(value)
    return (
        f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
        f'<text class="tick" x="{LEFT - 6}" y="{at + 4:.1f}" text-anchor="end">{words}</text>'
    )


def _x_tick(axis: _Axis, value: float) -> str:
    at = axis.at(value)
    return f'<text class="tick" x="{at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick(value)}</text>'


def tick(value: float) -> str:
    """Short: 12500 is 12.5k."""
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.4g}"
