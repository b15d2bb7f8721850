"""From records to numbers, as :mod:`~flightline.loadtest.definitions` says.

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

from flightline.loadtest.definitions import P50_SAMPLES, P90_SAMPLES, P95_SAMPLES, P99_SAMPLES
from flightline.loadtest.records import RequestRecord
from flightline.loadtest.slo import Slo


@dataclass(frozen=True)
class Window:
    """A span of the client's monotonic clock."""

    start_ns: int
    end_ns: int

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


def steady_window(records: Iterable[RequestRecord], ramp_end_ns: int = 0) -> Window | None:
    """First to last completion of a block, after the ramp; None if there are not two at different times."""
    done = [record.done_ns for record in records if record.complete and record.done_ns >= ramp_end_ns]
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


def latency_sample(
    window: Window, records: Sequence[RequestRecord], open_loop: bool = False
) -> list[RequestRecord]:
    """The completed requests whose latencies count; see the module's text.

    An open loop waits for all of its requests. Those that were not answered even so are failures, and the
    others count.
    """
    cut_off = window.end_ns
    if not open_loop:
        cut_off = min((record.start_ns for record in records if record.cancelled), default=cut_off)
    return [record for record in records if record.complete and window.start_ns <= record.start_ns < cut_off]


def input_tokens_in(window: Window, records: Iterable[RequestRecord]) -> int:
    """Input tokens of the requests whose first output arrived in the window: then they had been read."""
    return sum(
        record.num_input_tokens or 0
        for record in records
        if record.chunk_ns and window.start_ns < record.chunk_ns[0] <= window.end_ns
    )


@dataclass(frozen=True)
class Distribution:
    """Percentiles of raw samples (linear interpolation), in the samples' unit."""

    n: int
    p50: float | None
    """None below ``P50_SAMPLES`` samples."""
    p99: float | None
    """None below ``P99_SAMPLES`` samples."""
    worst: float | None
    mean: float | None = None
    p90: float | None = None
    p95: float | None = None

    @classmethod
    def of(cls, samples: Iterable[float | None]) -> Distribution:
        values = [sample for sample in samples if sample is not None]
        if not values:
            return cls(0, None, None, None)
        needed = {50: P50_SAMPLES, 90: P90_SAMPLES, 95: P95_SAMPLES, 99: P99_SAMPLES}
        p50, p90, p95, p99 = (
            float(np.percentile(values, percent)) if len(values) >= least else None
            for percent, least in needed.items()
        )
        return cls(len(values), p50, p99, max(values), sum(values) / len(values), p90, p95)


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
    wrong_length: int = 0
    total_tokens_per_s: float | None = None
    ntpot_s: Distribution = Distribution(0, None, None, None)
    gap_s: Distribution = Distribution(0, None, None, None)
    stall_s: Distribution = Distribution(0, None, None, None)
    user_tokens_per_s: Distribution = Distribution(0, None, None, None)
    server_ttft_s: Distribution = Distribution(0, None, None, None)
    schedule_delay_s: Distribution = Distribution(0, None, None, None)
    input_tokens: float | None = None
    output_tokens: float | None = None
    """Mean lengths of the answered requests, by the server's count."""
    offered_per_s: float | None = None
    """Requests that an open loop meant to send, per second of its window."""
    attained: float | None = None
    """Share of the requests of the window that kept the SLO; failed ones did not."""
    goodput_per_s: float | None = None
    """Requests/s that kept the SLO."""


def summarise(
    endpoint: str,
    blocks: Sequence[Sequence[RequestRecord]],
    windows: Sequence[Window | None] | None = None,
    slo: Slo | None = None,
    open_loop: bool = False,
) -> Summary:
    """Pools the blocks: tokens over time from their windows, latencies from all samples together.

    Args:
        windows: Of the blocks, where they are known: an open loop's are those of its schedule. ``None``:
            each from its first completion to its last.
    """
    given = [steady_window(records) for records in blocks] if windows is None else windows
    usable = [(window, records) for window, records in zip(given, blocks, strict=True) if window is not None]
    seconds = sum(window.seconds for window, _ in usable)
    sample = [record for window, records in usable for record in latency_sample(window, records, open_loop)]
    tokens = sum(tokens_in(window, records) for window, records in usable)
    rate = tokens / seconds if seconds else None
    everything = [record for records in blocks for record in records]
    lengths = [
        record.num_output_tokens for record in everything if record.complete and record.num_output_tokens
    ]
    requests_per_s = rate * len(lengths) / sum(lengths) if rate and lengths else None
    failed = sum(
        (record.error is not None or (open_loop and record.cancelled))
        and window.start_ns <= record.start_ns < window.end_ns
        for window, records in usable
        for record in records
    )
    judged = len(sample) + failed
    attained = sum(map(slo.kept_by, sample)) / judged if slo and judged else None
    read = sum(input_tokens_in(window, records) for window, records in usable)
    due = sum(
        window.start_ns <= record.start_ns < window.end_ns for window, records in usable for record in records
    )
    return Summary(
        endpoint=endpoint,
        window_s=seconds,
        output_tokens_per_s=rate,
        requests_per_s=requests_per_s,
        e2e_s=Distribution.of(record.e2e_s for record in sample),
        ttft_s=Distribution.of(record.ttft_s for record in sample),
        tpot_s=Distribution.of(record.tpot_s for record in sample),
        outside_s=Distribution.of(record.outside_s for record in sample),
        completed=sum(record.complete for record in everything),
        cut_off=sum(record.cancelled for record in everything),
        failed=sum(record.error is not None for record in everything),
        wrong_length=sum(record.error is None and record.problem is not None for record in everything),
        total_tokens_per_s=rate + read / seconds if rate is not None else None,
        ntpot_s=Distribution.of(record.ntpot_s for record in sample),
        gap_s=Distribution.of(gap for record in sample for gap in record.gaps_s),
        stall_s=Distribution.of(record.stall_s for record in sample),
        user_tokens_per_s=Distribution.of(1 / record.tpot_s for record in sample if record.tpot_s),
        server_ttft_s=Distribution.of(record.server_ttft_s for record in sample),
        schedule_delay_s=Distribution.of(record.schedule_delay_s for record in sample),
        input_tokens=_mean(record.num_input_tokens for record in sample),
        output_tokens=_mean(record.num_output_tokens for record in sample),
        offered_per_s=due / seconds if open_loop and seconds else None,
        attained=attained,
        goodput_per_s=attained * requests_per_s if attained is not None and requests_per_s else None,
    )


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
