"""``make bench`` from end to end, on a server whose times are known."""

from __future__ import annotations

import json
import statistics
import threading

import pytest

from flightline.client import ClientError
from flightline.loadtest import commands, plan, warmup
from flightline.loadtest.metrics import latency_sample, steady_window
from flightline.loadtest.null_server import NullServer, Timing
from flightline.loadtest.options import Arm
from flightline.loadtest.records import read_records
from tests.client.waiting import eventually
from tests.loadtest.truth import Truth

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(plan, "MIN_BLOCK_S", 1.0)
    monkeypatch.setattr(warmup, "WARMUP_S", 0.5)
    monkeypatch.setattr(warmup, "GONE_PAUSE_S", 0.01)


def run(server: NullServer, folder, *options: str) -> int:
    load = ["--concurrency", "4", "--output-tokens", "10", "--budget-s", "6"]
    return commands.main("bench", ["--url", server.url, "--reports", str(folder), *load, *options])


def test_a_whole_run(tmp_path, capsys):
    with NullServer(Timing(0.050, 0.005)) as server:
        status = run(server, tmp_path)
        log = {request.id: request for request in server.log}
    folder = tmp_path / "latest"
    data = json.loads((folder / "report.json").read_text())
    # On a machine that is busy with other tests, the load generator may be late, and then must say so.
    assert status == (data["verdict"] != "VALID")
    assert data["verdict"] == ("INVALID" if data["reasons"] else "UNSTEADY" if data["unsteady"] else "VALID")
    assert all("load generator" in reason for reason in data["reasons"])
    assert {path.name for path in folder.iterdir()} - {"comparison.png"} == {
        "clients.jsonl", "figures.csv", "locust.log", "records.jsonl", "report.html", "report.json", "report.md",
        "requests.csv", "workers.jsonl",
    }  # fmt: skip
    assert (folder / "comparison.png").exists() != status
    records = read_records(folder / "records.jsonl")
    assert [cell["arm"] for cell in data["cells"]] == ["hf_baseline", "text_generation"]
    for cell in data["cells"]:
        mine = [record for record in records if record.endpoint == cell["arm"]]
        truth = Truth(mine, log)
        truth.assert_prompt()
        blocks = [[r for r in mine if r.block == name] for name in sorted({r.block for r in mine})]
        windows = [steady_window(block) for block in blocks]
        truth.assert_rate(cell["summary"]["output_tokens_per_s"], windows)
        sample = [r for w, block in zip(windows, blocks, strict=True) for r in latency_sample(w, block)]
        true_s = statistics.median((truth.sent_ns[r.id][-1] - r.start_ns) / 1e9 for r in sample)
        assert truth.soonest_s <= cell["summary"]["e2e_s"]["p50"] - true_s <= truth.latest_s
    assert data["cells"][1]["utilisation"]["cpu_percent"] > 0
    assert not list(tmp_path.glob(".*"))
    printed = capsys.readouterr().out
    assert "| Output throughput (tokens/s) |" in printed
    assert printed.splitlines()[-2].startswith(data["verdict"])


def stop_once_measured(server: NullServer, folder) -> None:
    """As soon as there are records, whatever the machine's pace."""
    eventually(lambda: any(path.stat().st_size for path in folder.glob(".running-*/records.jsonl")))
    server.stop()


@pytest.mark.parametrize("fault", ["short answers", "server dies"])
def test_a_run_that_must_not_be_believed(tmp_path, fault):
    missing = 1 if fault == "short answers" else 0
    with NullServer(Timing(0.050, 0.005, missing_tokens=missing)) as server:
        if fault == "server dies":
            threading.Thread(target=stop_once_measured, args=(server, tmp_path)).start()
        assert run(server, tmp_path) == 1
    folder = tmp_path / "latest"
    first = (folder / "report.md").read_text().splitlines()[0]
    assert first.startswith("INVALID: ")
    assert ("9 output tokens instead of 10" if missing else "the server died: no server at") in first
    assert not (folder / "comparison.png").exists()
    assert (folder / "records.jsonl").stat().st_size > 0


@pytest.mark.parametrize("words", ["Cancelling all calls", "GOAWAY received", "Socket closed"])
def test_a_server_that_died_is_called_so(words):
    """However gRPC words it to whom it reaches first."""
    with NullServer() as server:
        pass
    told = warmup.told_plainly(Arm("it", server.url, "text_generation"), ClientError(words))
    assert told == f"the server died: no server at {server.url} answers any more ({words})"


def test_a_server_that_answers_has_not_died():
    with NullServer() as server:
        arm, error = Arm("it", server.url, "text_generation"), ClientError("the queue is full")
        assert warmup.told_plainly(arm, error) == "the queue is full"


def test_no_server_is_one_line_and_leaves_nothing(tmp_path, capsys):
    assert commands.main("bench", ["--url", "127.0.0.1:9", "--reports", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: no server at 127.0.0.1:9")
    assert not list(tmp_path.iterdir())


def test_nothing_built_is_one_line(tmp_path, capsys):
    assert commands.main("bench", ["--reports", str(tmp_path), "--build-dir", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "make build-engines" in line
