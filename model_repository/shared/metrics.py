"""The engine's state as Prometheus metrics, under NVIDIA's ``nv_trt_llm_*`` names where it has them.

Each call into Triton is a round trip (60 us) and one with a bad value aborts the server, so only finite
numbers go in, and only those that have changed.
"""

from __future__ import annotations

import math
import time
from typing import Any, Protocol

from flightline.torch_engine.core.request import EngineStats, RequestOutput

_LENGTH_BUCKETS = [10, 50, 100, 500, 1000]
_MEMORY = "nv_trt_llm_runtime_memory_metrics"
_GAUGES: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "nv_trt_llm_request_metrics": (
        "Requests in the engine",
        "request_type",
        ("active", "max", "scheduled", "context", "waiting"),
    ),
    "nv_trt_llm_kv_cache_block_metrics": (
        "Blocks of the KV cache",
        "kv_cache_block_type",
        ("max", "free", "used", "tokens_per", "reused", "fraction"),
    ),
    "flightline_host_kv_metrics": (
        "KV cache in host memory: bytes, and prompts for which some came back",
        "host_kv_type",
        ("max", "used", "saved", "restored", "hits"),
    ),
    _MEMORY: ("Memory that the model holds, in bytes", "memory_type", ("gpu",)),
    "nv_trt_llm_inflight_batcher_metrics": (
        "In-flight batching",
        "inflight_batcher_specific_metric",
        ("generation_requests",),
    ),
    "nv_trt_llm_general_metrics": (
        "Progress of the engine",
        "general_type",
        ("timestamp", "iteration_counter"),
    ),
}


def gauge_values(stats: EngineStats) -> dict[tuple[str, str], float]:
    """(family, label value) -> number."""
    families: dict[str, dict[str, float]] = {
        "nv_trt_llm_request_metrics": {
            "active": stats.active_requests,
            "max": stats.max_requests,
            "scheduled": stats.scheduled_requests,
            "context": stats.context_requests,
            "waiting": stats.waiting_requests,
        },
        "nv_trt_llm_kv_cache_block_metrics": {
            "max": stats.kv_blocks_max,
            "free": stats.kv_blocks_free,
            "used": stats.kv_blocks_used,
            "tokens_per": stats.tokens_per_block,
            "reused": stats.kv_blocks_reused,
            "fraction": stats.kv_blocks_used / stats.kv_blocks_max if stats.kv_blocks_max else 0.0,
        },
        "flightline_host_kv_metrics": {
            "max": stats.host_kv_bytes_max,
            "used": stats.host_kv_bytes_used,
            "saved": stats.host_kv_bytes_saved,
            "restored": stats.host_kv_bytes_restored,
            "hits": stats.host_kv_hits,
        },
        "nv_trt_llm_inflight_batcher_metrics": {
            "generation_requests": stats.scheduled_requests - stats.context_requests,
        },
        _MEMORY: {"gpu": stats.gpu_memory_bytes},
        "nv_trt_llm_general_metrics": {"iteration_counter": stats.iterations},
    }
    return {
        (family, label): float(value)
        for family, values in families.items()
        for label, value in values.items()
    }


class Metrics(Protocol):
    """What is told of a model's engine; ``close`` before the stub ends, or it crashes at exit."""

    def update(self, stats: EngineStats) -> None:
        """Sets the gauges that have changed."""

    def observe(self, last: RequestOutput) -> None:
        """Counts a finished generation."""

    def close(self) -> None: ...


class EngineMetrics:
    """All there are, of an engine of ours."""

    def __init__(self, pb_utils: Any, model: str, version: str) -> None:
        labels = {"model": model, "version": version}
        self._families = []
        self._metrics: dict[tuple[str, str], Any] = {}
        self._shown: dict[tuple[str, str], float] = {}
        for name, (description, label, values) in _GAUGES.items():
            family = pb_utils.MetricFamily(
                name=name, description=description, kind=pb_utils.MetricFamily.GAUGE
            )
            self._families.append(family)
            for value in values:
                self._metrics[name, value] = family.Metric(labels={**labels, label: value})
        for side in ("input", "output"):
            family = pb_utils.MetricFamily(
                name=f"nv_llm_{side}_token_len",
                description=f"{side.capitalize()} tokens of a request",
                kind=pb_utils.MetricFamily.HISTOGRAM,
            )
            self._families.append(family)
            self._metrics["length", side] = family.Metric(
                labels={**labels, "response_metric_type": f"total_{side}_tokens"}, buckets=_LENGTH_BUCKETS
            )

    def update(self, stats: EngineStats) -> None:
        values = gauge_values(stats)
        counter = ("nv_trt_llm_general_metrics", "iteration_counter")
        if values[counter] != self._shown.get(counter):
            values["nv_trt_llm_general_metrics", "timestamp"] = time.time()
        for key, value in values.items():
            if value != self._shown.get(key) and math.isfinite(value):
                self._metrics[key].set(value)
                self._shown[key] = value

    def observe(self, last: RequestOutput) -> None:
        if last.error is None:
            self._metrics["length", "input"].observe(last.num_input_tokens)
            self._metrics["length", "output"].observe(last.num_output_tokens)

    def close(self) -> None:
        self._metrics.clear()
        self._families.clear()


class MemoryMetric:
    """The GPU memory alone, of a model that is no engine of ours."""

    def __init__(self, pb_utils: Any, model: str, version: str) -> None:
        description, label, _ = _GAUGES[_MEMORY]
        self._family = pb_utils.MetricFamily(
            name=_MEMORY, description=description, kind=pb_utils.MetricFamily.GAUGE
        )
        self._metric = self._family.Metric(labels={"model": model, "version": version, label: "gpu"})
        self._shown: int | None = None

    def update(self, stats: EngineStats) -> None:
        if stats.gpu_memory_bytes != self._shown:
            self._metric.set(float(stats.gpu_memory_bytes))
            self._shown = stats.gpu_memory_bytes

    def observe(self, last: RequestOutput) -> None:
        """Lengths are told of the engine that is compared."""

    def close(self) -> None:
        del self._metric, self._family
