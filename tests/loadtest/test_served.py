"""``make bench`` from the built model to the report: it starts and stops real Triton itself."""

from __future__ import annotations

import json
import shutil

import psutil
import pytest

from loadtest import bench, commands, plan, warmup
from tests.loadtest.independent import measure
from tests.serving import free_ports

pytestmark = pytest.mark.slow


def test_bench_serves_loads_reports_and_stops(tiny_build, tmp_path, monkeypatch):
    build = tmp_path / "build"  # of its own: one server runs from one build folder
    build.mkdir()
    shutil.copy(tiny_build / "deployment.json", build)
    monkeypatch.setattr(plan, "MIN_BLOCK_S", 5.0)
    monkeypatch.setattr(warmup, "WARMUP_S", 2.0)
    for variable, port in zip(("HTTP_PORT", "GRPC_PORT", "METRICS_PORT"), free_ports(3), strict=True):
        monkeypatch.setenv(variable, str(port))
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    load = ["--concurrency", "4", "--output-tokens", "16", "--budget-s", "20", "--build-dir", str(build)]
    assert bench.main([*load, "--reports", str(tmp_path / "reports")]) == 0
    data = json.loads((tmp_path / "reports" / "latest" / "report.json").read_text())
    assert data["verdict"] == "VALID"
    assert data["conditions"]["lane"] == "torch"
    assert data["conditions"]["baseline"]["max_batch_size"] == 1
    use = data["utilisation"]["text_generation"]
    assert use["cores_by_process"]["torch_engine.server"] > 0
    assert use["cores_by_process"]["stub text_generation"] > 0
    for side in ("candidate", "baseline"):
        assert data[side]["failed"] == 0 and data[side]["e2e_s"]["n"] > 0
        assert 0 <= data[side]["outside_s"]["p50"] < data[side]["ttft_s"]["p50"]
    assert (tmp_path / "reports" / "latest" / "comparison.png").exists()
    after = {process.pid for process in psutil.Process().children(recursive=True)}
    assert after <= before


def test_a_run_against_real_triton_agrees_with_tritons_own_client(served, tmp_path):
    """Loosely here, where the machine is busy; alone the two agree within a few percent."""
    settings = served.settings
    metrics_url = f"http://{settings.host}:{settings.metrics_port}/metrics"
    load = [
        "--url",
        settings.grpc_url,
        "--metrics-url",
        metrics_url,
        "--concurrency",
        "4",
        "--output-tokens",
        "32",
    ]
    commands.main(
        "run", [*load, "--seconds", "5", "--calibrate-s", "0", "--reports", str(tmp_path), "--seed", "77"]
    )
    data = json.loads((tmp_path / "latest" / "report.json").read_text())
    rate, ttft_s, e2e_s = measure(settings.grpc_url, "text_generation", 4, 32, 4.0)
    (cell,) = data["cells"]
    summary = cell["summary"]
    assert summary["failed"] == summary["wrong_length"] == 0
    assert summary["output_tokens"] == 32 and summary["input_tokens"] > 10
    assert 0.25 < summary["output_tokens_per_s"] / rate < 4
    assert 0.25 < summary["e2e_s"]["p50"] / e2e_s < 4
    assert 0 < summary["server_ttft_s"]["p50"] < summary["ttft_s"]["p50"] < 10 * ttft_s
    series = cell["utilisation"]["series"]
    assert series["active"] > 0 and 0 < series["kv_used"] < 1
    names = {line["name"] for line in data["timeline"]["lines"]}
    assert {"Output tokens/s", "Requests in flight", "KV cache in use", "CPU of the machine"} <= names
    assert not [reason for reason in data["reasons"] if "load generator" not in reason]


def test_telemetry_says_what_it_could_not_read(served):
    from loadtest.telemetry import Sampler, fetch_metrics, parse_metrics

    page = fetch_metrics(f"http://{served.settings.host}:{served.settings.metrics_port}/metrics")
    assert page["nv_trt_llm_kv_cache_block_metrics", "max"] > 0
    with pytest.raises(ValueError, match="not a metrics page"):
        parse_metrics("<html>")
    sampler = Sampler(lambda: [], "http://127.0.0.1:9/metrics")
    with sampler:
        import time

        time.sleep(1.2)
    assert "refused" in sampler.missing["http://127.0.0.1:9/metrics"]
    assert sampler.samples[0].series["memory_mib"] > 0
