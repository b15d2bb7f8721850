"""What the supervisor concludes from answers that come, come late, or never come."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from model_repository.probe import Doorbell, Verdict

TIMEOUT_S = 0.5


class Door(BaseHTTPRequestHandler):
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
def door(request: pytest.FixtureRequest) -> Iterator[tuple[str, threading.Event]]:
    """Address, and what lets its stuck question go; the parameter is that question's number."""
    let_go = threading.Event()
    handler = type("AnyDoor", (Door,), {"stuck_at": request.param, "let_go": let_go})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", let_go
        let_go.set()
        server.shutdown()


@pytest.mark.parametrize("door", [2], indirect=True)
def test_a_question_that_later_ones_overtake(door: tuple[str, threading.Event]) -> None:
    url, let_go = door
    bell = Doorbell(url, "m", TIMEOUT_S)
    verdicts = [bell.ring().verdict for _ in range(2)]
    assert verdicts == [Verdict.ANSWERED, Verdict.SILENT]
    assert not bell.overtaken(), "nothing later was answered yet"
    assert bell.ring().verdict is Verdict.ANSWERED
    assert bell.overtaken()
    let_go.set()
    deadline = time.monotonic() + 30
    while bell.overtaken():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("door", [0], indirect=True)
def test_a_door_that_answers(door: tuple[str, threading.Event]) -> None:
    bell = Doorbell(door[0], "m", 30)
    assert all(bell.ring().served and not bell.overtaken() for _ in range(3))


def test_a_door_that_is_not_there() -> None:
    bell = Doorbell("http://127.0.0.1:9", "m", 30)
    assert bell.ring().verdict is Verdict.SILENT and not bell.overtaken()
