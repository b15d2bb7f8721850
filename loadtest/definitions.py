"""What every figure means. Reports, the live page and ``report.json`` print these words and have none of their own.

``records.py`` computes the figures of one request, ``metrics.py`` those of many.
"""

from __future__ import annotations

from flightline.loadtest.confidence import samples_needed

P50_SAMPLES = 6
"""Fewer samples are called n/a and not a median."""
P90_SAMPLES, P95_SAMPLES, P99_SAMPLES = (samples_needed(percent) for percent in (90, 95, 99))
STEADY_SPREAD = 1.3
"""Most that the fastest repeat of a contestant under one load may have over the slowest."""

DEFINITIONS = {
    "TTFT": "time to first token: from the time at which the load model wanted the request to be sent to the first "
    "text that is not empty",
    "TPOT": "time per output token: (E2E - TTFT) / (output tokens - output tokens in the first response)",
    "ITL": "inter-token latency, `gap` in report.json and --assert: between successive responses of a request, all "
    "gaps of all requests together",
    "stall": "the longest gap of each request",
    "E2E": "end-to-end latency: from the intended time to the last response with outputs",
    "NTPOT": "normalised time per output token: E2E / output tokens",
    "output tokens/s": "throughput: output tokens, counted by the server, that arrived in the measured windows, over "
    "their time",
    "total tokens/s": "the same plus the input tokens of requests whose first output arrived there",
    "requests/s": "output tokens/s over the mean length of an answer",
    "per-user speed": "1 / TPOT of each request: how fast one reader's text grows",
    "goodput": "requests/s that kept the SLO's limits; a failed request keeps none",
    "Little's law": "in a closed loop the mean latency is the requests in flight over the requests/s. It needs no "
    "request to begin and end in a window, and is no measurement besides the throughput",
    "outside": "client TTFT, from sending, minus the server's own (arrival to first token): what client, transport "
    "and Triton add",
    "schedule delay": "how much later than intended requests were sent",
    "window": "closed loop: from the first completed request after the ramp to the last, since the burst that starts "
    "it is no steady state; latencies are those of requests sent inside, and not after the oldest one that the end cut "
    "off. Open loop: the schedule's time after the ramp; every request that was due in it counts, whenever it was "
    "answered",
    "percentiles": "of the raw samples of all repeats together (linear interpolation), never averaged; p50 from "
    f"{P50_SAMPLES} samples on, p90 from {P90_SAMPLES}, p95 from {P95_SAMPLES}, p99 from {P99_SAMPLES}, as in MLPerf's "
    "early stopping at 99 % confidence",
    "ratio": "more than 1 is in favour of the second; geometric mean over rounds of neighbouring repeats, with its "
    "95 % t interval, or, of a lone round in which the second ran before and after the first, with the two quotients",
    "UNSTEADY": f"repeats of a contestant under one load differ by more than {STEADY_SPREAD:g} in output tokens/s",
    "knee": "the load with the most output tokens/s per second of median E2E (Kleinrock's power)",
}
