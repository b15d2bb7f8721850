"""The supervisor's view of an engine that runs inside Triton (NVIDIA's C++ backend): its metrics."""

from __future__ import annotations

import re
import urllib.request

from flightline.torch_engine.core.request import EngineStats, ModelInfo

_SAMPLE = re.compile(
    r'^nv_trt_llm_(\w+)_metrics\{[^}]*?(?:_type|_metric)="(\w+)"[^}]*\} ([0-9.eE+-]+)$', re.M
)


class InTriton:
    """What the supervisor asks of an ``EngineClient``, answered from ``/metrics``."""

    connected = True

    def __init__(self, metrics_url: str, info: ModelInfo) -> None:
        self._url = metrics_url
        self.info = info

    @property
    def stats(self) -> EngineStats:
        """All zero while Triton does not answer."""
        try:
            with urllib.request.urlopen(self._url, timeout=2) as response:
                return parse(response.read().decode("utf-8"))
        except OSError:
            return EngineStats()

    def close(self) -> None:
        """There is no connection."""


def parse(text: str) -> EngineStats:
    """``nv_trt_llm_*`` gauges -> our statistics."""
    found = {(family, label): float(value) for family, label, value in _SAMPLE.findall(text)}

    def value(family: str, label: str) -> int:
        return int(found.get((family, label), 0))

    return EngineStats(
        active_requests=value("request", "active"),
        scheduled_requests=value("request", "scheduled"),
        context_requests=value("request", "context"),
        waiting_requests=value("request", "waiting"),
        max_requests=value("request", "max"),
        kv_blocks_max=value("kv_cache_block", "max"),
        kv_blocks_free=value("kv_cache_block", "free"),
        kv_blocks_used=value("kv_cache_block", "used"),
        kv_blocks_reused=value("kv_cache_block", "reused"),
        tokens_per_block=value("kv_cache_block", "tokens_per"),
        iterations=value("general", "iteration_counter"),
        gpu_memory_bytes=value("runtime_memory", "gpu"),
    )
