"""The report as one HTML file: nothing is loaded from anywhere, light and dark, readable on paper."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from flightline.loadtest import chart
from flightline.loadtest.chart import Line, Mark
from flightline.loadtest.definitions import DEFINITIONS
from flightline.loadtest.result import Comparison, Result
from flightline.loadtest.words import (
    AUDIT,
    REPEATS,
    ROWS,
    busy_cores,
    ceiling_text,
    comparison_title,
    flat,
    interval_text,
    number,
    ratio_text,
    repeat_cells,
    rows_of,
    search_line,
    time_of,
    value_text,
)

STYLE = Path(__file__).with_name("report.css")
TIMELINE_ORDER = (
    "Output tokens/s", "Requests in flight", "Requests in a step", "Requests waiting in the engine",
    "Requests waiting in Triton", "KV cache in use", "GPU utilisation", "SMs active", "Tensor cores active",
    "GPU memory active", "GPU power", "GPU clock (SM)", "GPU memory", "CPU of the machine",
    "CPU of the load generator", "Memory of the server", "Memory of the machine in use",
)  # fmt: skip
ACROSS = 4
"""So few loads stand across the page, more of them go down it."""
METRICS = {"ttft": "TTFT", "tpot": "TPOT", "e2e": "E2E", "stall": "Worst stall"}


def page(result: Result) -> str:
    """The whole file."""
    arms = list(dict.fromkeys(c.arm for c in result.cells))
    # The first of several is what the others are held against: it is grey.
    shift = 1 if len(arms) > 1 else 0
    colours = {arm: (i - shift) % chart.COLOURS for i, arm in enumerate(arms)}
    body = [
        _head(result),
        _assertions(result),
        _tiles(result),
        _ratios(result),
        _curves(result, colours),
        _figures(result),
        _distributions(result, colours),
        _timeline(result, colours),
        _audit(result),
        _repeats(result),
        _conditions(result),
    ]
    style = STYLE.read_text(encoding="utf-8")
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(result.title)}: {result.state}</title>\n"
        f"<style>\n{style}</style>\n</head>\n<body>\n<main>\n{''.join(filter(None, body))}</main>\n</body>\n</html>\n"
    )


def _section(title: str, *parts: str, about: str = "") -> str:
    inner = "".join(filter(None, parts))
    if not inner:
        return ""
    told = f'<p class="about">{escape(about)}</p>' if about else ""
    return f"<section>\n<h2>{escape(title)}</h2>{told}{inner}</section>\n"


def _head(result: Result) -> str:
    given = result.conditions
    served = " · ".join(str(given[name]) for name in ("model", "lane", "precision") if given.get(name))
    hardware = given.get("hardware") or {}
    machine = ""
    if hardware:
        gpu = hardware.get("gpu", "")
        machine = gpu if not gpu.startswith("no GPU") else f"{hardware['cores']} cores {hardware['cpu']}"
    facts = [*map(escape, filter(None, [served, machine, given.get("workload", "")]))]
    facts.append(f'<span class="whole">{escape(result.created.replace("T", " ")[:16])}</span>')
    reasons = "".join(f"<li>{escape(reason)}</li>" for reason in [*result.reasons, *result.unsteady])
    limits = "".join(f"<li>{escape(limit)}</li>" for limit in result.limits)
    return (
        f'<header><p class="verdict {result.state.lower()}">{result.state}</p><h1>{escape(result.title)}</h1>'
        f'<p class="facts">{" · ".join(facts)}</p>'
        + (f'<ul class="reasons">{reasons}</ul>' if reasons else "")
        + (f'<ul class="limits">{limits}</ul>' if limits else "")
        + "</header>\n"
    )


def _assertions(result: Result) -> str:
    rows = [
        (
            f'<span class="{"ok" if check.ok else "bad"}">{"holds" if check.ok else "fails"}</span>',
            escape(check.text),
            "not measured" if check.value is None else f"{check.value:.4g}",
        )
        for check in result.checked
    ]
    return _section("Assertions", _raw_table(("", "condition", "value"), rows)) if rows else ""


def _tiles(result: Result) -> str:
    """The few figures that one looks for first."""
    tiles: list[tuple[str, str, str]] = []
    if result.search:
        rate = result.search.max_rate
        tiles.append((number(rate), "requests/s hold the SLO", result.slo.describe()))
    for found in result.comparisons:
        if found.metric == "output_tokens_per_s" and found.ratio.value:
            whose = f"{found.second} against {found.first}, {interval_text(found.ratio)}"
            tiles.append((f"{number(found.ratio.value)}×", comparison_title(found), whose))
    if not tiles and len(result.cells) == 1:
        (cell,) = result.cells
        summary = cell.summary
        tiles = [
            (
                number(summary.output_tokens_per_s),
                "output tokens/s",
                f"{number(summary.requests_per_s)} requests/s",
            ),
            (time_of(summary.ttft_s, "p50"), "TTFT p50", f"p99 {time_of(summary.ttft_s, 'p99')}"),
            (time_of(summary.tpot_s, "p50"), "TPOT p50", f"p99 {time_of(summary.tpot_s, 'p99')}"),
            (time_of(summary.e2e_s, "p50"), "E2E p50", f"p99 {time_of(summary.e2e_s, 'p99')}"),
        ]
    shown = "".join(
        f'<div class="tile"><p class="big">{escape(big)}</p><p>{escape(what)}</p>'
        f'<p class="small">{escape(small)}</p></div>'
        for big, what, small in tiles[:8]
    )
    told = f'<p class="about">{escape(search_line(result).replace("**", ""))}</p>' if result.search else ""
    return f'<section class="tiles">{shown}</section>{told}\n' if shown else ""


def _ratios(result: Result) -> str:
    if not result.comparisons:
        return ""
    groups: dict[tuple[str, str], list[Comparison]] = {}
    for one in result.comparisons:
        groups.setdefault((one.first, one.second), []).append(one)
    parts = []
    for (first, second), found in groups.items():
        rows = [
            (comparison_title(c), c.ratio.value, c.ratio.low, c.ratio.high) for c in found if c.ratio.value
        ]
        table = _raw_table(
            ("", first, second, "ratio"),
            [
                (
                    escape(comparison_title(c)) + (f"<br><small>{escape(c.note)}</small>" if c.note else ""),
                    value_text(c.metric, c.first_value),
                    value_text(c.metric, c.second_value),
                    f"<b>{ratio_text(c.ratio)}</b>" if c.ratio.value else "n/a",
                )
                for c in found
            ],
        )
        figure = f'<figure class="ratios">{chart.intervals(rows)}</figure>' if rows else ""  # type: ignore[arg-type]
        parts.append(f"{figure}{table}")
    about = f"{DEFINITIONS['ratio'].capitalize()}."
    return _section("Ratios", *parts, about=about)


def _curves(result: Result, colours: dict[str, int]) -> str:
    """Latency and throughput over load, if there are several loads."""
    by_arm = {arm: [c for c in result.cells if c.arm == arm and c.x is not None] for arm in colours}
    if max((len(cells) for cells in by_arm.values()), default=0) < 2:
        return ""

    def figure(title: str, x, y, x_label: str, limits=(), log_x: bool = False, log_y: bool = False) -> str:
        drawn, marks = [], []
        for arm, cells in by_arm.items():
            usable = [cell for cell in cells if x(cell) is not None]
            drawn.append(
                Line(arm, [x(c) for c in usable], [y(c) for c in usable], colours[arm], dots=True,
                     labels=[f"{c.arm}, {c.level}: {number(x(c))} / {number(y(c))}" for c in usable])
            )  # fmt: skip
            knee = next((c for c in usable if result.knees.get(arm) == c.level), None)
            if knee and y(knee) is not None:
                marks.append(Mark(x(knee), y(knee), f"knee: {knee.level}", colours[arm]))
        drawn = [line for line in drawn if any(value is not None for value in line.y)]
        if not drawn:
            return ""
        svg = chart.lines(
            drawn, x_label=x_label, y_label=title, marks=marks, limits=limits, log_x=log_x, log_y=log_y
        )
        return f"<figure><figcaption>{escape(title)}</figcaption>{svg}</figure>"

    slo, closed = result.slo, result.cells[0].closed
    load = "requests in flight" if closed else "requests/s"
    spread = max(c.x or 1 for c in result.cells) >= 16 * min(c.x or 1 for c in result.cells)
    figures = [
        figure("E2E p50 (s) over output tokens/s", lambda c: c.summary.output_tokens_per_s,
               lambda c: c.summary.e2e_s.p50, "output tokens/s"),
        figure("Output tokens/s over load", lambda c: c.x, lambda c: c.summary.output_tokens_per_s, load, log_x=spread),
        figure("TTFT p50 (ms) over load", lambda c: c.x, lambda c: _ms(c.summary.ttft_s.p50), load,
               [(1e3 * slo.ttft_s, f"SLO {1e3 * slo.ttft_s:g} ms")], log_x=spread),
        figure("TPOT p50 (ms) over load", lambda c: c.x, lambda c: _ms(c.summary.tpot_s.p50), load,
               [(1e3 * slo.tpot_s, f"SLO {1e3 * slo.tpot_s:g} ms")], log_x=spread),
        figure("Goodput (requests/s) over load", lambda c: c.x, lambda c: c.summary.goodput_per_s, load, log_x=spread),
        figure("Speed for one user (tokens/s) over load", lambda c: c.x,
               lambda c: c.summary.user_tokens_per_s.p50, load, log_x=spread),
    ]  # fmt: skip
    about = f"Knee: {DEFINITIONS['knee']}. SLO {slo.name}: {slo.describe()}."
    return _charts("Curves", colours, figures, about)


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1e3 * seconds


def _charts(title: str, colours: dict[str, int], figures: Sequence[str], about: str) -> str:
    if not any(figures):
        return ""
    return _section(title, _legend(colours), f'<div class="grid">{"".join(figures)}</div>', about=about)


def _legend(colours: dict[str, int]) -> str:
    if len(colours) < 2:
        return ""
    keys = "".join(
        f'<span><i class="key c{colour}"></i>{escape(arm)}</span>' for arm, colour in colours.items()
    )
    return f'<p class="legend">{keys}</p>'


def _figures(result: Result) -> str:
    rows = rows_of(result.cells, ROWS)
    if len(result.cells) > ACROSS:
        wanted = {"output tokens/s", "requests/s", "TTFT p50", "TTFT p99", "TPOT p50", "TPOT p99", "worst stall",
                  "E2E p50", "kept the SLO", "goodput", "samples", "energy per output token"}  # fmt: skip
        rows = [(title, shown) for title, shown in rows if title in wanted]
        over = ["yes" if cell.over_capacity else "" for cell in result.cells]
        if any(over):
            rows.append(("over capacity", over))
    return _section(
        "Figures", _cells_table(result, rows), about=f"SLO {result.slo.name}: {result.slo.describe()}."
    )


def _cells_table(result: Result, rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    heads = [f"{c.arm}, {c.level}" for c in result.cells]
    if len(heads) <= ACROSS:
        return _table(["", *heads], [(title, *shown) for title, shown in rows])
    body = [(head, *(shown[i] for _, shown in rows)) for i, head in enumerate(heads)]
    return _table(["", *(title for title, _ in rows)], body)


def _distributions(result: Result, colours: dict[str, int]) -> str:
    figures = []
    levels = list(dict.fromkeys(d["level"] for d in result.distributions))
    several = len(levels) > 1
    for metric, title in METRICS.items():
        mine = [d for d in result.distributions if d["metric"] == metric and len(d["x"]) > 1]
        # Of many levels the lowest and the highest tell the story.
        mine = [d for d in mine if not several or d["level"] in (levels[0], levels[-1])]
        drawn = [
            Line(f"{d['arm']}, {d['level']}", [1e3 * x for x in d["x"]], d["y"], colours.get(d["arm"], 0),
                 dashed=several and d["level"] == levels[0])
            for d in mine
        ]  # fmt: skip
        if not drawn:
            continue
        xs = [x for line in drawn for x in line.x if x > 0]
        wide = bool(xs) and max(xs) > 50 * min(xs)
        svg = chart.lines(drawn, x_label="ms", y_label=title, shares=True, log_x=wide)
        figures.append(f"<figure><figcaption>{title}: share of requests below</figcaption>{svg}</figure>")
    about = f"Dashed: {levels[0]}; solid: {levels[-1]}." if several else ""
    return _charts("Distributions", colours, figures, about)


def _timeline(result: Result, colours: dict[str, int]) -> str:
    names = {line["name"] for line in result.timeline.get("lines", [])}
    figures = []
    for name in (name for name in TIMELINE_ORDER if name in names):
        mine = [line for line in result.timeline["lines"] if line["name"] == name]
        drawn = [
            Line(line["arm"] or name, result.timeline["t"], line["y"], colours.get(line["arm"], 0))
            for line in mine
        ]
        unit = f" ({mine[0]['unit']})" if mine[0]["unit"] else ""
        whole = 100.0 if mine[0]["unit"] == "%" else None
        svg = chart.lines(
            drawn, x_label="seconds since the first request", y_label=name, y_top=whole, x_tight=True
        )
        if svg:
            figures.append(f"<figure><figcaption>{escape(name + unit)}</figcaption>{svg}</figure>")
    about = "All on the client's clock; means over each step of the axis."
    return _charts("Timeline", colours, figures, about)


def _audit(result: Result) -> str:
    table = _cells_table(result, rows_of(result.cells, AUDIT))
    told = f"<p>{escape(ceiling_text(result))}</p>" if result.ceiling else ""
    about = "What the client adds to the figures. Beyond the limits a run is INVALID."
    return _section("The load generator itself", table, told, about=about)


def _repeats(result: Result) -> str:
    if len(result.trials) < 2:
        return ""
    rows = [repeat_cells(trial) for trial in result.trials]
    return _section("Repeats", _table(REPEATS, rows), about="In the order in which they ran.")


def _conditions(result: Result) -> str:
    def items(values: dict) -> str:
        return "".join(
            f"<dt>{escape(str(name))}</dt><dd>{escape(flat(value))}</dd>" for name, value in values.items()
        )

    notes = "".join(f"<li>{escape(note)}</li>" for note in result.notes)
    return (
        _section("Notes", f"<ul>{notes}</ul>" if notes else "")
        + _section("Conditions", f"<dl>{items({**result.conditions, **busy_cores(result)})}</dl>")
        + _section("Definitions", f"<dl>{items(DEFINITIONS)}</dl>")
    )


def _table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    return _raw_table(head, [[escape(cell) for cell in row] for row in body])


def _raw_table(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """``body`` is HTML already, ``head`` is not."""
    top = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    rows = "".join(
        f"<tr><th>{row[0]}</th>{''.join(f'<td>{cell}</td>' for cell in row[1:])}</tr>" for row in body
    )
    return f'<div class="scroll"><table><thead><tr>{top}</tr></thead><tbody>{rows}</tbody></table></div>'
