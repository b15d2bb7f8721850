"""The engine's state on the gateway's own page, in every name that the inference extension's documentation has."""

from __future__ import annotations

import urllib.request
from collections.abc import Mapping

import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from flightline.gateway import engine_metrics
from flightline.supervisor.server import Server
from tests.model_repository.endpoints import wait_until

PROTOCOL = {
    "vllm": ("vllm:num_requests_waiting", "vllm:num_requests_running", "vllm:kv_cache_usage_perc"),
    "triton-tensorrt-llm": (
        "nv_trt_llm_request_metrics{request_type=waiting}",
        "nv_trt_llm_request_metrics{request_type=scheduled}",
        "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=fraction}",
        "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=tokens_per}",
        "nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type=max}",
    ),
    "trtllm-serve": (
        "trtllm_num_requests_waiting",
        "trtllm_num_requests_running",
        "trtllm_kv_cache_utilization",
        "trtllm_kv_cache_tokens_per_block",
        "trtllm_kv_cache_max_blocks",
    ),
}
"""Kind of server to the specifications by which an endpoint picker finds TotalQueuedRequests and the others there."""
OURS = ("requests_running", "requests_waiting", "requests_in_flight", "kv_use", "requests_finished_total")

TRITON = """
# TYPE nv_inference_request_success counter
nv_inference_request_success{model="text_generation",version="1"} 7
nv_inference_request_success{model="tensorrt_llm",version="1"} 3
nv_inference_request_success{model="ensemble",version="1"} 3
# TYPE nv_trt_llm_request_metrics gauge
nv_trt_llm_request_metrics{model="tensorrt_llm",request_type="waiting",version="1"} 5
nv_trt_llm_request_metrics{model="text_generation",request_type="waiting",version="1"} 5
nv_trt_llm_request_metrics{model="text_generation",request_type="scheduled",version="1"} 4
# TYPE nv_trt_llm_kv_cache_block_metrics gauge
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="fraction",model="text_generation",version="1"} 0.25
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="tokens_per",model="text_generation",version="1"} 32
nv_trt_llm_kv_cache_block_metrics{kv_cache_block_type="max",model="text_generation",version="1"} 1000
"""


def samples(page: str) -> list[Sample]:
    return [sample for family in text_string_to_metric_families(page) for sample in family.samples]


def value(found: list[Sample], specification: str) -> float:
    """As an endpoint picker reads it: a name, and labels that it must have."""
    name, _, labels = specification.rstrip("}").partition("{")
    wanted = dict(pair.split("=") for pair in labels.split(",") if pair)
    (one,) = [each for each in found if each.name == name and wanted.items() <= each.labels.items()]
    return float(one.value)


def page_of(server: Server) -> list[Sample]:
    with urllib.request.urlopen(f"{server.settings.http_url}/metrics") as answer:
        return samples(answer.read().decode())


def test_names_and_values() -> None:
    state = engine_metrics.parse(TRITON)
    assert state is not None
    found = samples(engine_metrics.page(state, "a/model").decode())
    for waiting, running, use, *sizes in PROTOCOL.values():
        assert (value(found, waiting), value(found, running), value(found, use)) == (5, 4, 0.25)
        if sizes:
            assert [value(found, size) for size in sizes] == [32, 1000]
    (info,) = [each.labels for each in found if each.name == "vllm:cache_config_info"]
    assert info == {"model_name": "a/model", "block_size": "32", "num_gpu_blocks": "1000"}
    ours = {name: value(found, f"flightline_engine_{name}") for name in OURS}
    assert ours == dict(zip(OURS, (4, 5, 9, 0.25, 10), strict=True))


def test_no_engine_no_series() -> None:
    """A router must see that it knows nothing, not that nobody waits."""
    assert engine_metrics.parse("# TYPE up gauge\nup 1\n") is None
    assert engine_metrics.read("http://127.0.0.1:1/metrics") is None


@pytest.mark.slow
def test_a_real_server_tells_all_of_it(served: Server, llm: openai.OpenAI) -> None:
    def running() -> Mapping[str, float]:
        found = page_of(served)
        return {kind: value(found, names[1]) for kind, names in PROTOCOL.items()}

    before = value(page_of(served), "flightline_engine_requests_finished_total")
    stream = llm.completions.create(
        model=llm.models.list().data[0].id,
        prompt="the fox",
        max_tokens=4000,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    next(iter(stream))
    wait_until(lambda: set(running().values()) == {1.0})
    found = page_of(served)
    assert 0 < value(found, "vllm:kv_cache_usage_perc") <= 1
    assert {f"flightline_engine_{name}" for name in OURS} <= {each.name for each in found}
    assert value(found, "flightline_gateway_requests_in_flight") == 1
    stream.close()
    wait_until(lambda: set(running().values()) == {0.0})
    assert value(page_of(served), "flightline_engine_requests_finished_total") >= before
