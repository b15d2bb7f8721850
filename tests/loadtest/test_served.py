"""``make bench`` from the built model to the report: it starts and stops real Triton itself."""

from __future__ import annotations

import json
import shutil

import psutil
import pytest

from loadtest import bench, plan, warmup
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
