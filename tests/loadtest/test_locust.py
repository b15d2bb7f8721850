"""Locust as it is really run, against a server whose times are known."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.parse
import urllib.request
from pathlib import Path

import pytest

from flightline.client import ServerUnavailable
from flightline.loadtest import ui
from flightline.loadtest.metrics import steady_window, summarise
from flightline.loadtest.null_server import NullServer, Timing
from flightline.loadtest.options import Arm, RunOptions
from flightline.loadtest.records import read_records
from flightline.loadtest.trial import LOCUSTFILE, Level, Trial, free_port, run_trial
from tests.client.waiting import eventually
from tests.loadtest.truth import Truth

pytestmark = pytest.mark.slow
TOKENS = 20


def drive(server: NullServer, folder, endpoint="text_generation", users=8, seconds=3):
    return drive_url(server.url, folder, endpoint, users, seconds)


def drive_url(url: str, folder, endpoint="text_generation", users=8, seconds=3):
    trial = Trial("block", Arm(endpoint, url, endpoint), Level(concurrency=users), seconds, first_prompt=5)
    outcome = run_trial(trial, RunOptions(output_tokens=str(TOKENS)), folder, print)
    assert outcome.failure is None
    return outcome.records


@pytest.mark.parametrize(("first_chunk_tokens", "endpoint"), [(1, "text_generation"), (5, "ensemble")])
def test_reported_times_are_the_servers(tmp_path, first_chunk_tokens, endpoint):
    """The ensemble counts the tokens of a response, our own endpoint those of all so far."""
    with NullServer(Timing(0.060, 0.020, first_chunk_tokens)) as server:
        records = drive(server, tmp_path, endpoint, seconds=2)
        served = {request.id: request for request in server.log}
    complete = [record for record in records if record.complete]
    assert len(complete) >= 8 and all(record.problem is None for record in records)
    for record in complete:
        tokens = served[record.id].token_times_ns
        assert record.num_output_tokens == TOKENS
        assert len(record.chunk_ns) == len(tokens)

    truth = Truth(complete, served)
    truth.assert_prompt()
    rest = TOKENS - first_chunk_tokens
    for record in complete:
        first, *_, last = (truth.sent_ns[record.id] - record.start_ns) / 1e9
        assert truth.soonest_s <= record.ttft_s - first <= truth.latest_s
        assert truth.soonest_s <= record.e2e_s - last <= truth.latest_s
        assert record.tpot_s == pytest.approx((last - first) / rest, abs=truth.latest_s / rest)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Records and the server's log of one block of three seconds."""
    with NullServer(Timing(0.050, 0.010)) as server:
        return drive(server, tmp_path_factory.mktemp("plain")), server.log


def test_throughput_is_what_the_server_sent(plain):
    records, log = plain
    truth, window = Truth(records, {request.id: request for request in log}), steady_window(records)
    truth.assert_prompt()
    assert window is not None and window.seconds > 1
    truth.assert_rate(summarise("text_generation", [records]).output_tokens_per_s, [window])


def test_the_block_lasts_as_long_as_planned(plain):
    records, _ = plain
    # Tokens come until the end, however long ago a busy machine let their requests go.
    first, last = min(r.sent_ns for r in records), max(r.chunk_ns[-1] for r in records if r.chunk_ns)
    assert (last - first) / 1e9 > 2.2  # Locust alone loses the time of its imports


def test_prompts_go_out_once_each_from_the_first_index(plain):
    records, log = plain
    sent = [request.inputs["text_input"] for request in log]
    assert sorted(record.prompt_index for record in records) == list(range(5, 5 + len(records)))
    assert len(set(sent)) == len(sent) >= len(records) - 8  # the last ones may never have left
    assert {(r.inputs["min_tokens"], r.inputs["max_tokens"]) for r in log} == {(TOKENS, TOKENS)}


@pytest.mark.parametrize("endpoint", ["hf_baseline", "ensemble"])
def test_what_is_in_flight_at_the_end_is_cancelled_and_recorded(tmp_path, endpoint):
    with NullServer(Timing(0.5, 0.1, serial=endpoint == "hf_baseline")) as server:
        records = drive(server, tmp_path, endpoint, users=4, seconds=2)
        cut_off = {record.id for record in records if record.cancelled}
        assert len(cut_off) == 4
        outcomes = {r.id: r for r in server.log}
        assert eventually(lambda: all(r.outcome != "running" for r in server.log))
        assert all(outcomes[id].outcome != "complete" for id in cut_off)
        if endpoint == "ensemble":
            assert set(server.stop_requests) == cut_off


def test_failures_are_recorded_with_the_servers_text(tmp_path):
    with NullServer() as server:
        url = server.url
    records = drive_url(url, tmp_path, users=2, seconds=2)
    assert 2 <= len(records) <= 10  # a server that is gone is not asked in a tight loop
    assert all("no server at" in record.error for record in records)


def fetch(url: str, form: dict | None = None) -> str:
    data = urllib.parse.urlencode(form, doseq=True).encode() if form else None
    with urllib.request.urlopen(url, data, timeout=300) as response:
        return response.read().decode()


def in_chromium(url: str) -> str:
    """The page as it stands after its scripts have run for a while."""
    ours = Path(sys.executable).parent  # where make test puts it on a machine that has none
    path = os.pathsep.join([str(ours), os.environ.get("PATH", os.defpath)])
    names = ("chromium", "chromium-browser", "google-chrome")
    chromium = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
    if chromium is None:
        pytest.skip("no browser on this machine")
    with tempfile.TemporaryDirectory() as profile:
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}"]
        command = [chromium, *options, "--virtual-time-budget=4000", "--dump-dom", url]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    return done.stdout


def test_the_web_ui_offers_the_endpoints_and_runs_them():
    """With a master and two workers, which is where its figures could go wrong."""
    port = free_port()
    between = free_port()
    more = ["--processes=2", f"--master-bind-port={between}", f"--master-port={between}"]
    with NullServer(Timing(0.02, 0.002), models=("text_generation", "hf_baseline")) as server:
        environment = {**os.environ, "URL": server.url, "LOCUST_PORT": str(port)}
        process = subprocess.Popen(
            [sys.executable, "-m", "flightline.loadtest", "ui", *more], env=environment
        )
        try:
            base = f"http://127.0.0.1:{port}"

            def answers() -> bool:
                try:
                    return bool(fetch(base))
                except OSError:
                    return False

            assert eventually(answers)
            assert eventually(lambda: len(json.loads(fetch(f"{base}/stats/requests"))["workers"]) == 2)
            page = fetch(base)
            assert all(name in page for name in ("TextGeneration", "HfBaseline", "output_tokens"))
            assert "Ensemble" not in page  # is not served
            assert "OpenAi" not in page  # needs a model's name and a server's URL
            form = {"user_count": 3, "spawn_rate": 3, "host": server.url, "user_classes": ["HfBaseline"]}
            fetch(f"{base}/swarm", {**form, "output_tokens": 7})

            def rows() -> set[tuple[str, str]]:
                stats = json.loads(fetch(f"{base}/stats/requests"))["stats"]
                return {(row["method"], row["name"]) for row in stats}

            wanted = {("E2E", "hf_baseline"), ("TTFT", "hf_baseline"), ("TPOT", "hf_baseline")}
            assert eventually(lambda: wanted <= rows())
            assert {request.model for request in server.log} == {"hf_baseline"}
            assert {request.inputs["max_tokens"] for request in server.log} == {7}
            assert 'href="llm"' in page
            live = json.loads(fetch(f"{base}/llm/live"))["endpoints"]["hf_baseline"]
            assert 0.0198 < live["ttft_s"]["p50"] < 2
            seen = in_chromium(f"{base}/llm")
            assert 'id="card-hf_baseline"' in seen and "<svg" in seen and "TTFT p50" in seen
            assert re.search(r'id="verdict" class="(IN)?VALID"', seen)
            fetch(f"{base}/stop", {"stop": "now"})
        finally:
            process.terminate()
            process.wait(timeout=300)


def test_the_ui_offers_what_is_served():
    with NullServer(models=("text_generation",)) as server:
        assert ui.ready(server.url) == ["text_generation"]
    with (
        NullServer(models=()) as server,
        pytest.raises(ServerUnavailable, match="has no model 'hf_baseline' that is ready"),
    ):
        ui.ready(server.url)


def test_the_ui_says_when_there_is_no_server():
    environment = {**os.environ, "URL": "127.0.0.1:9"}
    done = subprocess.run(
        [sys.executable, "-m", "flightline.loadtest", "ui"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("error: no server at 127.0.0.1:9: start it with 'make serve'")
    assert len(done.stderr.splitlines()) == 1


def test_workers_share_one_record_file_and_no_prompts(tmp_path):
    records, port = tmp_path / "records.jsonl", free_port()
    with NullServer(Timing(0.05, 0.005)) as server:
        command = [
            sys.executable,
            "-m",
            "flightline.loadtest.locust_main",
            "-f",
            LOCUSTFILE,
            "--headless",
            "--processes=2",
            f"--master-bind-port={port}",
            f"--master-port={port}",
        ]
        options = ["-u4", "-r4", "--host", server.url, f"--records={records}", "--output-tokens=10"]
        locust = subprocess.Popen([*command, *options, "TextGeneration"], stderr=subprocess.DEVNULL)
        try:
            both = {0, 1}
            assert eventually(lambda: {record.worker for record in read_records(records)} == both)
        finally:
            locust.terminate()
            locust.wait()
    indices = [record.prompt_index for record in read_records(records)]
    assert len(set(indices)) == len(indices) and {index // 1_000_000 for index in indices} == {0, 1}
