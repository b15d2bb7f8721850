"""Pictures for a README: bars and ratios of a comparison, curves of a sweep."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loadtest.report import Report, number
from loadtest.result import Result

CANDIDATE, BASELINE, INK, FAINT = "#5a9e0f", "#b8bec6", "#1d2733", "#6b7684"


def comparison(report: Report, path: Path) -> None:
    """Writes the PNG (1600 by 640 pixels). The report must be valid."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), dpi=160, facecolor="white")
    a, b = report.candidate, report.baseline
    names = [a.endpoint, b.endpoint]
    throughput, latency = report.ratios["throughput"].value, report.ratios["e2e_p50"].value
    seconds, meaning = [a.e2e_s.p50, b.e2e_s.p50], "median seconds until an answer is complete"
    if report.limits:  # as many requests in flight on either side: the means compare as the throughputs do
        latency, seconds = throughput, [report.mean_latency_s(a), report.mean_latency_s(b)]
        meaning = "mean seconds until an answer is complete, by Little's law"
    _bars(
        panels[0],
        names,
        [a.output_tokens_per_s, b.output_tokens_per_s],
        f"{number(throughput)}× the throughput",
        "output tokens per second",
        "tok/s",
    )
    _bars(
        panels[1],
        names,
        seconds,
        f"1/{number(latency)} of the latency",
        meaning,
        "s",
    )
    figure.text(0.04, 0.035, _footnote(report), fontsize=8.5, color=FAINT)
    figure.subplots_adjust(left=0.04, right=0.97, top=0.79, bottom=0.11, wspace=0.12)
    figure.savefig(path)
    plt.close(figure)


def _bars(
    axes: Axes, names: list[str], values: list[float | None], callout: str, subtitle: str, unit: str,
    shades: list[str] | None = None,
) -> None:  # fmt: skip
    """From top to bottom; each bar has its name above it and its value at its end."""
    positions, height = [float(i) for i in reversed(range(len(names)))], 0.46
    lengths = [value or 0.0 for value in values]
    axes.barh(positions, lengths, height=height, color=shades or [CANDIDATE, BASELINE])
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


def _footnote(report: Report) -> str:
    settings = report.conditions["settings"]
    load = f"{settings['concurrency']} requests in flight, {settings['output_tokens']} output tokens each"
    return _where(report.conditions, load, report.utilisation_has_gpu)


def _where(given: dict[str, Any], load: str, on_gpu: bool) -> str:
    hardware = given["hardware"]
    machine = hardware["gpu"] if on_gpu else f"{hardware['cores']} cores {hardware['cpu']}"
    served = ", ".join(str(given[name]) for name in ("model", "lane", "precision") if given.get(name))
    return "  ·  ".join(part for part in (served, load, machine, given["created"][:10]) if part)


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
    verdict = "" if result.valid else "INVALID  ·  "
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
    return _where(given, str(given.get("workload", "")), on_gpu)


def _levels(result: Result, arms: list[str], levels: list[str], shades: dict[str, str]) -> Figure:
    """A column for each load, the last contestant on top, with its ratio to the first."""
    figure, panels = plt.subplots(
        2, len(levels), figsize=(10, 2.2 + 1.9 * len(arms)), dpi=160, facecolor="white", squeeze=False
    )
    found = {(cell.arm, cell.level): cell.summary for cell in result.cells}
    shown = arms[::-1]
    for column, level in enumerate(levels):
        there = [found.get((arm, level)) for arm in shown]
        rates = [summary.output_tokens_per_s if summary else None for summary in there]
        medians = [summary.e2e_s.p50 if summary else None for summary in there]
        unit, scale = ("ms", 1e3) if max((m or 0.0 for m in medians), default=0.0) < 60 else ("s", 1.0)
        times = [None if m is None else m * scale for m in medians]
        for row, (values, metric, meaning, name) in enumerate(
            (
                (rates, "output_tokens_per_s", "output tokens/s", "tok/s"),
                (times, "e2e_p50", "median time until an answer is complete", unit),
            )
        ):
            ratio = _ratio(result, metric, level, arms)
            callout = ("{}× the throughput" if row == 0 else "1/{} of the latency").format(number(ratio))
            colours = [shades[arm] for arm in shown]
            subtitle = f"{level}: {meaning}"
            _bars(panels[row][column], shown, values, callout if ratio else "", subtitle, name, colours)
    height = figure.get_figheight()
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
