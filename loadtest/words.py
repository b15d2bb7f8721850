"""How figures are written in every report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flightline.loadtest.confidence import Ratio
from flightline.loadtest.metrics import Distribution
from flightline.loadtest.result import Cell, Comparison, Result, TrialResult


def number(value: float | None, scale: float = 1.0) -> str:
    """Three significant digits, without an exponent, two decimals at most; n/a for None."""
    if value is None:
        return "n/a"
    value *= scale
    for limit, digits in ((9.995, 2), (99.95, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"


TITLES = {
    "output_tokens_per_s": "output throughput",
    "ttft_p50": "TTFT p50",
    "tpot_p50": "TPOT p50",
    "e2e_p50": "E2E p50",
}


def time_of(values: Distribution, percentile: str) -> str:
    """In milliseconds, or in seconds from ten on; n/a with the reason."""
    value = getattr(values, percentile)
    if value is None:
        return f"n/a (n={values.n})"
    return f"{number(value)} s" if value >= 10 else f"{number(value, 1e3)} ms"


def _lost(cell: Cell) -> tuple[int, int, int]:
    return cell.summary.failed, cell.summary.wrong_length, cell.summary.cut_off


def with_unit(value: float | None, scale: float = 1.0, *, unit: str) -> str:
    return "n/a" if value is None else f"{number(value, scale)} {unit}"


ROWS: list[tuple[str, Callable[[Cell], str]]] = [
    ("output tokens/s", lambda c: number(c.summary.output_tokens_per_s)),
    ("total tokens/s", lambda c: number(c.summary.total_tokens_per_s)),
    ("requests/s", lambda c: number(c.summary.requests_per_s)),
    ("TTFT p50", lambda c: time_of(c.summary.ttft_s, "p50")),
    ("TTFT p90", lambda c: time_of(c.summary.ttft_s, "p90")),
    ("TTFT p99", lambda c: time_of(c.summary.ttft_s, "p99")),
    ("TPOT p50", lambda c: time_of(c.summary.tpot_s, "p50")),
    ("TPOT p99", lambda c: time_of(c.summary.tpot_s, "p99")),
    ("ITL p99", lambda c: time_of(c.summary.gap_s, "p99")),
    ("worst stall", lambda c: time_of(c.summary.stall_s, "worst")),
    ("E2E p50", lambda c: time_of(c.summary.e2e_s, "p50")),
    ("E2E p99", lambda c: time_of(c.summary.e2e_s, "p99")),
    ("E2E mean, by Little's law", lambda c: with_unit(c.mean_e2e_s, unit="s")),
    ("NTPOT p50", lambda c: time_of(c.summary.ntpot_s, "p50")),
    ("per-user speed p50", lambda c: with_unit(c.summary.user_tokens_per_s.p50, unit="tokens/s")),
    ("kept the SLO", lambda c: percent(c.summary.attained)),
    ("goodput", lambda c: with_unit(c.summary.goodput_per_s, unit="requests/s")),
    ("samples", lambda c: str(c.summary.e2e_s.n)),
    ("input / output tokens, mean", lambda c: f"{number(c.summary.input_tokens)} / {number(c.summary.output_tokens)}"),
    ("failed / wrong length / cut off", lambda c: " / ".join(map(str, _lost(c)))),
    ("CPU of the machine", lambda c: with_unit(c.utilisation.cpu_percent, unit="%")),
    ("cores that the server kept busy", lambda c: number(c.utilisation.server_cores)),
    ("KV cache in use", lambda c: percent(c.utilisation.series.get("kv_used"))),
    ("requests in a step, mean", lambda c: number(c.utilisation.series.get("batch"))),
    ("GPU utilisation", lambda c: with_unit(c.utilisation.gpu_percent, unit="%")),
    ("GPU memory of the model", lambda c: with_unit(c.utilisation.memory_mib_of(c.endpoint), 1 / 1024, unit="GiB")),
    ("GPU power", lambda c: with_unit(c.utilisation.gpu_power_w, unit="W")),
    ("energy per output token", lambda c: with_unit(c.joules_per_token, 1e3, unit="mJ")),
    ("cost of a million output tokens", lambda c: with_unit(c.cost_per_million, unit="$")),
]  # fmt: skip
AUDIT: list[tuple[str, Callable[[Cell], str]]] = [
    ("outside the server's own TTFT, p50", lambda c: time_of(c.summary.outside_s, "p50")),
    ("outside the server's own TTFT, p99", lambda c: time_of(c.summary.outside_s, "p99")),
    ("time stamps late, p99", lambda c: with_unit(c.health.lag_p99_ms, unit="ms")),
    ("requests sent late, p99", lambda c: with_unit(c.health.schedule_delay_p99_ms, unit="ms")),
    ("busiest worker, cores", lambda c: number(c.health.cpu)),
    ("workers", lambda c: str(c.health.workers)),
]  # fmt: skip


def percent(share: float | None) -> str:
    return "n/a" if share is None else f"{number(share, 100)} %"


def rows_of(
    cells: Sequence[Cell], rows: Sequence[tuple[str, Callable[[Cell], str]]]
) -> list[tuple[str, list[str]]]:
    """Rows with something to say in at least one column."""
    made = [(title, [show(cell) for cell in cells]) for title, show in rows]
    return [(title, shown) for title, shown in made if any(not text.startswith("n/a") for text in shown)]


def _counted(values: Distribution, percentile: str, scale: float = 1.0) -> str:
    """With the number of samples, and the worst of them where they are too few."""
    value = getattr(values, percentile)
    if value is None and values.worst is not None:
        return f"n/a (n={values.n}, worst {number(values.worst, scale)})"
    return f"{number(value, scale)} (n={values.n})"


PAIR: list[tuple[str, Callable[[Cell], str], str]] = [
    ("Output throughput (tokens/s)", lambda c: number(c.summary.output_tokens_per_s), "output_tokens_per_s"),
    ("Requests/s", lambda c: number(c.summary.requests_per_s), ""),
    ("Latency p50 (s)", lambda c: _counted(c.summary.e2e_s, "p50"), "e2e_p50"),
    ("Latency p99 (s)", lambda c: _counted(c.summary.e2e_s, "p99"), ""),
    ("Latency mean, by Little's law (s)", lambda c: number(c.mean_e2e_s), ""),
    ("TTFT p50 (s)", lambda c: number(c.summary.ttft_s.p50), "ttft_p50"),
    ("TTFT p99 (s)", lambda c: _counted(c.summary.ttft_s, "p99"), ""),
    ("TPOT p50 (ms)", lambda c: number(c.summary.tpot_s.p50, 1e3), "tpot_p50"),
    ("TPOT p99 (ms)", lambda c: _counted(c.summary.tpot_s, "p99", 1e3), ""),
    ("CPU, whole machine (%)", lambda c: number(c.utilisation.cpu_percent), ""),
    ("Server processes (cores busy)", lambda c: number(c.utilisation.server_cores), ""),
    ("GPU utilisation (%)", lambda c: number(c.utilisation.gpu_percent), ""),
    ("GPU memory of the model (GiB)", lambda c: number(c.utilisation.memory_mib_of(c.endpoint), 1 / 1024), ""),
]  # fmt: skip
"""Two contestants under one load, side by side: title, figure, and the metric whose ratio stands beside it."""


def pair_of(result: Result) -> list[tuple[str, ...]] | None:
    """The table of :data:`PAIR`, its head first and the contestant under test before the one that it is compared
    with; None if these are not two contestants under one load.
    """
    if len(result.cells) != 2 or not result.comparisons:
        return None
    first, second = result.cells
    if first.level != second.level:
        return None
    ratios = {found.metric: found.ratio for found in result.comparisons if found.condition == first.level}
    rows: list[tuple[str, ...]] = [("", f"`{second.arm}`", f"`{first.arm}`", "ratio")]
    for title, show, metric in PAIR:
        ratio = ratios.get(metric)
        rows.append((title, show(second), show(first), f"{ratio_text(ratio, '**')}" if ratio else ""))
    return rows


def interval_text(ratio: Ratio) -> str:
    """``95 %: 9.5–10.1, n=3``."""
    if ratio.low is None:
        return f"n={ratio.n}, no interval"
    limits = f"{number(ratio.low)}–{number(ratio.high)}"
    return f"{limits} in one round" if ratio.n == 1 else f"95 %: {limits}, n={ratio.n}"


def ratio_text(ratio: Ratio, bold: str = "") -> str:
    """``9.8× (95 %: 9.5–10.1, n=3)``."""
    if ratio.value is None:
        return "n/a"
    return f"{bold}{number(ratio.value)}×{bold} ({interval_text(ratio)})"


def busy_cores(result: Result) -> dict[str, str]:
    """What kept the cores busy, by contestant and load."""
    found = {}
    for cell in result.cells:
        uses = cell.utilisation.cores_by_process.items()
        busy = ", ".join(f"{name} {number(cores)}" for name, cores in uses if cores > 0.005)
        if busy:
            found[f"cores busy during {cell.arm}, {cell.level}"] = busy
    return found


REPEATS = ("repeat", "load", "planned s", "window s", "tokens/s", "TTFT p50 ms", "TPOT p50 ms", "E2E p50 s", "answered",
           "cut off", "failed")  # fmt: skip


def repeat_cells(trial: TrialResult) -> tuple[str, ...]:
    """A line of the table with the head :data:`REPEATS`."""
    return (
        trial.name,
        trial.level,
        number(trial.planned_s),
        number(trial.window_s),
        number(trial.output_tokens_per_s),
        number(trial.ttft_p50_s, 1e3),
        number(trial.tpot_p50_s, 1e3),
        number(trial.e2e_p50_s),
        str(trial.answered),
        str(trial.cut_off),
        str(trial.failed),
    )


def comparison_title(found: Comparison) -> str:
    return f"{TITLES[found.metric]}, {found.condition}"


def value_text(metric: str, value: float | None) -> str:
    if value is None:
        return "n/a"
    if metric == "output_tokens_per_s":
        return f"{number(value)} tokens/s"
    return f"{number(value)} s" if value >= 10 else f"{number(value, 1e3)} ms"


def ceiling_text(result: Result) -> str:
    ceiling = result.ceiling
    assert ceiling is not None
    late = f", {number(ceiling.delay_p99_ms)} ms late at p99" if ceiling.delay_p99_ms is not None else ""
    return (
        f"At a full core, one worker takes in {number(ceiling.tokens_per_s)} tokens/s on this machine "
        f"({number(ceiling.us_per_token)} µs each); measured before this run against a null server: "
        f"{number(ceiling.measured_per_s)} tokens/s from {ceiling.streams} streams{late}. "
        f"Runs above 60 % of the ceiling are INVALID."
    )


def search_line(result: Result) -> str:
    found = result.search
    assert found is not None
    if found.max_rate is None:
        return f"No rate holds the SLO, not even {number(found.fails_at)} requests/s ({found.trials} trials)."
    fails = f"; {number(found.fails_at)} breaks it" if found.fails_at else ""
    ended = f"({found.trials} trials, ended by {found.limit})"
    return f"**{number(found.max_rate)} requests/s** hold the SLO{fails} {ended}."


def flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {flat(inner)}" for name, inner in value.items() if inner != "")
    if isinstance(value, list):
        return "; ".join(flat(item) for item in value)
    return "not known (the server was started elsewhere)" if value is None else str(value)
