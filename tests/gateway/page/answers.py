"""A small server that answers as the gateway does: the page, the models, and answers that a test has written."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from typing import Any

from flightline.gateway import page
from tests.answering import answering


class Answers:
    """What the server is to say, and what it was asked."""

    def __init__(self) -> None:
        self.url = ""
        self.key: str | None = None
        """The API key that is wanted."""
        self.requests: list[dict[str, Any]] = []
        self.status = 200
        self.error = ""
        """With a status of 200: in the middle of the stream."""
        self.pieces: list[dict[str, Any]] = [{"content": "Hello"}]
        """Deltas."""
        self.finish: str | None = "stop"
        """None: the connection ends without an end of the stream."""
        self.gate: Callable[[int], None] = lambda index: None
        """Called before each piece."""
        self.gone = threading.Event()
        """A client left in the middle of an answer."""


def say(text: str) -> list[dict[str, Any]]:
    """Deltas of a word each."""
    return [{"content": word} for word in text.replace(" ", " \0").split("\0")]


@contextmanager
def serve() -> Iterator[Answers]:
    answers = Answers()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *args: Any) -> None:
            pass

        def send(self, status: int, kind: str, body: bytes) -> None:
            self.send_response(status)
            self.send_header("content-type", kind)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def refuse(self, status: int, message: str) -> None:
            error = {"message": message, "type": "error", "param": None, "code": None}
            self.send(status, "application/json", json.dumps({"error": error}).encode())

        def allowed(self) -> bool:
            if answers.key in (None, self.headers.get("authorization", "").removeprefix("Bearer ")):
                return True
            self.refuse(401, "no key")
            return False

        def do_GET(self) -> None:
            if self.path == "/":
                self.send(200, "text/html; charset=utf-8", page.html())
            elif self.path == "/v1/models" and self.allowed():
                models = [{"id": name, "object": "model"} for name in ("tiny", "org/large-8b-instruct")]
                self.send(200, "application/json", json.dumps({"object": "list", "data": models}).encode())
            elif self.path != "/v1/models":
                self.refuse(404, "no such page")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            if not self.allowed():
                return
            answers.requests.append(body)
            if answers.status != 200:
                self.refuse(answers.status, answers.error)
                return
            self.send_response(200)
            self.send_header("content-type", "text/event-stream; charset=utf-8")
            self.send_header("connection", "close")
            self.end_headers()
            try:
                self.stream()
            except OSError:
                answers.gone.set()
            self.close_connection = True

        def stream(self) -> None:
            def event(data: str) -> None:
                self.wfile.write(f"data: {data}\n\n".encode())

            def chunk(tokens: int, delta: dict[str, Any], finish: str | None = None) -> None:
                choice = {"index": 0, "delta": delta, "finish_reason": finish}
                usage = {"prompt_tokens": 5, "completion_tokens": tokens, "total_tokens": 5 + tokens}
                event(json.dumps({"object": "chat.completion.chunk", "choices": [choice], "usage": usage}))

            chunk(0, {"role": "assistant", "content": ""})
            self.wfile.write(b": keep-alive\n\n")
            for index, piece in enumerate(answers.pieces):
                answers.gate(index)
                chunk(index + 1, piece)
            if answers.error:
                event(json.dumps({"error": {"message": answers.error, "type": "server_error"}}))
                event("[DONE]")
            elif answers.finish:
                chunk(len(answers.pieces), {}, answers.finish)
                event("[DONE]")

    with answering(Handler) as url:
        answers.url = f"{url}/"
        yield answers
