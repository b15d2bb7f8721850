"""What the live page shows: running totals and histograms of every endpoint, in the master's process."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from flightline.loadtest.definitions import P99_SAMPLES
from flightline.loadtest.histogram import Histogram
from flightline.loadtest.records import ClientSample, RequestRecord

RECENT_S = 10.0
MAX_CPU = 0.6
"""Of a core, for one worker process: beyond it, tokens wait for the client (measured)."""
MAX_LAG_MS = 10.0
HISTORY_POINTS = 600
"""Kept of each endpoint, a second apart at first; of a longer run every second one, and so on."""


def brief(record: RequestRecord) -> dict:
    """The part of a record that live figures need, small enough to send from workers at any load."""
    return {
        "endpoint": record.endpoint,
        "tokens": record.num_output_tokens or 0,
        "problem": record.problem,
        "error": record.error is not None,
        "delay_s": record.schedule_delay_s,
        "ttft_s": record.ttft_s if record.complete else None,
        "tpot_s": record.tpot_s if record.complete else None,
        "e2e_s": record.e2e_s if record.complete else None,
    }


@dataclass
class EndpointLive:
    """Totals since the start, and the last seconds."""

    ttft_s: Histogram = field(default_factory=Histogram)
    tpot_s: Histogram = field(default_factory=Histogram)
    e2e_s: Histogram = field(default_factory=Histogram)
    answered: int = 0
    failed: int = 0
    wrong: int = 0
    problem: str = ""
    recent: deque[tuple[float, int, float | None, float | None]] = field(default_factory=deque)
    """(monotonic seconds, output tokens, TTFT, TPOT) of the requests that ended lately."""

    def add(self, told: dict, now_s: float) -> None:
        if told["problem"]:
            self.failed += told["error"]
            self.wrong += not told["error"]
            self.problem = told["problem"]
        if told["e2e_s"] is None:
            return
        self.answered += 1
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            if told[name] is not None:
                getattr(self, name).add(told[name])
        self.recent.append((now_s, told["tokens"], told["ttft_s"], told["tpot_s"]))

    def snapshot(self, now_s: float, seconds: float) -> dict:
        """Figures for the page; times in seconds. ``seconds`` have passed since the start."""
        while self.recent and self.recent[0][0] < now_s - RECENT_S:
            self.recent.popleft()
        span = max(1e-9, min(RECENT_S, seconds))
        late = {name: Histogram(row[i] for row in self.recent if row[i] is not None)  # type: ignore[misc]
                for i, name in ((2, "ttft_s"), (3, "tpot_s"))}  # fmt: skip
        figures: dict = {
            "answered": self.answered,
            "failed": self.failed,
            "wrong": self.wrong,
            "tokens_per_s": sum(row[1] for row in self.recent) / span,
            "requests_per_s": len(self.recent) / span,
        }
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            histogram: Histogram = getattr(self, name)
            figures[name] = {
                "n": histogram.n,
                "p50": histogram.percentile(50),
                "p99": histogram.percentile(99) if histogram.n >= P99_SAMPLES else None,
                "recent_p50": late[name].percentile(50) if name in late else None,
            }
        return figures


class Live:
    """Fed by the workers' messages, read by the page."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.started_s: float | None = None
        self.ended_s: float | None = None
        self.endpoints: dict[str, EndpointLive] = {}
        self.clients: dict[int, tuple[ClientSample, float]] = {}
        """Worker -> its last sample, and its use of a core before it."""
        self.lags_ms = Histogram()
        self.delays_s = Histogram()
        self.lost_workers = 0
        self.history: dict[str, list[dict]] = {}
        """Endpoint -> points of the charts since the start, so that a page opened later shows them too."""
        self._history_step_s, self._history_due_s = 1.0, 0.0

    def start(self, endpoints: Iterable[str] = ()) -> None:
        """``endpoints`` are all contestants: a slow one is shown before its first answer."""
        self.reset()
        self.started_s = time.monotonic()
        self.endpoints = {name: EndpointLive() for name in endpoints}

    def add(self, told: dict) -> None:
        self.endpoints.setdefault(told["endpoint"], EndpointLive()).add(told, time.monotonic())
        self.delays_s.add(told["delay_s"])

    def sample(self, sample: ClientSample) -> None:
        before, use = self.clients.get(sample.worker, (None, 0.0))
        if before is not None and sample.time_ns > before.time_ns:
            use = (sample.cpu_s - before.cpu_s) / ((sample.time_ns - before.time_ns) / 1e9)
        self.clients[sample.worker] = (sample, use)
        for lag_ms in sample.lags_ms:
            self.lags_ms.add(lag_ms / 1e3)
        if self.started_s is not None and self.ended_s is None:
            self._remember(time.monotonic() - self.started_s)

    def _remember(self, seconds: float) -> None:
        """Adds a point to the history when one is due."""
        if seconds < self._history_due_s:
            return
        now_s = time.monotonic()
        for name, live in list(self.endpoints.items()):
            points = self.history.setdefault(name, [])
            points.append(_point(seconds, live.snapshot(now_s, seconds)))
        if any(len(points) > HISTORY_POINTS for points in self.history.values()):
            for points in self.history.values():
                del points[1::2]
            self._history_step_s *= 2
        self._history_due_s = seconds + self._history_step_s

    def problems(self) -> list[str]:
        """Why the figures must not be believed, so far."""
        reasons = []
        for endpoint, live in sorted(self.endpoints.items()):
            if live.failed or live.wrong:
                reasons.append(
                    f"{endpoint}: {live.failed} failed, {live.wrong} of the wrong length: {live.problem}"
                )
        busy = max((use for _, use in self.clients.values()), default=0.0)
        if busy > MAX_CPU:
            reasons.append(f"a worker uses {100 * busy:.0f} % of a core: add workers")
        lag_s = self.lags_ms.percentile(99)
        if lag_s is not None and lag_s * 1e3 > MAX_LAG_MS:
            reasons.append(f"the load generator is {lag_s * 1e3:.0f} ms late (p99)")
        delay_s = self.delays_s.percentile(99)
        if delay_s is not None and delay_s * 1e3 > MAX_LAG_MS:
            reasons.append(f"requests are sent {delay_s * 1e3:.0f} ms late (p99)")
        if self.lost_workers:
            reasons.append(f"{self.lost_workers} workers went missing")
        return reasons

    def snapshot(self) -> dict:
        """What the page asks for once a second."""
        now_s = time.monotonic()
        seconds = 0.0 if self.started_s is None else (self.ended_s or now_s) - self.started_s
        reasons = self.problems()
        answered = sum(live.answered for live in self.endpoints.values())
        return {
            "state": "idle" if self.started_s is None else "stopped" if self.ended_s else "running",
            "seconds": seconds,
            "verdict": "INVALID" if reasons else "VALID" if answered else "WAITING",
            "reasons": reasons,
            "endpoints": {
                name: live.snapshot(now_s, seconds) for name, live in sorted(self.endpoints.items())
            },
            "clients": {
                str(worker): {"cpu": use, "in_flight": sample.in_flight}
                for worker, (sample, use) in sorted(self.clients.items())
            },
            "history": {name: list(points) for name, points in self.history.items()},
            "lag_p99_ms": (self.lags_ms.percentile(99) or 0.0) * 1e3,
        }


def _point(seconds: float, figures: dict) -> dict:
    """What the charts show of an endpoint at a time."""
    return {
        "t": round(seconds, 1),
        "tokens_per_s": round(figures["tokens_per_s"], 2),
        "ttft_s": figures["ttft_s"]["recent_p50"],
        "tpot_s": figures["tpot_s"]["recent_p50"],
    }
