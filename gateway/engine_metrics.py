"""The engine's state in the names that routers and autoscalers read, taken from Triton's metrics page.

An endpoint picker of the Gateway API's inference extension reads ``/metrics`` of each pod on the port that it sends
requests to, by the names of the kind of server that it was told: those of every kind with an engine like ours are here.
(https://gateway-api-inference-extension.sigs.k8s.io/, model server protocol)
"""

from __future__ import annotations

import logging
import urllib.request
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

TIMEOUT_S = 2.0
_DOOR = "text_generation"
"""Every model of the engine tells of the same engine: one is enough."""
_ENTRANCES = ("text_generation", "tensorrt_llm")
"""Models that send requests to the engine; those of ``ensemble`` and ``tensorrt_llm_bls`` pass through the second."""
_OURS = "flightline_engine_"
_REQUESTS, _BLOCKS = "nv_trt_llm_request_metrics", "nv_trt_llm_kv_cache_block_metrics"

_log = logging.getLogger("gateway")


@dataclass(frozen=True)
class EngineState:
    """A moment of the engine, or of several as one."""

    running: float
    waiting: float
    kv_use: float
    """Share of the KV cache's blocks that is in use, 0 to 1."""
    block_size: float
    """Tokens."""
    blocks: float
    finished: float
    """Requests that have ended well since Triton's start."""
    families: tuple[Metric, ...]
    """As NVIDIA's backend names them."""


def read(url: str) -> EngineState | None:
    """The state now, from Triton's page; None while there is none to be had, which is logged."""
    try:
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as answer:
            return parse(answer.read().decode("utf-8"))
    except (OSError, ValueError) as error:
        _log.warning("the engine's metrics at %s cannot be read: %s", url, error)
        return None


def parse(page: str) -> EngineState | None:
    """From the text of Triton's page; None if no engine tells of itself there."""
    wanted = (_REQUESTS, _BLOCKS, "nv_inference_request_success")
    found = {family.name: family for family in text_string_to_metric_families(page) if family.name in wanted}
    if _REQUESTS not in found or _BLOCKS not in found:
        return None
    families = tuple(_of_one_model(found[name]) for name in (_REQUESTS, _BLOCKS))
    requests = {sample.labels.get("request_type"): sample.value for sample in families[0].samples}
    blocks = {sample.labels.get("kv_cache_block_type"): sample.value for sample in families[1].samples}
    ends = found["nv_inference_request_success"].samples if "nv_inference_request_success" in found else ()
    return EngineState(
        running=requests.get("scheduled", 0.0),
        waiting=requests.get("waiting", 0.0),
        kv_use=blocks.get("fraction", 0.0),
        block_size=blocks.get("tokens_per", 0.0),
        blocks=blocks.get("max", 0.0),
        finished=sum(sample.value for sample in ends if sample.labels.get("model") in _ENTRANCES),
        families=families,
    )


def _of_one_model(family: Metric) -> Metric:
    models = sorted({sample.labels.get("model", "") for sample in family.samples})
    model = _DOOR if _DOOR in models else models[0]
    one = Metric(family.name, family.documentation, family.type)
    one.samples = [sample for sample in family.samples if sample.labels.get("model", "") == model]
    return one


def page(state: EngineState, model: str) -> bytes:
    """The text format. ``model`` is the name at ``/v1/models``."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Families(state, model))
    return generate_latest(registry)


class _Families(Collector):
    def __init__(self, state: EngineState, model: str) -> None:
        self._state = state
        self._model = model

    def describe(self) -> Iterable[Metric]:
        return ()

    def collect(self) -> Iterator[Metric]:
        state = self._state
        for name, text, value in (
            ("requests_running", "Requests that are computed", state.running),
            ("requests_waiting", "Requests that wait for a place", state.waiting),
            ("requests_in_flight", "Both", state.running + state.waiting),
            ("kv_use", "Share of the KV cache in use, 0 to 1", state.kv_use),
        ):
            yield GaugeMetricFamily(_OURS + name, text, value)
        yield CounterMetricFamily(_OURS + "requests_finished", "Requests that ended well", state.finished)
        yield from state.families
        for name, value in (
            ("trtllm_num_requests_running", state.running),
            ("trtllm_num_requests_waiting", state.waiting),
            ("trtllm_kv_cache_utilization", state.kv_use),
            ("trtllm_kv_cache_tokens_per_block", state.block_size),
            ("trtllm_kv_cache_max_blocks", state.blocks),
        ):
            yield GaugeMetricFamily(name, "As trtllm-serve names it", value)
        for name, value in (
            ("vllm:num_requests_running", state.running),
            ("vllm:num_requests_waiting", state.waiting),
            ("vllm:kv_cache_usage_perc", state.kv_use),
            ("vllm:gpu_cache_usage_perc", state.kv_use),
        ):
            yield _labelled(name, {"model_name": self._model}, value)
        sizes = {"block_size": f"{state.block_size:.0f}", "num_gpu_blocks": f"{state.blocks:.0f}"}
        yield _labelled("vllm:cache_config_info", {"model_name": self._model, **sizes}, 1.0)


def _labelled(name: str, labels: dict[str, str], value: float) -> Metric:
    family = Metric(name, "As vLLM names it", "gauge")
    family.samples = [Sample(name, labels, value)]
    return family
