"""May a run be believed? Every reason against it, in one line each; none means VALID.

The limits are those at which a load generator was measured to change what it measures: above 60 % of a
core, or 10 ms late, tokens wait for the client and not for the server.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from flightline.loadtest.definitions import STEADY_SPREAD
from flightline.loadtest.live import MAX_CPU, MAX_LAG_MS
from flightline.loadtest.metrics import Summary, Window
from flightline.loadtest.records import ClientSample, RequestRecord

MAX_ERROR_SHARE = 0.001
MAX_SHARE_OF_TTFT = 0.05
MIN_SENT_SHARE = 0.99
MAX_CLOCK_STEP_S = 0.5
MAX_NEGATIVE_S = 0.005
GROWTH = 1.5
"""A queue whose second half is so many times its first is one that grows."""
CEILING_SHARE = 0.6
MAX_REUSED_SHARE = 0.05


@dataclass(frozen=True)
class Ceiling:
    """What one worker process on this machine can take in, found against the null server."""

    tokens_per_s: float
    us_per_token: float
    """CPU time of the worker per streamed token."""
    streams: int
    measured_per_s: float
    """Output tokens/s that it took in while it was measured."""
    delay_p99_ms: float | None
    """From the null server's sending of a token to its time stamp in the client."""


@dataclass(frozen=True)
class ClientHealth:
    """The load generator itself, over the windows of a run."""

    workers: int
    cpu: float | None
    """Cores that its busiest process used."""
    lag_p99_ms: float | None
    """Lateness of the event loop that takes the time stamps."""
    schedule_delay_p99_ms: float | None
    clock_step_s: float
    """Most that the wall clock moved against the monotonic clock."""

    @classmethod
    def of(cls, samples: Sequence[ClientSample], records: Sequence[RequestRecord], windows: Sequence[Window]):
        workers: dict[tuple[str, int], list[ClientSample]] = {}
        for sample in samples:
            workers.setdefault((sample.block, sample.worker), []).append(sample)
        use: list[float] = []
        lags: list[float] = []
        steps = [0.0]
        for mine in workers.values():
            inside = [s for s in mine if any(w.start_ns <= s.time_ns <= w.end_ns for w in windows)]
            lags += [lag for sample in inside for lag in sample.lags_ms]
            if len(inside) > 1 and inside[-1].time_ns > inside[0].time_ns:
                use.append(
                    (inside[-1].cpu_s - inside[0].cpu_s) / ((inside[-1].time_ns - inside[0].time_ns) / 1e9)
                )
            offsets = [sample.wall_ns - sample.time_ns for sample in mine]
            steps.append((max(offsets) - min(offsets)) / 1e9)
        delays = [
            r.schedule_delay_s for r in records if any(w.start_ns <= r.start_ns < w.end_ns for w in windows)
        ]
        return cls(
            workers=len({worker for _, worker in workers}),
            cpu=max(use, default=None),
            lag_p99_ms=float(np.percentile(lags, 99)) if lags else None,
            schedule_delay_p99_ms=float(np.percentile(delays, 99)) * 1e3 if delays else None,
            clock_step_s=max(steps),
        )


def client_reasons(health: ClientHealth, summary: Summary, ceiling: Ceiling | None) -> list[str]:
    """Whether the load generator was fast enough not to be seen in the figures."""
    reasons = []
    if health.cpu is not None and health.cpu > MAX_CPU:
        reasons.append(
            f"the load generator's busiest process used {100 * health.cpu:.0f} % of a core "
            f"(at most {100 * MAX_CPU:.0f} %): give it more workers with PROCESSES"
        )
    # A late time stamp matters by its share of what is measured; without a latency that is the throughput of seconds.
    ttft_s = summary.ttft_s.p50 or summary.ttft_s.mean
    allowed_ms = math.inf if ttft_s is None else max(MAX_LAG_MS, MAX_SHARE_OF_TTFT * 1e3 * ttft_s)
    for value, what in (
        (health.lag_p99_ms, "its time stamps are"),
        (health.schedule_delay_p99_ms, "requests were sent"),
    ):
        if value is not None and value > allowed_ms:
            reasons.append(
                f"the load generator is too slow: {what} {value:.0f} ms late at p99 (at most {allowed_ms:.0f} ms)"
            )
    rate = summary.output_tokens_per_s
    if ceiling and rate and rate > CEILING_SHARE * ceiling.tokens_per_s * max(1, health.workers):
        reasons.append(
            f"{rate:.0f} tokens/s are more than {100 * CEILING_SHARE:.0f} % of what {health.workers} worker(s) "
            f"can take in here ({ceiling.tokens_per_s:.0f} each): give it more workers with PROCESSES"
        )
    if health.clock_step_s > MAX_CLOCK_STEP_S:
        reasons.append(f"the client's wall clock was moved by {health.clock_step_s:.1f} s during the run")
    return reasons


def request_reasons(name: str, records: Sequence[RequestRecord], *, unique: bool) -> list[str]:
    """Whether the requests were answered, as they were meant to be, also by the server's own times and counts.

    Args:
        unique: No prompt shares its beginning with another, so that no prefix cache should have helped.
    """
    reasons = []
    failed = [record for record in records if record.error is not None]
    if len(failed) > MAX_ERROR_SHARE * len(records):
        reasons.append(f"{name}: {len(failed)} of {len(records)} requests failed: {failed[0].error}")
    wrong = [record for record in records if record.error is None and record.problem]
    if wrong:
        reasons.append(f"{name}: {len(wrong)} answers of the wrong length: {wrong[0].problem}")
    reused = [
        r for r in records if r.cached_tokens or (r.server_times_ns or {}).get("kv_cache_reused_blocks")
    ]
    if unique and len(reused) > MAX_REUSED_SHARE * len(records):
        reasons.append(
            f"{name}: {len(reused)} of {len(records)} prompts came in part from the server's prefix cache, though "
            f"all of them differ: was the same SEED used against it before?"
        )
    backwards = [
        record for record in records if record.outside_s is not None and record.outside_s < -MAX_NEGATIVE_S
    ]
    if backwards:
        reasons.append(
            f"{name}: {len(backwards)} answers took longer by the server's own clock than by the client's: "
            f"one of the clocks was set"
        )
    return reasons


def sent_reasons(name: str, records: Sequence[RequestRecord], window: Window, expected: float) -> list[str]:
    """Whether an open loop's load was offered: ``expected`` requests were scheduled in the window."""
    due = sum(window.start_ns <= record.start_ns < window.end_ns for record in records)
    if due < MIN_SENT_SHARE * expected - 1:
        return [f"{name}: only {due} of {expected:.0f} scheduled requests were sent"]
    return []


def overload_reasons(name: str, records: Sequence[RequestRecord], window: Window) -> list[str]:
    """Whether an open loop's load was more than the server holds."""
    lost = sum(record.cancelled for record in records)
    if lost:
        return [f"{name}: {lost} of {len(records)} requests were not answered before the run ended"]
    growth = queue_growth(records, window)
    if growth is not None and growth > GROWTH:
        return [
            f"{name}: the queue grew during the run ({growth:.1f} times as many in flight in its second half): "
            f"the load is more than the server holds, and latencies depend on the run's length"
        ]
    return []


def queue_growth(records: Sequence[RequestRecord], window: Window) -> float | None:
    """Mean number in flight in the second half of the window against the first; None if it means nothing.

    Chance makes queues breathe. It means something if requests wait longer, too: the mean latency of the
    second half's requests is as many standard errors above the first half's as chance hardly ever gives.
    """
    middle = (window.start_ns + window.end_ns) // 2
    halves = [(window.start_ns, middle), (middle, window.end_ns)]
    latencies = [
        [r.ttft_s for r in records if r.complete and r.ttft_s is not None and start <= r.start_ns < end]
        for start, end in halves
    ]
    if min(map(len, latencies)) < 10:
        return None
    spread = sum(float(np.var(values, ddof=1)) / len(values) for values in latencies) ** 0.5
    if float(np.mean(latencies[1]) - np.mean(latencies[0])) < 4 * spread:
        return None
    held = [sum(_overlap_ns(record, start, end) for record in records) for start, end in halves]
    return held[1] / held[0] if held[0] else None


def _overlap_ns(record: RequestRecord, start_ns: int, end_ns: int) -> int:
    last = record.chunk_ns[-1] if record.chunk_ns else end_ns
    return max(0, min(last, end_ns) - max(record.start_ns, start_ns))


def unsteady_reasons(name: str, rates: Sequence[float | None]) -> list[str]:
    """Whether repeats under one load gave the same output tokens/s; if not, the run is UNSTEADY."""
    known = [rate for rate in rates if rate]
    if not known or max(known) <= STEADY_SPREAD * min(known):
        return []
    return [
        f"the repeats of {name} gave {', '.join(f'{rate:.1f}' for rate in known)} tokens/s, a spread of "
        f"{max(known) / min(known):.2f} (at most {STEADY_SPREAD:g} is steady): see what else runs here, and run again"
    ]


def shape_reasons(name: str, summary: Summary) -> list[str]:
    """Whether there is anything to believe."""
    if summary.output_tokens_per_s is None:
        return [
            f"{name}: fewer than two requests were answered in the steady part: raise SECONDS or BUDGET_S"
        ]
    return []
