"""Prometheus metrics, one truth over all gateway processes.

Each process writes to files of its own in ``PROMETHEUS_MULTIPROC_DIR``, and any of them answers for all
(https://prometheus.github.io/client_python/multiprocess/). The files of a process that has ended stay, so that no
counter ever falls. The variable must be set before this module is imported.
"""

from __future__ import annotations

import os

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    REGISTRY,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = CONTENT_TYPE_LATEST.encode()
_P = "flightline_gateway_"
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)

REQUESTS = Counter(_P + "requests", "Requests answered", ["endpoint", "status"])
REQUEST_SECONDS = Histogram(
    _P + "request_seconds",
    "From the head of a request to the end of its answer",
    ["endpoint"],
    buckets=_SECONDS,
)
FIRST_BYTE_SECONDS = Histogram(
    _P + "first_byte_seconds",
    "From the head of a request to the first byte of its body",
    ["endpoint"],
    buckets=_SECONDS,
)
PROMPT_TOKENS = Counter(_P + "prompt_tokens", "Tokens of prompts that Triton was asked to continue")
GENERATED_TOKENS = Counter(_P + "generated_tokens", "Tokens of answers, those that nobody waited for too")
IN_FLIGHT = Gauge(_P + "requests_in_flight", "Requests that are being worked on", multiprocess_mode="livesum")


def page() -> bytes:
    """The text format, of all processes."""
    if not os.environ.get(VARIABLE):
        return generate_latest(REGISTRY)
    registry = CollectorRegistry()
    MultiProcessCollector(registry)
    return generate_latest(registry)
