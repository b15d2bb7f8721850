from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import matplotlib.image
import pytest

from flightline.loadtest import conditions, output
from flightline.loadtest.definitions import DEFINITIONS
from flightline.loadtest.metrics import Window
from flightline.loadtest.options import CompareOptions
from flightline.loadtest.records import ClientSample
from flightline.loadtest.saved import build
from flightline.loadtest.telemetry import (
    Gpus,
    Sample,
    Sampler,
    Utilisation,
    model_memory_mib,
    parse_metrics,
    process_name,
    process_seconds,
)
from flightline.loadtest.words import number, pair_of
from tests.loadtest.made import bench
from tests.loadtest.traces import record


def rows(result) -> dict[str, tuple[str, ...]]:
    return {title: cells for title, *cells in pair_of(result)}


def test_the_table_says_what_was_measured(tmp_path: Path):
    found = rows(bench(tmp_path))
    assert found[""] == ["`text_generation`", "`hf_baseline`", "ratio"]
    # (16*16*4 + 16*8*3) tokens in 16 + 15 s, against 4/s; 32.0 and 25.6 in the blocks before and after the baseline's
    assert found["Output throughput (tokens/s)"] == ["28.9", "4.00", "**7.16×** (6.40–8.00 in one round)"]
    assert found["Latency p50 (s)"] == ["4.00 (n=112)", "32.0 (n=14)", "**7.16×** (6.40–8.00 in one round)"]
    assert found["Latency p99 (s)"][1] == "n/a (n=14, worst 32.0)"
    assert found["TPOT p50 (ms)"][:2] == ["500", "250"]
    assert found["GPU utilisation (%)"] == ["n/a", "n/a", ""]
    assert output.console(bench(tmp_path), tmp_path).count("|") == 5 * (len(found) + 1)
    assert bench(tmp_path).value_of("ratio") == pytest.approx((6.4 * 8.0) ** 0.5)


def test_repeats_that_differ_are_unsteady(tmp_path: Path):
    found = bench(tmp_path, last_s=7.0)
    assert found.verdict.startswith(
        "UNSTEADY: the repeats of text_generation at 16 in flight gave 32.0, 18.3 tokens/s, a spread of 1.75 "
        "(at most 1.3 is steady): "
    )
    assert not found.valid and found.status == 1 and found.as_dict()["verdict"] == "UNSTEADY"
    assert bench(tmp_path).as_dict()["verdict"] == "VALID" and not bench(tmp_path).unsteady
    worse = bench(tmp_path, last_s=7.0, failure="it broke")
    assert worse.verdict.startswith("INVALID: 2: it broke; ") and "a spread of 1.75" in worse.verdict


def test_reports_have_the_verdict_first_then_conditions_and_the_one_set_of_definitions(tmp_path: Path):
    result = bench(tmp_path)
    text = output.markdown(result)
    assert text.startswith("VALID\n")
    for part in ("Tiny", "torch", "fp8", "bfloat16", "seed 0", "locust", "hardware", "planned s", "window s"):
        assert part in text
    for name, meaning in DEFINITIONS.items():
        assert f"- **{name}**: {meaning}." in text
    assert result.as_dict()["definitions"] == DEFINITIONS


def test_a_baseline_too_slow_for_its_block_is_valid_and_says_what_is_missing(tmp_path: Path):
    slow = bench(tmp_path, service_s=6.0, last_s=4.0)
    assert slow.valid and slow.verdict.startswith("VALID; no latency of hf_baseline at 16 in flight (0 of")
    found = rows(slow)
    assert found["Latency p50 (s)"] == ["4.00 (n=128)", "n/a (n=0)", "n/a"]
    assert found["Latency mean, by Little's law (s)"][:2] == ["4.00", "96.0"]
    assert found["Output throughput (tokens/s)"][2].startswith("**24.0×**")


@pytest.mark.parametrize(
    ("extra", "failure", "reason"),
    [
        ([record(30.0, [31.0], error="queue full")], None, "queue full"),
        ([record(30.0, [31.0] * 7)], None, "7 output tokens instead of 8"),
        ([], "Locust ended", "Locust ended"),
    ],
)
def test_invalid_is_in_the_first_line(tmp_path: Path, extra, failure, reason):
    bad = bench(tmp_path, extra, failure)
    assert not bad.valid
    first = output.markdown(bad).splitlines()[0]
    assert first.startswith("INVALID: ") and reason in first


def test_a_slow_load_generator_is_told(tmp_path: Path):
    samples = [ClientSample(0, i * 10**9, i * 10**9, i * 0.9, 4, [80.0] * 50) for i in range(60)]
    slow = bench(tmp_path, clients=samples)
    told = "text_generation at 16 in flight: the load generator"
    assert f"{told}'s busiest process used 90 % of a core" in slow.verdict
    assert f"{told} is too slow: its time stamps are 80 ms late" in slow.verdict


def test_files_and_latest(tmp_path: Path):
    for last_s in (5.0, 7.0, 5.0):  # VALID, UNSTEADY, VALID
        work = tmp_path / ".running"
        work.mkdir()
        result = bench(work, last_s=last_s)
        output.publish(result, work, tmp_path, "run")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "run", "run-2", "run-3"]
    assert (tmp_path / "latest").resolve() == tmp_path / "run-3"
    files = {"figures.csv", "report.html", "report.json", "report.md", "requests.csv"}
    assert {path.name for path in (tmp_path / "run-2").iterdir()} == files
    assert {path.name for path in (tmp_path / "latest").iterdir()} == {*files, "comparison.png"}
    assert "UNSTEADY</p>" in (tmp_path / "run-2" / "report.html").read_text()
    data = json.loads((tmp_path / "latest" / "report.json").read_text())
    assert (data["verdict"], data["kind"], data["cells"][1]["summary"]["e2e_s"]["n"]) == (
        "VALID",
        "bench",
        112,
    )
    height, width, _ = matplotlib.image.imread(tmp_path / "latest" / "comparison.png").shape
    assert (width, height) == (1600, 640)


def test_a_saved_result_may_lack_what_came_later(tmp_path: Path):
    data = bench(tmp_path).as_dict()
    del data["unsteady"], data["trials"][0]["planned_s"]
    restored = build(type(bench(tmp_path)), data)
    assert restored.unsteady == [] and restored.trials[0].planned_s is None
    with pytest.raises(TypeError, match="cells"):
        build(type(restored), {name: value for name, value in data.items() if name != "cells"})


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "n/a"), (9.996, "10.0"), (0.0312, "0.03"), (99.97, "100"), (1234.5, "1234"), (12.34, "12.3")],
)
def test_numbers(value, text):
    assert number(value) == text


def test_conditions_name_commit_and_versions():
    given = conditions.gather(CompareOptions(), Sampler(lambda: []).gpus, {})
    assert given["versions"]["locust"] == "2.47.0"
    assert given["git_commit"] and given["hardware"]["cores"] > 0


def test_process_names():
    stub = ["/x/triton_python_backend_stub", "/build/model_repository/text_generation/1/model.py", "prefix"]
    assert process_name(stub) == "stub text_generation"
    assert (
        process_name(["/usr/bin/python", "-m", "flightline.torch_engine.process.server", "--socket", "x"])
        == "torch_engine.process.server"
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
