"""``make bench`` from the built model to the report: it starts and stops real Triton itself."""

from __future__ import annotations

import json
import shutil
import time

import psutil
import pytest

from flightline.client import Client
from flightline.loadtest import commands, plan, warmup
from flightline.loadtest.prompts import FIRST_OF_WARM_UP, Prompts
from flightline.loadtest.records import read_records
from flightline.loadtest.telemetry import Sampler, fetch_metrics, parse_metrics
from tests.loadtest.independent import measure
from tests.serving import free_ports

pytestmark = pytest.mark.slow
WARM_UP, IDLE, NEW = 4, 2, 1
CUT_OFF, MORE_IDLE = 4, 4
"""Requests that a run sends besides those that it records: one wave, one to see that each load is over, and one to see
that the prompts are new."""


def test_bench_serves_loads_reports_and_stops(tiny_build, tmp_path, monkeypatch):
    build = tmp_path / "build"  # of its own: one server runs from one build folder
    build.mkdir()
    shutil.copy(tiny_build / "deployment.json", build)
    monkeypatch.setattr(plan, "MIN_BLOCK_S", 2.0)  # a busy machine reads its processes less than twice in one
    monkeypatch.setattr(warmup, "WARMUP_S", 0.5)
    for variable, port in zip(("HTTP_PORT", "GRPC_PORT", "METRICS_PORT"), free_ports(3), strict=True):
        monkeypatch.setenv(variable, str(port))
    before = {process.pid for process in psutil.Process().children(recursive=True)}
    load = ["--concurrency", "4", "--output-tokens", "16", "--budget-s", "6", "--build-dir", str(build)]
    status = commands.main("bench", [*load, "--reports", str(tmp_path / "reports")])
    data = json.loads((tmp_path / "reports" / "latest" / "report.json").read_text())
    assert status == bool(data["reasons"] or data["unsteady"])
    assert all("load generator" in reason for reason in data["reasons"])  # the machine may be busy
    assert data["conditions"]["lane"] == "torch"
    assert data["conditions"]["baseline"]["max_batch_size"] == 1
    baseline, candidate = data["cells"]
    use = candidate["utilisation"]
    assert use["cores_by_process"]["torch_engine.process.server"] > 0
    assert use["cores_by_process"]["stub text_generation"] > 0
    for summary in (candidate["summary"], baseline["summary"]):
        assert summary["failed"] == 0 and summary["completed"] > 0
        if ttft := summary["ttft_s"][
            "p50"
        ]:  # on a busy machine the baseline's block may be too short for a median
            assert 0 <= summary["outside_s"]["p50"] < ttft
    assert candidate["summary"]["e2e_s"]["n"] > 0
    assert (tmp_path / "reports" / "latest" / "comparison.png").exists() != status
    after = {process.pid for process in psutil.Process().children(recursive=True)}
    assert after <= before


def test_a_run_against_real_triton_agrees_with_tritons_own_client(served, tmp_path, capsys):
    """Exactly in what is counted; loosely in time, since the machine is busy (benchmarks/loadtest measures that)."""
    settings = served.settings
    metrics_url = f"http://{settings.host}:{settings.metrics_port}/metrics"

    def answered() -> float:
        """Requests that the server has ended, by its own count."""
        page = fetch_metrics(metrics_url)
        names = ("nv_inference_request_success", "nv_inference_request_failure")
        return sum(
            value for (name, label), value in page.items() if name in names and label == "text_generation"
        )

    fixed = ["--url", settings.grpc_url, "--metrics-url", metrics_url, "--calibrate-s", "0", "--seed", "77"]
    load = ["--concurrency", "4", "--output-tokens", "32", "--seconds", "3", "--reports", str(tmp_path)]
    before = answered()
    commands.main("run", [*fixed, *load])
    ours = answered() - before
    independent = measure(settings.grpc_url, "text_generation", 4, 32, 3.0)
    theirs = answered() - before - ours
    records = read_records(tmp_path / "latest" / "records.jsonl")
    complete = [record for record in records if record.complete]
    besides = WARM_UP + IDLE + NEW
    # Triton counts some of those cut off at the end, on either side; a busy server is asked more often if it is idle.
    besides += independent.answers
    assert len(complete) + besides <= ours + theirs <= len(records) + besides + CUT_OFF + MORE_IDLE
    assert 0 <= theirs - independent.answers <= CUT_OFF and independent.tokens == 32 * independent.answers
    assert len(records) - len(complete) <= 4 and all(record.error is None for record in records)
    assert all(record.chunk_tokens[-1] == record.num_output_tokens == 32 for record in complete)
    reports = len(list(tmp_path.iterdir()))
    data = json.loads((tmp_path / "latest" / "report.json").read_text())
    (cell,) = data["cells"]
    summary = cell["summary"]
    assert summary["completed"] == len(complete)
    assert summary["failed"] == summary["wrong_length"] == 0
    assert summary["output_tokens"] == 32 and summary["input_tokens"] > 10
    for mine, other in (
        (summary["output_tokens_per_s"], independent.tokens_per_s),
        (summary["e2e_s"]["p50"], independent.e2e_s),
        (summary["ttft_s"]["p50"], independent.ttft_s),
    ):
        assert 1 / 30 < mine / other < 30  # less than a wrong unit would make of it
    assert 0 < summary["server_ttft_s"]["p50"] < summary["ttft_s"]["p50"]
    series = cell["utilisation"]["series"]
    assert 0 < series["active"] <= 4 and 0 < series["kv_used"] < 1
    names = {line["name"] for line in data["timeline"]["lines"]}
    assert {"Output tokens/s", "Requests in flight", "KV cache in use", "CPU of the machine"} <= names
    assert not [reason for reason in data["reasons"] if "load generator" not in reason]
    capsys.readouterr()
    assert commands.main("run", [*fixed, *load]) == 2
    assert (
        "an earlier run with SEED=77" in (said := capsys.readouterr().err) and "SEED=78 (--seed 78)" in said
    )
    assert len(list(tmp_path.iterdir())) == reports


def test_bench_says_before_it_runs_that_its_prompts_were_used(served, tmp_path, capsys):
    with Client(served.settings.grpc_url, "ensemble") as client:
        client.generate(Prompts(78)[FIRST_OF_WARM_UP], max_tokens=1)
    options = [
        "--url",
        served.settings.grpc_url,
        "--seed",
        "78",
        "--budget-s",
        "5",
        "--reports",
        str(tmp_path),
    ]
    assert commands.main("bench", options) == 2
    assert "SEED=79 (--seed 79)" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_telemetry_says_what_it_could_not_read(served):
    page = fetch_metrics(f"http://{served.settings.host}:{served.settings.metrics_port}/metrics")
    assert page["nv_trt_llm_kv_cache_block_metrics", "max"] > 0
    for model in ("tensorrt_llm", "hf_baseline"):  # of a machine without a GPU
        assert page["nv_trt_llm_runtime_memory_metrics", f"{model}/gpu"] == 0
    with pytest.raises(ValueError, match="not a metrics page"):
        parse_metrics("<html>")
    sampler = Sampler(lambda: [], "http://127.0.0.1:9/metrics")
    with sampler:
        time.sleep(1.2)
    assert "refused" in sampler.missing["http://127.0.0.1:9/metrics"]
    assert sampler.samples[0].series["memory_mib"] > 0
