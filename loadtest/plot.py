"""The comparison at a glance: two bars for throughput, two for latency, and the ratios."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

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
    axes: Axes, names: list[str], values: list[float | None], callout: str, subtitle: str, unit: str
) -> None:
    """Candidate above, baseline below; each bar has its name above it and its value at its end."""
    positions, height, lengths = [1.0, 0.0], 0.46, [value or 0.0 for value in values]
    axes.barh(positions, lengths, height=height, color=[CANDIDATE, BASELINE])
    axes.set_xlim(0, 1.32 * max(lengths))
    axes.set_ylim(-0.4, 1.6)
    axes.set_axis_off()
    for position, name, value in zip(positions, names, lengths, strict=True):
        axes.text(0, position + height / 2 + 0.06, name, fontsize=10.5, color=INK, va="bottom")
        axes.annotate(
            f"{number(value)} {unit}", (value, position), xytext=(7, 0), textcoords="offset points",
            va="center", fontsize=13, fontweight="bold", color=INK,
        )  # fmt: skip
    axes.text(0, 1.135, callout, transform=axes.transAxes, fontsize=19, fontweight="bold", color=CANDIDATE)
    axes.text(0, 1.03, subtitle, transform=axes.transAxes, fontsize=10.5, color=FAINT)


def _footnote(report: Report) -> str:
    given, settings = report.conditions, report.conditions["settings"]
    hardware = given["hardware"]
    where = hardware["gpu"] if report.utilisation_has_gpu else f"{hardware['cores']} cores {hardware['cpu']}"
    served = ", ".join(str(given[name]) for name in ("model", "lane", "precision") if given[name])
    load = f"{settings['concurrency']} requests in flight, {settings['output_tokens']} output tokens each"
    return "  ·  ".join(part for part in (served, load, where, given["created"][:10]) if part)


def summary(result: Result, path: Path) -> None:
    """Throughput and latency over load, or of each contestant, as a PNG for a README (1600 by 640 pixels)."""
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), dpi=160, facecolor="white")
    arms = list(dict.fromkeys(cell.arm for cell in result.cells))
    shades = dict(zip(arms, [CANDIDATE, "#1c6fd1", "#b4540a", "#8a3fbf"] * len(arms), strict=False))
    if len(arms) > 1:
        shades[arms[0]] = BASELINE
    figures = (
        ("output tokens per second", lambda cell: cell.summary.output_tokens_per_s),
        (
            "TTFT p50, ms",
            lambda cell: 1e3 * cell.summary.ttft_s.p50 if cell.summary.ttft_s.p50 is not None else None,
        ),
    )
    for axes, (title, value) in zip(panels, figures, strict=True):
        for arm in arms:
            points = [(c.x, value(c)) for c in result.cells if c.arm == arm and c.x is not None]
            points = [(x, y) for x, y in points if y is not None]
            if points:
                axes.plot(*zip(*points, strict=True), marker="o", color=shades[arm], label=arm, linewidth=2)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel(
            "requests in flight" if result.cells[0].closed else "requests/s", fontsize=9, color=FAINT
        )
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=9, colors=FAINT)
        axes.grid(axis="y", color="#e6eaee")
        axes.spines[["top", "right", "left"]].set_visible(False)
    if panels[0].get_legend_handles_labels()[0]:
        panels[0].legend(frameon=False, fontsize=9)
    verdict = "" if result.valid else "INVALID  ·  "
    figure.text(0.04, 0.93, verdict + result.title, fontsize=13, fontweight="bold", color=INK)
    figure.subplots_adjust(left=0.06, right=0.98, top=0.82, bottom=0.14, wspace=0.16)
    figure.savefig(path)
    plt.close(figure)
