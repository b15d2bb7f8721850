"""A result as files and on the console: JSON, HTML, Markdown, CSV and a picture."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path

from flightline.loadtest import html, plot
from flightline.loadtest.definitions import DEFINITIONS
from flightline.loadtest.metrics import Distribution
from flightline.loadtest.options import COMPARISON
from flightline.loadtest.result import Cell, Comparison, Result
from flightline.loadtest.words import (
    AUDIT,
    REPEATS,
    ROWS,
    busy_cores,
    ceiling_text,
    comparison_title,
    flat,
    pair_of,
    ratio_text,
    repeat_cells,
    rows_of,
    search_line,
    value_text,
)

LATEST = "latest"
"""Name of the link to the newest report."""


def picture(result: Result) -> str:
    """The picture's file name; empty if the result has none, as that of a ``bench`` which is not VALID."""
    if result.kind == "bench":
        return COMPARISON if result.valid else ""
    return "summary.png" if any(cell.summary.output_tokens_per_s for cell in result.cells) else ""


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *body]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def markdown(result: Result, base: str = "") -> str:
    """The whole report; its first line is the verdict."""
    parts = [
        result.verdict,
        f"# {result.title}",
        f"{result.created} · SLO {result.slo.name}: {result.slo.describe()}",
    ]
    if result.checked:
        rows = [(c.text, "n/a" if c.value is None else f"{c.value:.4g}", "holds" if c.ok else "**fails**")
                for c in result.checked]  # fmt: skip
        parts += ["## Assertions", _table(("condition", "value", ""), rows)]
    if result.search:
        parts.append(search_line(result))
    if pair := pair_of(result):
        parts += [_table(pair[0], pair[1:])]
    if result.trials and (name := picture(result)):
        parts.append(f"![{result.title}]({base}{name})")
    if result.comparisons:
        parts += ["## Ratios", _ratio_table(result.comparisons), f"Ratio: {DEFINITIONS['ratio']}."]
    parts += ["## Figures", _table(["", *(f"{c.arm}, {c.level}" for c in result.cells)],
                                   [(t, *shown) for t, shown in rows_of(result.cells, ROWS)])]  # fmt: skip
    if not result.comparisons:
        for arm, level in result.knees.items():
            parts.append(f"Knee of {arm}: {level}.")
    for cell in result.cells:
        if cell.over_capacity:
            parts.append(f"{cell.arm} at {cell.level} is over capacity: {cell.over_capacity}.")
    heads = ["", *(f"{c.arm}, {c.level}" for c in result.cells)]
    audited = [(title, *shown) for title, shown in rows_of(result.cells, AUDIT)]
    parts += ["## The load generator itself", _table(heads, audited)]
    if result.ceiling:
        parts.append(ceiling_text(result))
    if result.trials:
        parts += ["## Repeats", _table(REPEATS, [repeat_cells(trial) for trial in result.trials])]
    conditions = {**result.conditions, **busy_cores(result)}
    parts += ["## Conditions", "\n".join(f"- {name}: {flat(value)}" for name, value in conditions.items())]
    if result.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in result.notes)]
    parts += ["## Definitions", "\n".join(f"- **{name}**: {text}." for name, text in DEFINITIONS.items())]
    return "\n\n".join(parts) + "\n"


def _ratio_table(found: Sequence[Comparison]) -> str:
    rows = [
        (
            comparison_title(c),
            f"{c.first}: {value_text(c.metric, c.first_value)}",
            f"{c.second}: {value_text(c.metric, c.second_value)}",
            f"**{ratio_text(c.ratio)}**" if c.ratio.value else c.note or "n/a",
        )
        for c in found
    ]
    return _table(("", "first", "second", "ratio"), rows)


def write_csv(result: Result, path: Path) -> None:
    """One line per contestant and load, with every figure in SI units."""
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        flat_cells = [_columns(cell) for cell in result.cells]
        names = list(dict.fromkeys(name for columns in flat_cells for name in columns))
        writer.writerow(["verdict", *names])
        for columns in flat_cells:
            writer.writerow([result.state, *(columns.get(name, "") for name in names)])


def _columns(cell: Cell) -> dict[str, object]:
    columns: dict[str, object] = {
        name: getattr(cell, name) for name in ("arm", "endpoint", "level", "repeats")
    }
    for name, value in vars(cell.summary).items():
        if isinstance(value, Distribution):
            columns |= {
                f"{name}_{part}": getattr(value, part)
                for part in ("n", "mean", "p50", "p90", "p95", "p99", "worst")
            }
        elif name != "endpoint":
            columns[name] = value
    for name in (
        "cpu_percent",
        "server_cores",
        "gpu_percent",
        "gpu_memory_mib",
        "gpu_power_w",
        "gpu_energy_j",
    ):
        columns[name] = getattr(cell.utilisation, name)
    columns["model_memory_mib"] = cell.utilisation.memory_mib_of(cell.endpoint)
    columns |= {name: cell.utilisation.series[name] for name in cell.utilisation.series}
    columns |= {"joules_per_token": cell.joules_per_token, "cost_per_million": cell.cost_per_million}
    columns |= {"slo_held": cell.slo_held, "over_capacity": bool(cell.over_capacity)}
    return columns


def console(result: Result, folder: Path) -> str:
    """What is printed at the end."""
    lines = ["", *_overview(result)]
    if result.search:
        lines.append(search_line(result).replace("**", ""))
    lines += [f"knee of {arm}: {level}" for arm, level in result.knees.items() if result.kind == "sweep"]
    for check in result.checked:
        value = "not measured" if check.value is None else f"{check.value:.4g}"
        lines.append(f"assert {check.text}: {'ok' if check.ok else 'FAILED'} ({value})")
    return "\n".join([*lines, "", result.verdict, f"report: {folder / 'report.html'}"])


def _overview(result: Result) -> list[str]:
    """A pair side by side, or a line for each contestant and load."""
    if pair := pair_of(result):
        return _table(pair[0], pair[1:]).splitlines()
    lines = []
    width = max((len(f"{c.arm}, {c.level}") for c in result.cells), default=0) + 2
    wanted = ("output tokens/s", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "E2E p50", "kept the SLO")
    shown = dict(rows_of(result.cells, ROWS))
    keys = [key for key in wanted if key in shown]
    lines.append(" " * width + "".join(f"{key:>18}" for key in keys))
    for index, cell in enumerate(result.cells):
        name = f"{cell.arm}, {cell.level}"
        over = "  over capacity" if cell.over_capacity else ""
        lines.append(f"{name:<{width}}" + "".join(f"{shown[key][index]:>18}" for key in keys) + over)
    for found in result.comparisons:
        if found.metric == "output_tokens_per_s" or found.metric == "ttft_p50":
            title = f"{found.second} against {found.first}, {comparison_title(found)}"
            lines.append(f"{title}: {ratio_text(found.ratio) if found.ratio.value else found.note or 'n/a'}")
    return lines


def publish(result: Result, work: Path, reports: Path, name: str) -> Path:
    """Writes the reports into ``work``, gives the folder its name, and points ``reports/latest`` at it."""
    result.save(work / "report.json")
    (work / "report.md").write_text(markdown(result), encoding="utf-8")
    (work / "report.html").write_text(html.page(result), encoding="utf-8")
    write_csv(result, work / "figures.csv")
    if name_of_picture := picture(result):
        plot.summary(result, work / name_of_picture)
    folder = reports / name
    number_ = 1
    while folder.exists():
        number_ += 1
        folder = reports / f"{name}-{number_}"
    work.rename(folder)
    link = reports / f".{LATEST}.{os.getpid()}"
    link.symlink_to(folder.name)
    link.replace(reports / LATEST)
    return folder
