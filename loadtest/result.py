"""What a run found, as data: the one source of every report. ``SCHEMA.md`` describes its JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from flightline.loadtest.assertions import TIMES, Assertion, Checked
from flightline.loadtest.audit import Ceiling, ClientHealth
from flightline.loadtest.confidence import Ratio, samples_needed
from flightline.loadtest.definitions import DEFINITIONS
from flightline.loadtest.metrics import Summary
from flightline.loadtest.slo import Slo
from flightline.loadtest.telemetry import Utilisation

SCHEMA = "flightline/loadtest/1"


@dataclass(frozen=True)
class Cell:
    """One contestant under one load, all repeats together."""

    arm: str
    endpoint: str
    level: str
    x: float | None
    """The load as a number: requests in flight, or requests/s."""
    closed: bool
    repeats: int
    summary: Summary
    health: ClientHealth
    utilisation: Utilisation
    joules_per_token: float | None
    cost_per_million: float | None
    """Dollars for a million output tokens."""
    slo_held: bool | None
    """None: too few samples for the SLO's percentile."""
    over_capacity: str = ""
    """Why the load is more than the contestant holds; empty if it is not."""

    @property
    def mean_e2e_s(self) -> float | None:
        """Mean latency of a closed loop by Little's law: requests in flight over requests/s."""
        rate = self.summary.requests_per_s
        return self.x / rate if self.closed and self.x and rate else None


@dataclass(frozen=True)
class TrialResult:
    """One repeat, for the reader who wants to see the spread; seconds since the first request."""

    name: str
    arm: str
    level: str
    round: int
    start_s: float
    end_s: float
    output_tokens_per_s: float | None
    ttft_p50_s: float | None
    tpot_p50_s: float | None
    e2e_p50_s: float | None
    answered: int
    cut_off: int
    failed: int
    planned_s: float | None = None

    @property
    def window_s(self) -> float:
        return self.end_s - self.start_s


@dataclass(frozen=True)
class Comparison:
    """Second against first, in one figure."""

    metric: str
    """``output_tokens_per_s``, ``ttft_p50``, ``tpot_p50`` or ``e2e_p50``."""
    condition: str
    """``16 in flight``, ``each at its best`` or ``at the SLO``."""
    first: str
    second: str
    first_value: float | None
    second_value: float | None
    ratio: Ratio
    note: str = ""


@dataclass(frozen=True)
class Search:
    """Highest rate that holds the SLO."""

    max_rate: float | None
    """Requests/s; None: not even the lowest rate tried holds it."""
    fails_at: float | None
    """Lowest rate seen to break it."""
    trials: int
    limit: str
    """What ended the search."""


@dataclass
class Result:
    """A whole run."""

    kind: str
    title: str
    created: str
    reasons: list[str]
    """Why the run is INVALID; empty if it is VALID."""
    limits: list[str]
    """What a valid run does not show."""
    notes: list[str]
    slo: Slo
    ceiling: Ceiling | None
    cells: list[Cell]
    trials: list[TrialResult] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    knees: dict[str, str] = field(default_factory=dict)
    """Contestant -> the level at its knee."""
    search: Search | None = None
    checked: list[Checked] = field(default_factory=list)
    """Assertions."""
    timeline: dict = field(default_factory=dict)
    """``t`` (s since the first request) and series of that length under ``lines``; None: not measured."""
    distributions: list[dict] = field(default_factory=list)
    """``arm``, ``level``, ``metric``, and the curve: values ``x`` (s) with the share ``y`` of requests below."""
    conditions: dict = field(default_factory=dict)
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
        """The first line of every report."""
        if not self.valid:
            return f"{self.state}: " + "; ".join([*self.reasons, *self.unsteady])
        return "; ".join(["VALID", *self.limits])

    @property
    def status(self) -> int:
        """Exit status: 0, 1 if INVALID or UNSTEADY, 3 if an assertion does not hold."""
        if not self.valid:
            return 1
        return 0 if all(check.ok for check in self.checked) else 3

    def as_dict(self) -> dict:
        return {
            "schema": SCHEMA,
            "verdict": self.state,
            **asdict(self),
            "definitions": DEFINITIONS,
        }

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(self.as_dict(), indent=2, allow_nan=False) + "\n", encoding="utf-8")

    def value_of(self, name: str) -> float | None:
        """What an assertion's name stands for: the worst value of the cells, or a ratio.

        ``ratio`` is the last comparison's output throughput; ``ratio_ttft_p50`` and the like its latencies.
        """
        if name == "max_rate":
            return self.search.max_rate if self.search else None
        if name.startswith("ratio"):
            metric = name.removeprefix("ratio_") if name != "ratio" else "output_tokens_per_s"
            values = [c.ratio.value for c in self.comparisons if c.metric == metric]
            return values[-1] if values else None
        values = [_cell_value(cell, name) for cell in self.cells]
        if not values or any(value is None for value in values):
            return None
        known = [value for value in values if value is not None]
        higher_is_better = name.endswith("_per_s") or name == "attained"
        return min(known) if higher_is_better else max(known)

    def check(self, assertions: Sequence[Assertion]) -> None:
        self.checked = [
            Checked(assertion.text, value, assertion.holds(value))
            for assertion in assertions
            for value in [self.value_of(assertion.name)]
        ]


def _cell_value(cell: Cell, name: str) -> float | None:
    summary = cell.summary
    if name == "error_rate":
        ended = summary.completed + summary.failed
        return summary.failed / ended if ended else None
    if name in ("joules_per_token", "cost_per_million"):
        return getattr(cell, name)
    time, _, percentile = name.rpartition("_")
    if time in TIMES:
        return getattr(getattr(summary, f"{time}_s"), percentile)
    return getattr(summary, name)


def slo_held(summary: Summary, slo: Slo) -> bool | None:
    """Whether enough of the requests kept the limits, and there are enough to say so."""
    if summary.attained is None:
        return None
    if summary.attained < slo.percent / 100:
        return False
    enough = slo.percent >= 100 or summary.e2e_s.n >= samples_needed(slo.percent)
    return True if enough else None


def knee(cells: Sequence[Cell]) -> Cell | None:
    """Where throughput over latency is highest: more load buys waiting and little else.

    Kleinrock, "Power and deterministic rules of thumb for probabilistic problems in computer
    communications", 1979.
    """
    usable = [
        c for c in cells if c.summary.output_tokens_per_s and c.summary.e2e_s.p50 and not c.over_capacity
    ]
    if len(usable) < 3:
        return None
    return max(usable, key=lambda c: (c.summary.output_tokens_per_s or 0) / (c.summary.e2e_s.p50 or 1))


def curve(samples: Sequence[float], points: int = 60) -> tuple[list[float], list[float]]:
    """Values and the share of samples at or below them: the empirical distribution, thinned out."""
    shares = np.linspace(0, 1, min(points, len(samples)))
    return [float(value) for value in np.quantile(samples, shares)], [float(share) for share in shares]
