from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest

from loadtest import conditions, plot, report
from loadtest.bench import Target, evaluate
from loadtest.config import BenchConfig
from loadtest.metrics import Window
from loadtest.plan import Block
from loadtest.prompts import Prompts
from loadtest.records import ClientSample
from loadtest.telemetry import (
    Gpus,
    Sample,
    Sampler,
    Utilisation,
    model_memory_mib,
    parse_metrics,
    process_name,
    process_seconds,
)
from tests.loadtest.traces import batch_server, record, serial_server

BLOCKS = [
    Block("1-text_generation", "text_generation", 20),
    Block("2-hf_baseline", "hf_baseline", 60),
    Block("3-text_generation", "text_generation", 20),
]
DEPLOYED = {"model": "Tiny", "lane": "torch", "precision": "fp8", "baseline": {"dtype": "bfloat16"}}


def made(extra=(), failure=None, clients=(), last_s=5.0) -> report.Report:
    config = BenchConfig(concurrency=16, output_tokens=8)
    records = [
        *batch_server(16, 4.0, 20.0, block=BLOCKS[0].name),
        *serial_server(16, 2.0, 60.0, block=BLOCKS[1].name, endpoint="hf_baseline"),
        *batch_server(16, last_s, 20.0, block=BLOCKS[2].name),
        *extra,
    ]
    target = Target("here", lambda: [], DEPLOYED)
    return evaluate(config, Prompts(), target, BLOCKS, records, Sampler(lambda: []), failure, clients)


def test_the_table_says_what_was_measured():
    rows = {row.split("|")[1].strip(): row for row in report.table(made()).splitlines()}
    throughput = rows["Output throughput (tokens/s)"]  # (16*16*4 + 16*8*3) tokens in 16 + 15 s, against 4/s
    assert "28.9 | 4.00 | **7.23×** (6.40–8.00)" in throughput
    assert "| 4.00 (n=112) | 32.0 (n=14) | **8.00×** (6.40–8.00)" in rows["Latency p50 (s)"]
    assert "n/a (n=14, worst 32.0)" in rows["Latency p99 (s)"]
    assert "| 500 | 250 |" in rows["TPOT p50 (ms)"]
    assert "| n/a | n/a |" in rows["GPU utilisation (%)"]


def test_blocks_of_one_endpoint_that_differ_are_unsteady():
    found = made(last_s=7.0)
    assert found.verdict.startswith(
        "UNSTEADY: the blocks of text_generation gave 32.0, 18.3 tokens/s, a spread of 1.75 (at most 1.3 is steady): "
    )
    assert not found.valid and found.as_dict()["verdict"] == "UNSTEADY"
    assert made().as_dict()["verdict"] == "VALID" and not made().unsteady
    worse = made(last_s=7.0, failure="block 3: it broke")
    assert worse.verdict.startswith("INVALID: block 3: it broke; ") and "a spread of 1.75" in worse.verdict


def test_markdown_has_verdict_first_then_conditions_and_definitions():
    text = report.markdown(made())
    assert text.startswith("VALID\n")
    for part in (
        "Tiny",
        "torch",
        "fp8",
        "bfloat16",
        "seed 0",
        "locust",
        "hardware",
        "TTFT",
        "3-text_generation",
    ):
        assert part in text


def test_a_baseline_too_slow_for_its_block_is_valid_and_says_what_is_missing(tmp_path: Path):
    config = BenchConfig(concurrency=16, output_tokens=8)
    records = [
        *batch_server(16, 4.0, 20.0, block=BLOCKS[0].name),
        *serial_server(16, 6.0, 60.0, block=BLOCKS[1].name, endpoint="hf_baseline"),
        *batch_server(16, 4.0, 20.0, block=BLOCKS[2].name),
    ]
    slow = evaluate(
        config, Prompts(), Target("here", lambda: [], DEPLOYED), BLOCKS, records, Sampler(lambda: [])
    )
    assert slow.valid and slow.verdict.startswith("VALID; no latency of hf_baseline (0 of")
    rows = {row.split("|")[1].strip(): row for row in report.table(slow).splitlines()}
    assert "| 4.00 (n=128) | n/a (n=0) | n/a |" in rows["Latency p50 (s)"]
    assert "| 4.00 | 96.0 |" in rows["Latency mean, by Little's law (s)"]
    assert "**24.0×**" in rows["Output throughput (tokens/s)"]
    plot.comparison(slow, tmp_path / "comparison.png")


@pytest.mark.parametrize(
    ("extra", "failure", "reason"),
    [
        ([record(30.0, [31.0], error="queue full", block=BLOCKS[0].name)], None, "queue full"),
        ([record(30.0, [31.0] * 7, block=BLOCKS[0].name)], None, "7 output tokens instead of 8"),
        ([], "block 2: Locust ended", "Locust ended"),
    ],
)
def test_invalid_is_in_the_first_line(extra, failure, reason):
    bad = made(extra, failure)
    assert not bad.valid
    first = report.markdown(bad).splitlines()[0]
    assert first.startswith("INVALID: ") and reason in first


def test_a_slow_load_generator_is_told():
    """The same audit as every other command's."""
    samples = [ClientSample(0, i * 10**9, i * 10**9, i * 0.9, 4, [80.0] * 50) for i in range(60)]
    slow = made(clients=samples)
    assert "text_generation: the load generator's busiest process used 90 % of a core" in slow.verdict
    assert "text_generation: the load generator is too slow: its time stamps are 80 ms late" in slow.verdict


def test_files_and_latest(tmp_path: Path):
    good = made()
    for name in ("one", "two"):
        work = tmp_path / ".running"
        work.mkdir()
        plot.comparison(good, work / "comparison.png")
        report.publish(work, tmp_path, good, name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "one", "two"]
    assert (tmp_path / "latest").resolve() == tmp_path / "two"
    data = json.loads((tmp_path / "latest" / "report.json").read_text())
    assert (data["verdict"], data["candidate"]["e2e_s"]["n"]) == ("VALID", 112)
    height, width, _ = matplotlib.image.imread(tmp_path / "latest" / "comparison.png").shape
    assert (width, height) == (1600, 640)


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "n/a"), (9.996, "10.0"), (0.0312, "0.03"), (99.97, "100"), (1234.5, "1234"), (12.34, "12.3")],
)
def test_numbers(value, text):
    assert report.number(value) == text


def test_conditions_name_commit_and_versions():
    given = conditions.gather(BenchConfig(), Sampler(lambda: []).gpus, {})
    assert given["versions"]["locust"] == "2.47.0"
    assert given["git_commit"] and given["hardware"]["cores"] > 0


def test_process_names():
    stub = ["/x/triton_python_backend_stub", "/build/model_repository/text_generation/1/model.py", "prefix"]
    assert process_name(stub) == "stub text_generation"
    assert (
        process_name(["/usr/bin/python", "-m", "torch_engine.server", "--socket", "x"])
        == "torch_engine.server"
    )
    assert process_name(["/opt/tritonserver/bin/tritonserver", "--http-port"]) == "tritonserver"


def test_cpu_seconds_of_a_process_tree_grow():
    import os

    before = sum(process_seconds([os.getpid()]).values())
    sum(i * i for i in range(3_000_000))
    assert sum(process_seconds([os.getpid()]).values()) > before


def test_a_gpu_that_does_not_tell_everything_tells_the_rest(monkeypatch):
    """With MIG on, NVML has no utilisation; power and memory go on, and the sampler's thread lives."""

    class Nvml:
        NVMLError = RuntimeError

        def __getattr__(self, name: str):
            if name.startswith("nvmlClocksThrottleReason") or name == "NVML_CLOCK_SM":
                return 1
            answers = {"PowerUsage": 350_000, "MemoryInfo": SimpleNamespace(used=2**30), "ClockInfo": 1980}

            def ask(*_: object):
                try:
                    return answers[name.removeprefix("nvmlDeviceGet")]
                except KeyError:
                    raise self.NVMLError("not supported") from None

            return ask

    gpus = Gpus()
    monkeypatch.setattr(gpus, "_nvml", Nvml(), raising=False)
    monkeypatch.setattr(gpus, "_handles", ["one"])
    assert gpus.read() == {"gpu_memory_mib": 1024, "gpu_power_w": 350}
    assert gpus.read_series() == {"gpu_clock_mhz": 1980}


def test_memory_is_told_of_the_model_behind_each_endpoint():
    page = parse_metrics(
        "# HELP nv_trt_llm_runtime_memory_metrics Memory\n"
        'nv_trt_llm_runtime_memory_metrics{memory_type="gpu",model="tensorrt_llm",version="1"} 75161927680\n'
        'nv_trt_llm_runtime_memory_metrics{memory_type="pinned",model="tensorrt_llm",version="1"} 4096\n'
        'nv_trt_llm_runtime_memory_metrics{memory_type="gpu",model="hf_baseline",version="1"} 17179869184\n'
    )
    found = model_memory_mib(page)
    assert found == {"tensorrt_llm": 70 * 1024, "hf_baseline": 16 * 1024}
    use = Utilisation(None, None, model_memory_mib=found)
    assert use.memory_mib_of("ensemble") == use.memory_mib_of("text_generation") == 70 * 1024
    assert use.memory_mib_of("hf_baseline") == 16 * 1024
    assert Utilisation(None, None).memory_mib_of("ensemble") is None
    assert page["nv_trt_llm_runtime_memory_metrics", "pinned"] == 4096


def test_memory_of_a_window_is_the_most_that_was_seen():
    sampler = Sampler(lambda: [])
    for second, mib in enumerate((100.0, 300.0, 200.0, 900.0)):
        sampler.samples.append(Sample(second * 10**9, 0.0, {}, model_memory_mib={"tensorrt_llm": mib}))
    assert sampler.over([Window(0, 2 * 10**9)]).model_memory_mib == {"tensorrt_llm": 300}
