"""What the supervisor concludes from answers that come, come late, or never come."""

from __future__ import annotations

import dataclasses
import os
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pytest

from flightline.supervisor.engine_process import EngineProcess, Share
from flightline.supervisor.probe import EndpointCheck, GrpcPort, HttpPort, Port, Verdict
from flightline.torch_engine.core.request import EngineStats
from tests.answering import answering

TIMEOUT_S = 0.5


class Endpoint(BaseHTTPRequestHandler):
    """Answers, but for the question whose number is stuck until it is let go."""

    stuck_at: int
    let_go: threading.Event
    asked = 0

    def do_POST(self) -> None:
        type(self).asked += 1
        if self.asked == self.stuck_at:
            self.let_go.wait(60)
        body = b'{"text_output": "a"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None: ...


@pytest.fixture
def endpoint(request: pytest.FixtureRequest) -> Iterator[tuple[str, threading.Event]]:
    """Address, and what lets its stuck question go; the parameter is that question's number."""
    let_go = threading.Event()
    handler = type("AnyEndpoint", (Endpoint,), {"stuck_at": request.param, "let_go": let_go})
    with answering(handler) as url:
        yield url, let_go
        let_go.set()


@pytest.mark.parametrize("endpoint", [2], indirect=True)
def test_a_question_that_later_ones_overtake(endpoint: tuple[str, threading.Event]) -> None:
    url, let_go = endpoint
    check = EndpointCheck(HttpPort(url), "m", 1.5)  # a busy machine answers within it
    verdicts = [check.ask().verdict for _ in range(2)]
    assert verdicts == [Verdict.ANSWERED, Verdict.SILENT]
    assert not check.overtaken(), "nothing later was answered yet"
    assert check.ask().verdict is Verdict.ANSWERED
    assert check.overtaken()
    let_go.set()
    deadline = time.monotonic() + 30
    while check.overtaken():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("endpoint", [0], indirect=True)
def test_an_endpoint_that_answers(endpoint: tuple[str, threading.Event]) -> None:
    check = EndpointCheck(HttpPort(endpoint[0]), "m", 30)
    assert all(check.ask().served and not check.overtaken() for _ in range(3))


@pytest.mark.parametrize("port", [HttpPort("http://127.0.0.1:9"), GrpcPort("127.0.0.1:9")])
def test_an_endpoint_that_is_not_there(port: Port) -> None:
    """That is not silence, which may be the engine's."""
    check = EndpointCheck(port, "m", 30)
    assert check.ask().verdict is Verdict.DEAD and not check.overtaken()


class Mute:
    """An engine that takes requests and ends no step."""

    connected = True
    stats = EngineStats()

    def __init__(self, path: str) -> None:
        self.path = path

    def submit(self, request: object, on_output: object) -> None: ...


@pytest.fixture
def silent_engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineProcess]:
    """A process that never answers; the parameter is what it does instead."""
    share = Share(dict(os.environ))
    engine = EngineProcess("engine", "m", tmp_path, tmp_path / "log", Mute(str(tmp_path / "socket")), share)
    engine._command = [sys.executable, "-S", "-c", request.param]
    child = engine.start()
    yield engine
    child.stop(0.0)


@pytest.mark.parametrize("silent_engine", ["while True: pass"], indirect=True)
def test_a_slow_engine_is_not_stuck(silent_engine: EngineProcess) -> None:
    for _ in range(3):
        assert not silent_engine.answers(TIMEOUT_S)
        assert not silent_engine.problem()


@pytest.mark.parametrize("silent_engine", ["while True: pass"], indirect=True)
def test_no_step_takes_for_ever(silent_engine: EngineProcess) -> None:
    silent_engine.answers(TIMEOUT_S)
    silent_engine._silence = dataclasses.replace(silent_engine._silence, since=-1000.0)
    silent_engine.answers(TIMEOUT_S)
    assert "has stopped answering" in silent_engine.problem()


@pytest.mark.parametrize("silent_engine", ["import time; time.sleep(1000)"], indirect=True)
def test_an_engine_that_neither_answers_nor_computes_is_stuck(silent_engine: EngineProcess) -> None:
    # The first questions may fall into the start of the interpreter, which computes.
    deadline = time.monotonic() + 60
    while not silent_engine.problem():
        assert time.monotonic() < deadline
        assert not silent_engine.answers(TIMEOUT_S)
    assert "has stopped answering" in silent_engine.problem()
