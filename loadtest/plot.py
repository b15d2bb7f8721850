"""Pictures for a README: bars and ratios of a comparison, curves of a sweep."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from flightline.loadtest.result import Result
from flightline.loadtest.words import number

CANDIDATE, BASELINE, INK, FAINT = "#5a9e0f", "#b8bec6", "#1d2733", "#6b7684"


def _bars(
    axes: Axes, names: list[str], values: list[float | None], callout: str, subtitle: str, unit: str,
    shades: list[str],
) -> None:  # fmt: skip
    """From top to bottom; each bar has its name above it and its value at its end."""
    positions, height = [float(i) for i in reversed(range(len(names)))], 0.46
    lengths = [value or 0.0 for value in values]
    axes.barh(positions, lengths, height=height, color=shades)
    axes.set_xlim(0, 1.4 * max(*lengths, 1e-9))
    axes.set_ylim(-0.4, len(names) - 0.4)
    axes.set_axis_off()
    for position, name, value in zip(positions, names, values, strict=True):
        axes.text(0, position + height / 2 + 0.06, name, fontsize=10.5, color=INK, va="bottom")
        axes.annotate(
            f"{_value(value)} {unit}" if value is not None else "n/a", (value or 0.0, position), xytext=(7, 0),
            textcoords="offset points", va="center", fontsize=13, fontweight="bold", color=INK,
        )  # fmt: skip
    axes.text(0, 1.135, callout, transform=axes.transAxes, fontsize=19, fontweight="bold", color=CANDIDATE)
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=10.5, color=FAINT)


def _value(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else number(value)


BARS_UP_TO = 2
"""Levels of a comparison that are shown as bars: a line through so few points would say what was not measured."""


def summary(result: Result, path: Path) -> None:
    """Throughput and latency over load, or of each contestant, as a PNG for a README (1600 pixels wide)."""
    arms = list(dict.fromkeys(cell.arm for cell in result.cells))
    levels = list(dict.fromkeys(cell.level for cell in result.cells))
    shades = dict(zip(arms, [CANDIDATE, "#1c6fd1", "#b4540a", "#8a3fbf"] * len(arms), strict=False))
    if len(arms) > 1:
        shades |= {arms[0]: BASELINE, arms[-1]: CANDIDATE}
    as_bars = len(arms) > 1 and len(levels) <= BARS_UP_TO
    figure = _levels(result, arms, levels, shades) if as_bars else _curves(result, arms, shades)
    verdict = "" if result.valid else f"{result.state}  ·  "
    height = figure.get_figheight()
    title = verdict + result.title
    figure.text(0.04, 1 - 0.3 / height, title, fontsize=13, fontweight="bold", color=INK, va="center")
    figure.text(0.04, 0.14 / height, _conditions(result), fontsize=8.5, color=FAINT, va="center")
    figure.savefig(path)
    plt.close(figure)


def _conditions(result: Result) -> str:
    given = result.conditions
    if "hardware" not in given:  # two saved runs, each with conditions of its own
        return result.created[:10]
    on_gpu = any(cell.utilisation.gpu_percent is not None for cell in result.cells)
    hardware = given["hardware"]
    machine = hardware["gpu"] if on_gpu else f"{hardware['cores']} cores {hardware['cpu']}"
    served = ", ".join(str(given[name]) for name in ("model", "lane", "precision") if given.get(name))
    parts = (served, str(given.get("workload", "")), machine, given["created"][:10])
    return "  ·  ".join(filter(None, parts))


def _levels(result: Result, arms: list[str], levels: list[str], shades: dict[str, str]) -> Figure:
    """Two panels for each load, side by side if it is the only one; the last contestant, with its ratio, on top."""
    rows, columns = (1, 2) if len(levels) == 1 else (2, len(levels))
    height = 2.4 + 0.8 * len(arms) if rows == 1 else 2.2 + 1.9 * len(arms)
    figure, panels = plt.subplots(rows, columns, figsize=(10, height), dpi=160, facecolor="white")
    shown = arms[::-1]
    colours = [shades[arm] for arm in shown]
    for (rate_panel, time_panel), level in zip([panels] if rows == 1 else panels.T, levels, strict=True):
        cells = [next((c for c in result.cells if (c.arm, c.level) == (arm, level)), None) for arm in shown]
        rates = [c.summary.output_tokens_per_s if c else None for c in cells]
        faster = _ratio(result, "output_tokens_per_s", level, arms)
        callout = f"{number(faster)}× the throughput" if faster else ""
        _bars(rate_panel, shown, rates, callout, f"{level}: output tokens/s", "tok/s", colours)
        sooner, meaning = _ratio(result, "e2e_p50", level, arms), "median time until an answer is complete"
        times = [c.summary.e2e_s.p50 if c else None for c in cells]
        if None in times and faster:  # as many in flight on either side: the means compare as the rates do
            sooner, meaning = faster, "mean time of an answer (Little's law)"
            times = [c.mean_e2e_s if c else None for c in cells]
        unit, scale = ("ms", 1e3) if max((t or 0.0 for t in times), default=0.0) < 60 else ("s", 1.0)
        callout = f"1/{number(sooner)} of the latency" if sooner else ""
        subtitle = f"{level}: {meaning}"
        scaled = [None if t is None else t * scale for t in times]
        _bars(time_panel, shown, scaled, callout, subtitle, unit, colours)
    top, bottom = 1 - 1.15 / height, 0.3 / height
    figure.subplots_adjust(left=0.04, right=0.98, top=top, bottom=bottom, wspace=0.1, hspace=0.5)
    return figure


def _ratio(result: Result, metric: str, level: str, arms: list[str]) -> float | None:
    wanted = (metric, level, arms[0], arms[-1])
    for c in result.comparisons:
        if (c.metric, c.condition, c.first, c.second) == wanted:
            return c.ratio.value
    return None


def _curves(result: Result, arms: list[str], shades: dict[str, str]) -> Figure:
    """Over the load; the knee is ringed."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), dpi=160, facecolor="white")
    figures = (
        ("output tokens per second", lambda cell: cell.summary.output_tokens_per_s),
        (
            "TTFT p50, ms",
            lambda cell: 1e3 * cell.summary.ttft_s.p50 if cell.summary.ttft_s.p50 is not None else None,
        ),
    )
    loads = sorted({cell.x for cell in result.cells if cell.x})
    for axes, (title, value) in zip(panels, figures, strict=True):
        for arm in arms:
            mine = [c for c in result.cells if c.arm == arm and c.x is not None and value(c) is not None]
            if mine:
                xs, ys = [c.x for c in mine], [value(c) for c in mine]
                axes.plot(xs, ys, marker="o", color=shades[arm], label=arm, linewidth=2)
            for cell in mine:
                if cell.level == result.knees.get(arm):
                    at = (cell.x, value(cell))
                    axes.plot(*at, "o", markersize=14, fillstyle="none", color=shades[arm])
                    axes.annotate("knee", at, (0, -20), textcoords="offset points", color=INK, fontsize=9)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel(
            "requests in flight" if result.cells[0].closed else "requests/s", fontsize=9, color=FAINT
        )
        if loads and loads[-1] >= 16 * loads[0]:
            axes.set_xscale("log", base=2)
            axes.set_xticks(loads, [f"{load:g}" for load in loads])
            axes.minorticks_off()
        axes.yaxis.set_major_formatter(lambda y, _: f"{y:,g}")
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=9, colors=FAINT)
        axes.grid(axis="y", color="#e6eaee")
        axes.spines[["top", "right", "left"]].set_visible(False)
    if len(arms) > 1:
        panels[0].legend(frameon=False, fontsize=9)
    figure.subplots_adjust(left=0.06, right=0.98, top=0.82, bottom=0.18, wspace=0.16)
    return figure
