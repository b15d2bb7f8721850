"""A finished run as data, as Markdown and as files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

from loadtest.config import COMPARISON, LATEST
from loadtest.metrics import P50_SAMPLES, P99_SAMPLES, Distribution, Ratio, Summary
from loadtest.telemetry import Utilisation


@dataclass(frozen=True)
class BlockResult:
    """One block of load, for the reader who wants to see the spread."""

    name: str
    planned_s: float
    summary: Summary


@dataclass(frozen=True)
class Report:
    """Everything that ``report.json`` holds; times in seconds."""

    reasons: list[str]
    """Why the run is INVALID; empty if it is VALID."""
    limits: list[str]
    """What a VALID run does not show."""
    candidate: Summary
    baseline: Summary
    ratios: dict[str, Ratio]
    """``throughput``, ``e2e_p50``, ``ttft_p50``, ``tpot_p50``: above 1 the candidate is better."""
    utilisation: dict[str, Utilisation]
    """Endpoint -> means over its windows."""
    blocks: list[BlockResult]
    conditions: dict
    notes: list[str] = field(default_factory=list)
    unsteady: list[str] = field(default_factory=list)
    """Why the run is UNSTEADY: the same load gave very different figures."""

    @property
    def valid(self) -> bool:
        return not self.reasons and not self.unsteady

    @property
    def state(self) -> str:
        return "INVALID" if self.reasons else "UNSTEADY" if self.unsteady else "VALID"

    @property
    def verdict(self) -> str:
        if not self.valid:
            return f"{self.state}: " + "; ".join([*self.reasons, *self.unsteady])
        return "; ".join(["VALID", *self.limits])

    def mean_latency_s(self, summary: Summary) -> float | None:
        """Mean latency of the closed loop by Little's law: requests in flight over requests/s."""
        rate = summary.requests_per_s
        return self.conditions["settings"]["concurrency"] / rate if rate else None

    @property
    def utilisation_has_gpu(self) -> bool:
        return any(use.gpu_percent is not None for use in self.utilisation.values())

    def as_dict(self) -> dict:
        return {"verdict": self.state, **asdict(self)}


def number(value: float | None, scale: float = 1.0) -> str:
    """Three significant digits, without an exponent, two decimals at most; n/a for None."""
    if value is None:
        return "n/a"
    value *= scale
    for limit, digits in ((9.995, 2), (99.95, 1)):
        if abs(value) < limit:
            return f"{value:.{digits}f}"
    return f"{value:.0f}"


def times(value: Ratio | None) -> str:
    """``9.8× (9.5–10.1)``: pooled, and the spread over pairs of neighbouring blocks."""
    if value is None or value.value is None:
        return "n/a"
    text = f"**{number(value.value)}×**"
    return text if value.low is None else f"{text} ({number(value.low)}–{number(value.high)})"


def p99(values: Distribution, scale: float) -> str:
    if values.p99 is None:
        return f"n/a (n={values.n}, worst {number(values.worst, scale)})" if values.n else "n/a (n=0)"
    return f"{number(values.p99, scale)} (n={values.n})"


def table(report: Report) -> str:
    """The comparison as a Markdown table."""
    a, b = report.candidate, report.baseline
    use = [report.utilisation.get(summary.endpoint, Utilisation(None, None)) for summary in (a, b)]
    rows: list[tuple[str, str, str, str]] = []

    def row(label: str, show: Callable[[Summary], str], ratio: str = "") -> None:
        rows.append((label, show(a), show(b), times(report.ratios.get(ratio)) if ratio else ""))

    def use_row(label: str, show: Callable[[Utilisation], str]) -> None:
        rows.append((label, show(use[0]), show(use[1]), ""))

    row("Output throughput (tokens/s)", lambda s: number(s.output_tokens_per_s), "throughput")
    row("Requests/s", lambda s: number(s.requests_per_s))
    row("Latency p50 (s)", lambda s: f"{number(s.e2e_s.p50)} (n={s.e2e_s.n})", "e2e_p50")
    row("Latency p99 (s)", lambda s: p99(s.e2e_s, 1))
    row("Latency mean, by Little's law (s)", lambda s: number(report.mean_latency_s(s)))
    row("TTFT p50 (s)", lambda s: number(s.ttft_s.p50), "ttft_p50")
    row("TTFT p99 (s)", lambda s: p99(s.ttft_s, 1))
    row("TPOT p50 (ms)", lambda s: number(s.tpot_s.p50, 1e3), "tpot_p50")
    row("TPOT p99 (ms)", lambda s: p99(s.tpot_s, 1e3))
    use_row("CPU, whole machine (%)", lambda u: number(u.cpu_percent))
    use_row("Server processes (cores busy)", lambda u: number(u.server_cores))
    use_row("GPU utilisation (%)", lambda u: number(u.gpu_percent))
    memory = [number(u.memory_mib_of(s.endpoint), 1 / 1024) for u, s in zip(use, (a, b), strict=True)]
    rows.append(("GPU memory of the model (GiB)", memory[0], memory[1], ""))
    head = [("", f"`{a.endpoint}`", f"`{b.endpoint}`", "ratio (spread)"), ("---", "--:", "--:", "--:")]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in head + rows)


def markdown(report: Report) -> str:
    """The report as a page; its first line is the verdict."""
    settings = report.conditions["settings"]
    parts = [
        report.verdict,
        f"# {report.candidate.endpoint} against {report.baseline.endpoint}",
        f"{settings['concurrency']} requests in flight, {settings['output_tokens']} output tokens each, "
        f"{report.conditions['created']}",
        table(report),
        "A ratio above 1 is in favour of the first endpoint. Its value is that of the pooled measurements; "
        "the spread is over pairs of neighbouring blocks.",
        f"![comparison]({COMPARISON})" if report.valid else "",
        "## Blocks",
        _blocks(report.blocks),
        "## Conditions",
        _conditions(report),
        "## Definitions",
        DEFINITIONS.format(p50=P50_SAMPLES, p99=P99_SAMPLES),
    ]
    if report.notes:
        parts += ["## Notes", "\n".join(f"- {note}" for note in report.notes)]
    return "\n\n".join(part for part in parts if part) + "\n"


DEFINITIONS = """\
- **Window** of a block: from its first completed request to its last. The burst that starts a block is
  ramp and not steady state.
- **Output throughput**: output tokens that arrived in the windows, counted by the server, over the
  windows' time.
- **Latency** (end to end): from sending a request to its last response with outputs. Only requests sent
  inside a window count, and none sent after the oldest one that the block's end cut off.
- **Little's law**: in a closed loop the mean latency is the requests in flight over the requests/s. It needs
  no request to begin and end in a window, and is no measurement besides the throughput.
- **TTFT**: from sending to the first text that is not empty.
- **TPOT**: (latency - TTFT) / (output tokens - output tokens in the first response).
- **p50, p99**: of the raw samples of all blocks together; p50 from {p50} samples on, p99 from {p99}.
- **Outside the model**: client TTFT minus the model's own (arrival to first token), both per request: what
  the load generator, the transport and Triton add."""


def _blocks(blocks: list[BlockResult]) -> str:
    lines = [
        "| block | planned s | window s | answered | cut off | tokens/s | latency p50 s | outside p50 ms |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for block in blocks:
        s = block.summary
        cells = (
            block.name,
            number(block.planned_s),
            number(s.window_s),
            str(s.completed),
            str(s.cut_off),
            number(s.output_tokens_per_s),
            f"{number(s.e2e_s.p50)} (n={s.e2e_s.n})",
            number(s.outside_s.p50, 1e3),
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _conditions(report: Report) -> str:
    given = report.conditions
    lines = [f"- {name}: {_flat(value)}" for name, value in given.items() if name != "created"]
    for endpoint, use in report.utilisation.items():
        busy = ", ".join(
            f"{name} {number(cores)}" for name, cores in use.cores_by_process.items() if cores > 0.005
        )
        if busy:
            lines.append(f"- cores busy during {endpoint}: {busy}")
    return "\n".join(lines)


def _flat(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {inner}" for name, inner in value.items() if inner != "")
    return "not known (the server was started elsewhere)" if value is None else str(value)


def publish(work: Path, reports: Path, report: Report, name: str) -> Path:
    """Writes the report into ``work``, gives the folder its name, and points ``reports/latest`` at it."""
    (work / "report.json").write_text(json.dumps(report.as_dict(), indent=2) + "\n", encoding="utf-8")
    (work / "report.md").write_text(markdown(report), encoding="utf-8")
    target = reports / name
    work.rename(target)
    link = reports / f".{LATEST}.{os.getpid()}"
    link.symlink_to(name)
    link.replace(reports / LATEST)
    return target
