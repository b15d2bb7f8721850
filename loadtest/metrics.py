"""From records to numbers. Every definition that a report shows is here and nowhere else.

A closed loop of ``c`` users starts with a burst of ``c`` requests into an idle server, which is not the
steady state: with a server that works on one request at a time, the first answers come after 1, 2, ...
``c`` service times, and only later requests see a full queue. Therefore:

* the *window* of a block runs from its first completed request to its last, from event to event, so that
  it holds whole services. Output tokens count where they arrived, whoever's they are.
* *latencies* are those of requests sent inside the window. The block's end cuts off slow requests rather
  than fast ones, so only requests sent before the oldest one that was cut off are taken.

Samples of several blocks are pooled; percentiles are never averaged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from loadtest.records import RequestRecord

P50_SAMPLES = 6
"""Below this number of samples even their whole range holds the median with less than 95 % probability."""
P99_SAMPLES = 100
"""Below this number of samples the 99th percentile would be the maximum by another name."""


@dataclass(frozen=True)
class Window:
    """A span of the client's monotonic clock."""

    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


def steady_window(records: Iterable[RequestRecord]) -> Window | None:
    """First to last completion of a block; None if there are not two at different times."""
    done = [record.done_ns for record in records if record.complete]
    if not done or min(done) == max(done):
        return None
    return Window(min(done), max(done))


def tokens_in(window: Window, records: Iterable[RequestRecord]) -> int:
    """Output tokens that arrived in the window (after its start, up to its end)."""
    total = 0
    for record in records:
        before = 0
        for arrived_ns, tokens in zip(record.chunk_ns, record.chunk_tokens, strict=True):
            if window.start_ns < arrived_ns <= window.end_ns:
                total += tokens - before
            before = tokens
    return total


def latency_sample(window: Window, records: Sequence[RequestRecord]) -> list[RequestRecord]:
    """The completed requests whose latencies count; see the module's text."""
    cut_off = min((record.sent_ns for record in records if record.cancelled), default=window.end_ns)
    return [record for record in records if record.complete and window.start_ns <= record.sent_ns < cut_off]


@dataclass(frozen=True)
class Distribution:
    """Percentiles of raw samples (linear interpolation), in the samples' unit."""

    n: int
    p50: float | None
    """None below :data:`P50_SAMPLES` samples."""
    p99: float | None
    """None below :data:`P99_SAMPLES` samples."""
    worst: float | None

    @classmethod
    def of(cls, samples: Iterable[float | None]) -> Distribution:
        values = [sample for sample in samples if sample is not None]
        if not values:
            return cls(0, None, None, None)
        p50 = float(np.median(values)) if len(values) >= P50_SAMPLES else None
        p99 = float(np.percentile(values, 99)) if len(values) >= P99_SAMPLES else None
        return cls(len(values), p50, p99, max(values))


@dataclass(frozen=True)
class Summary:
    """One endpoint over one block, or over all its blocks."""

    endpoint: str
    window_s: float
    output_tokens_per_s: float | None
    requests_per_s: float | None
    """Output throughput in answers of the mean length: counting answers would round to whole ones."""
    e2e_s: Distribution
    ttft_s: Distribution
    tpot_s: Distribution
    outside_s: Distribution
    """Client TTFT minus the model's own: what client, transport and Triton add."""
    completed: int
    cut_off: int
    failed: int


def summarise(endpoint: str, blocks: Sequence[Sequence[RequestRecord]]) -> Summary:
    """Pools the blocks: tokens over time from their windows, latencies from all samples together."""
    windows = [(steady_window(records), records) for records in blocks]
    usable = [(window, records) for window, records in windows if window is not None]
    seconds = sum(window.seconds for window, _ in usable)
    sample = [record for window, records in usable for record in latency_sample(window, records)]
    tokens = sum(tokens_in(window, records) for window, records in usable)
    rate = tokens / seconds if seconds else None
    everything = [record for records in blocks for record in records]
    lengths = [
        record.num_output_tokens for record in everything if record.complete and record.num_output_tokens
    ]
    return Summary(
        endpoint=endpoint,
        window_s=seconds,
        output_tokens_per_s=rate,
        requests_per_s=rate * len(lengths) / sum(lengths) if rate and lengths else None,
        e2e_s=Distribution.of(record.e2e_s for record in sample),
        ttft_s=Distribution.of(record.ttft_s for record in sample),
        tpot_s=Distribution.of(record.tpot_s for record in sample),
        outside_s=Distribution.of(record.outside_s for record in sample),
        completed=sum(record.complete for record in everything),
        cut_off=sum(record.cancelled for record in everything),
        failed=sum(record.error is not None for record in everything),
    )


@dataclass(frozen=True)
class Ratio:
    """Candidate against baseline, more than 1 is better: of the pooled values, and of neighbouring blocks."""

    value: float | None
    low: float | None = None
    high: float | None = None


def ratio(
    better: float | None, worse: float | None, pairs: Iterable[tuple[float | None, float | None]]
) -> Ratio:
    """``better / worse``; the spread is that of the same quotient over the pairs that have both values."""
    spread = [a / b for a, b in pairs if a is not None and b]
    value = better / worse if better is not None and worse else None
    return Ratio(value, min(spread, default=None), max(spread, default=None))


def problems(records: Sequence[RequestRecord], summaries: Sequence[Summary]) -> list[str]:
    """Why a comparison must not be believed; empty if it may."""
    reasons = []
    for summary in summaries:
        mine = [record for record in records if record.endpoint == summary.endpoint]
        failed = [record for record in mine if record.error is not None]
        if failed:
            reasons.append(
                f"{summary.endpoint}: {len(failed)} of {len(mine)} requests failed: {failed[0].error}"
            )
        wrong = [record for record in mine if record.error is None and record.problem]
        if wrong:
            reasons.append(
                f"{summary.endpoint}: {len(wrong)} answers of the wrong length: {wrong[0].problem}"
            )
        if summary.output_tokens_per_s is None:
            reasons.append(f"{summary.endpoint}: fewer than two requests were answered: raise BUDGET_S")
    return reasons


def limits(summaries: Sequence[Summary]) -> list[str]:
    """What a run that may be believed does not show; empty if it shows everything."""
    return [
        f"no latency of {summary.endpoint} ({summary.e2e_s.n} of its requests began and ended in the windows, "
        f"a median needs {P50_SAMPLES}): raise BUDGET_S"
        for summary in summaries
        if summary.output_tokens_per_s is not None and summary.e2e_s.p50 is None
    ]
