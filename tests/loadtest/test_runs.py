"""The commands as they are used, with real Locust processes, against servers whose times are known.

The machine of a test may be busy with anything, so a run may be called INVALID for its load generator; what
is checked is what a run measures, and that it is called INVALID for the right reasons.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import psutil
import pytest

from flightline.loadtest import commands, warmup
from flightline.loadtest.audit import ClientHealth, client_reasons
from flightline.loadtest.metrics import summarise
from flightline.loadtest.null_server import NullServer, Timing
from flightline.loadtest.options import Arm, RunOptions
from flightline.loadtest.records import read_records
from flightline.loadtest.result import SCHEMA
from flightline.loadtest.saved import Saved
from flightline.loadtest.trial import Level, Trial, run_trial
from tests.client.waiting import eventually
from tests.loadtest.truth import Truth
from tests.serving import free_ports

pytestmark = pytest.mark.slow
TTFT_S, TPOT_S, TOKENS = 0.400, 0.040, 16


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch):
    monkeypatch.setattr(warmup, "WARMUP_S", 0.3)
    monkeypatch.setattr(warmup, "GONE_PAUSE_S", 0.01)


def report_of(folder: Path) -> dict:
    return json.loads((folder / "latest" / "report.json").read_text())


def options(server: NullServer, folder: Path, *more: str) -> list[str]:
    fixed = ["--url", server.url, "--reports", str(folder), "--output-tokens", "8", "--calibrate-s", "0"]
    return [*fixed, *more]


@pytest.mark.parametrize(("level", "processes"), [(Level(concurrency=64), 1), (Level(rate="50"), 2)])
def test_figures_are_the_servers_at_64_streams(tmp_path, level, processes):
    """Closed and open loop; about 64 are in flight in both."""
    settings = RunOptions(output_tokens=str(TOKENS), processes=processes, drain_s=10)
    with NullServer(Timing(TTFT_S, TPOT_S)) as server:
        trial = Trial("t", Arm("a", server.url, "text_generation"), level, 3.0)
        outcome = run_trial(trial, settings, tmp_path, print)
        log = {request.id: request for request in server.log}
    assert outcome.failure is None and outcome.window is not None
    records = [r for r in outcome.records if r.complete]
    assert len(records) >= 64 and {r.problem for r in records} == {None}
    assert {r.worker for r in records} == set(range(processes))

    # Against what the server did, since its own timers may be late on a busy machine; within 1 %, or what the client
    # itself says about its lateness, which makes a run INVALID.
    health = ClientHealth.of(outcome.clients, outcome.records, [outcome.window])
    late_s = (health.lag_p99_ms or 0.0) / 1e3
    truth = Truth(outcome.records, log)
    truth.assert_prompt()
    sent = {r.id: (truth.sent_ns[r.id] - r.sent_ns) / 1e9 for r in records}

    def difference(mine, true) -> float:
        return float(abs(np.median([mine(r) - true(r) for r in records])))

    ttft = difference(lambda r: r.ttft_s - r.schedule_delay_s, lambda r: sent[r.id][0])
    assert ttft < max(0.01 * TTFT_S, late_s)
    tpot = difference(lambda r: r.tpot_s, lambda r: np.diff(sent[r.id]).mean())
    assert tpot < max(0.001, late_s / TOKENS)
    for record in records:
        served = log[record.id]
        assert record.server_ttft_s == pytest.approx(
            (served.token_times_ns[0] - served.arrival_ns) / 1e9, abs=1e-6
        )
    summary = summarise("a", [outcome.records], [outcome.window], open_loop=not level.closed)
    truth.assert_rate(summary.output_tokens_per_s, [outcome.window])
    if not level.closed:
        assert outcome.expected == pytest.approx(150, abs=45)
        assert summary.offered_per_s == pytest.approx(outcome.expected / 3.0, rel=0.01)
        assert len({r.prompt_index for r in records}) == len(records)  # the workers share, and do not double


def test_a_slow_client_is_called_slow(tmp_path):
    """Another thread that never lets go of the interpreter delays every token, and the server is innocent."""
    slow = tmp_path / "slow.py"
    burn = "import threading\ndef burn():\n    while True: pass\n"
    start = "[threading.Thread(target=burn, daemon=True).start() for _ in range(4)]\n"
    slow.write_text(f"from flightline.loadtest.locustfile import *\n{burn}{start}")
    with NullServer(Timing(0.05, 0.01)) as server:
        trial = Trial("t", Arm("a", server.url, "text_generation"), Level(concurrency=4), 3.0)
        outcome = run_trial(trial, RunOptions(output_tokens="20"), tmp_path, print, slow)
    assert outcome.window is not None
    health = ClientHealth.of(outcome.clients, outcome.records, [outcome.window])
    reasons = client_reasons(health, summarise("a", [outcome.records]), None)
    # A busy machine does not give it the core that the other reason is about.
    assert any("too slow" in reason for reason in reasons)


def test_the_ceiling_is_found_and_stands_in_the_report(tmp_path):
    with NullServer(Timing(0.05, 0.01)) as server:
        load = options(server, tmp_path, "--concurrency", "2", "--seconds", "1")
        load[load.index("--calibrate-s") + 1] = "3"
        commands.main("run", load)
    ceiling = report_of(tmp_path)["ceiling"]
    assert ceiling["streams"] == 256 and ceiling["measured_per_s"] > 500
    assert ceiling["tokens_per_s"] == pytest.approx(1e6 / ceiling["us_per_token"])
    assert "One worker" not in (tmp_path / "latest" / "report.md").read_text().splitlines()[0]
    assert "tokens/s on this machine" in (tmp_path / "latest" / "report.html").read_text()
    answers = read_records(tmp_path / "latest" / "calibration" / "records.jsonl")
    assert {r.problem for r in answers if r.complete} == {None}  # the burst server's HTTP/2 loses nothing


def test_a_trace_is_replayed_and_asserted(tmp_path, capsys):
    trace = tmp_path / "trace.jsonl"
    rows = [{"timestamp": 250 * i, "input_length": 40, "output_length": 4 + i % 3} for i in range(12)]
    trace.write_text("\n".join(map(json.dumps, rows)))
    with NullServer(Timing(0.1, 0.01)) as server:
        load = options(server, tmp_path, "--trace", str(trace), "--trace-speed", "2.5", "--price", "36")
        status = commands.main("run", [*load, "--assert", "ttft_p50<5s, ttft_p50<10ms"])
        lengths = [r.inputs["max_tokens"] for r in server.log if len(r.inputs["text_input"].split()) == 40]
    data = report_of(tmp_path)
    assert lengths == [4 + i % 3 for i in range(12)]
    records = sorted(read_records(tmp_path / "latest" / "records.jsonl"), key=lambda r: r.intended_ns)
    spacing = np.diff([r.intended_ns for r in records]) / 1e9
    assert spacing == pytest.approx([0.25 / 2.5] * 11, abs=1e-4)
    assert status == (1 if data["reasons"] else 3)
    assert [(c["ok"], c["value"] is not None) for c in data["checked"]] == [(True, True), (False, True)]
    assert "assert ttft_p50<10ms: FAILED" in capsys.readouterr().out
    (cell,) = data["cells"]
    rate = cell["summary"]["output_tokens_per_s"]
    assert cell["cost_per_million"] == pytest.approx(36 / 3600 / rate * 1e6)


def test_a_sweep_writes_every_kind_of_report_and_two_runs_compare(tmp_path):
    """The second server is twice as fast: the comparison of the saved runs finds that out."""
    for speed, folder, levels in ((1, "slow", "1,4"), (2, "fast", "4")):
        with NullServer(Timing(0.2 / speed, 0.02 / speed)) as server:
            load = options(server, tmp_path / folder, "--levels", levels, "--seconds", "3")
            assert commands.main("sweep", load) in (0, 1)
    latest = tmp_path / "slow" / "latest"
    data = report_of(tmp_path / "slow")
    assert data["schema"] == SCHEMA and [cell["level"] for cell in data["cells"]] == [
        "1 in flight",
        "4 in flight",
    ]
    one, four = (cell["summary"] for cell in data["cells"])
    assert 1 < four["output_tokens_per_s"] / one["output_tokens_per_s"] < 8  # four, where nothing else runs
    assert (latest / "report.md").read_text().splitlines()[0].startswith(("VALID", "INVALID: "))
    page = (latest / "report.html").read_text()
    assert "<svg" in page and "http://" not in page.replace(server.url, "").replace("http://www.w3.org", "")
    assert "prefers-color-scheme: dark" in page and "@media print" in page
    figures = list(csv.DictReader((latest / "figures.csv").open()))
    assert float(figures[1]["output_tokens_per_s"]) == pytest.approx(four["output_tokens_per_s"])
    assert (latest / "summary.png").read_bytes()[:4] == b"\x89PNG"
    saved = Saved.load(latest)
    assert saved.result.as_dict() == data
    names = [str(tmp_path / name / "latest") for name in ("slow", "fast")]
    assert commands.main("compare", names) in (0, 1)
    found = {(c["metric"], c["condition"]): c["ratio"] for c in report_of(tmp_path / "fast")["comparisons"]}
    ttft = found["ttft_p50", "4 in flight"]
    assert 1 < ttft["value"] < 4 and ttft["low"] <= ttft["value"] <= ttft["high"]
    assert 1 < found["output_tokens_per_s", "4 in flight"]["value"] < 4


def test_a_search_finds_where_the_slo_breaks(tmp_path):
    """A server that works on one request at a time, a fifth of a second each, holds five a second at most."""
    with NullServer(Timing(0.130, 0.010, serial=True)) as server:
        load = [
            "--start",
            "4",
            "--seconds",
            "2",
            "--slo",
            "ttft=700ms,tpot=100ms,p=80",
            "--precision",
            "1",
            "--drain-s",
            "20",
        ]
        commands.main("search", options(server, tmp_path, *load, "--arrivals", "constant"))
    found = report_of(tmp_path)["search"]
    assert found["max_rate"] in (2.0, 4.0) and found["fails_at"] in (4.0, 8.0) and found["trials"] <= 3


def test_an_slo_that_nothing_holds_is_invalid_and_ends(tmp_path, capsys):
    with NullServer(Timing(0.1, 0.01)) as server:
        load = ["--start", "2", "--seconds", "1", "--slo", "ttft=1ms,tpot=1ms", "--most-trials", "1"]
        assert commands.main("search", options(server, tmp_path, *load)) == 1
    assert "no rate from" in capsys.readouterr().out


def test_two_workers_on_other_machines_bring_their_records_and_one_that_dies_is_missed(tmp_path):
    (port,) = free_ports(1)
    worker = [sys.executable, "-m", "flightline.loadtest", "worker", f"--master-port={port}"]
    workers = [subprocess.Popen(worker, stdout=subprocess.DEVNULL) for _ in range(2)]
    try:
        with NullServer(Timing(0.1, 0.01)) as server:
            load = ["--workers", "2", "--master-port", str(port), "--concurrency", "4"]

            def kill_one() -> None:
                eventually(lambda: len(server.log) > 40)
                psutil.Process(workers[0].pid).children()[0].kill()

            killer = threading.Thread(target=kill_one)
            killer.start()
            assert commands.main("run", options(server, tmp_path, *load, "--seconds", "5")) == 1
            killer.join()
    finally:
        for process in workers:
            for child in psutil.Process(process.pid).children(recursive=True):
                child.kill()
            process.kill()
            process.wait()
    assert any("1 of 2 workers went missing" in reason for reason in report_of(tmp_path)["reasons"])
    records = read_records(tmp_path / "latest" / "records.jsonl")
    assert {0, 1} <= {record.worker for record in records} and len(records) > 40
    assert len({record.prompt_index for record in records}) == len(records)


def test_a_server_that_dies_leaves_an_invalid_report_with_what_was_measured(tmp_path):
    with NullServer(Timing(0.05, 0.005)) as server:

        def stop_soon() -> None:
            eventually(lambda: len(server.log) > 40)
            server.stop()

        stopper = threading.Thread(target=stop_soon)
        stopper.start()
        assert commands.main("run", options(server, tmp_path, "--concurrency", "4", "--seconds", "3")) == 1
        stopper.join()
    data = report_of(tmp_path)
    assert any("requests failed: " in reason for reason in data["reasons"])
    assert any("no server at" in reason for reason in data["reasons"])
    assert data["cells"][0]["summary"]["completed"] > 10


def test_records_that_cannot_be_written_end_the_run_with_one_line(tmp_path):
    """A limit on the size of files is what a full disk is: a write that fails in the middle."""
    limited = tmp_path / "limited.py"
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
    limited.write_text(f"from flightline.loadtest.locustfile import *\n{limit}")
    with NullServer(Timing(0.05, 0.005)) as server:
        trial = Trial(
            "t", Arm("a", server.url, "text_generation"), Level(concurrency=4), 3600.0
        )  # not that long
        outcome = run_trial(trial, RunOptions(output_tokens="8"), tmp_path, print, limited)
    assert outcome.failure is not None
    assert outcome.failure.startswith(f"RECORDS={tmp_path}/records.jsonl cannot be written: ")
    assert len(outcome.records) > 10  # what fitted is kept


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--rate", "0"], "RATE='0'"),
        (["--trace", "absent.jsonl"], "TRACE=absent.jsonl"),
        (["--slo", "soon"], "SLO='soon'"),
        (["--assert", "speed>1"], "ASSERT='speed>1'"),
        (["--seconds", "5", "--ramp-s", "6"], "SECONDS=5.0"),
        (["--workload", "poetry"], "WORKLOAD='poetry'"),
        (["--endpoint", "gpt"], "ENDPOINT='gpt'"),
    ],
)
def test_bad_settings_are_one_line(arguments, why, capsys):
    assert commands.main("run", arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and why in line


def test_no_server_and_no_saved_run_are_one_line(tmp_path, capsys):
    assert (
        commands.main("run", ["--url", "127.0.0.1:9", "--reports", str(tmp_path), "--calibrate-s", "0"]) == 1
    )
    assert commands.main("compare", [str(tmp_path), str(tmp_path)]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first.startswith("error: no server at 127.0.0.1:9") and "is no report folder" in second
    assert not list(tmp_path.iterdir())
