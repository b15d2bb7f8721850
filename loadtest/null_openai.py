"""An OpenAI server that generates nothing, at times that are set exactly, and with the faults that servers have.

``python -m flightline.loadtest.null_openai --ttft-ms 50 --tpot-ms 10``

Streams ``/v1/completions`` and ``/v1/chat/completions`` as vLLM does: one token an event, then the usage, then
``[DONE]``; with token ids if they are asked for. It works with callbacks of the event loop, not with a task for each
stream: a null server that is busy would measure itself.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import socket
import ssl
import threading
import time
from dataclasses import dataclass, field

import uvloop
from httptools import HttpRequestParser

MODEL = "null"
HEAD = b"HTTP/1.1 %d %s\r\nContent-Type: %s\r\n%s\r\n"
STREAM = HEAD % (200, b"OK", b"text/event-stream; charset=utf-8", b"Transfer-Encoding: chunked\r\n")
WORD = " word"


@dataclass(frozen=True)
class Behaviour:
    """When tokens come, and what is wrong with the answers."""

    ttft_s: float = 0.050
    tpot_s: float = 0.010
    step: bool = False
    """All streams get their tokens at the same moments, ``tpot_s`` apart, as in-flight batching gives them."""
    tokens_an_event: int = 1
    knows_token_ids: bool = True
    refuses: tuple[str, ...] = ()
    """Fields of a request that are answered with status 400."""
    missing_tokens: int = 0
    """How much shorter the text is than the usage says."""
    too_much_usage: int = 0
    """How many tokens more the usage says than were asked for."""
    usage: bool = True
    done: bool = True
    """``[DONE]`` ends the stream."""
    finish: bool = True
    """The last token comes with the reason why it is the last."""
    cut_after: int | None = None
    """Tokens after which the connection is closed."""
    error_after: int | None = None
    """Tokens after which an error event ends the stream."""
    hangs_up: bool = False
    """After each answer, without having said so."""
    cached_tokens: int = 0


@dataclass
class Answered:
    """The log of one request; times are ``time.monotonic_ns()``."""

    path: str
    body: dict
    headers: dict[str, str]
    token_times_ns: list[int] = field(default_factory=list)
    outcome: str = "running"
    """``running``, ``complete``, ``broken`` (by a fault) or ``cancelled`` (by the client)."""


class Connection(asyncio.Protocol):
    """One client; one request at a time."""

    def __init__(self, behaviour: Behaviour, log: list[Answered]) -> None:
        self._behaviour, self._log = behaviour, log
        self._loop = asyncio.get_running_loop()
        self._parser = HttpRequestParser(self)
        self._url, self._body = "", b""
        self._headers: dict[str, str] = {}
        self._answered: Answered | None = None
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        if self._answered is not None and self._answered.outcome == "running":
            self._answered.outcome = "cancelled"

    def abort(self) -> None:
        if hasattr(self, "_transport"):  # not of a TLS handshake that failed
            self._transport.abort()

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._url, self._body, self._headers = "", b"", {}

    def on_url(self, url: bytes) -> None:
        self._url += url.decode()

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode().lower()] = value.decode()

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        if self._url == "/v1/models":
            self._json(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]})
            return
        body = json.loads(self._body or b"{}")
        refused = [name for name in self._behaviour.refuses if name in body]
        if refused:
            self._error(400, f"{refused[0]} is not supported")
            return
        if self._url not in ("/v1/completions", "/v1/chat/completions") or body.get("model") != MODEL:
            self._error(404, f"no model {body.get('model')} at {self._url}")
            return
        self._answered = Answered(self._url, body, self._headers)
        self._log.append(self._answered)
        self._ids = self._behaviour.knows_token_ids and bool(body.get("return_token_ids"))
        self._sent, self._total = 0, max(1, body["max_tokens"] - self._behaviour.missing_tokens)
        self._first_at = self._loop.time() + self._behaviour.ttft_s
        self._transport.write(STREAM)
        self._wait()

    def _wait(self) -> None:
        behaviour = self._behaviour
        at = self._first_at + self._sent * behaviour.tpot_s
        if behaviour.step:
            at = math.ceil(at / behaviour.tpot_s) * behaviour.tpot_s
        self._timer = self._loop.call_at(at, self._next)

    def _next(self) -> None:
        behaviour, answered = self._behaviour, self._answered
        assert answered is not None
        if behaviour.cut_after is not None and self._sent >= behaviour.cut_after:
            answered.outcome = "broken"
            self._transport.close()
            return
        if behaviour.error_after is not None and self._sent >= behaviour.error_after:
            answered.outcome = "broken"
            self._transport.write(_event({"error": {"message": "the engine died", "code": 500}}) + _end())
            return
        count = min(behaviour.tokens_an_event, self._total - self._sent)
        self._sent += count
        answered.token_times_ns += [time.monotonic_ns()] * count
        self._transport.write(self._tokens(count))
        if self._sent < self._total:
            self._wait()
            return
        answered.outcome = "complete"
        self._transport.write((self._usage() if behaviour.usage else b"") + _end(behaviour.done))
        if behaviour.hangs_up:
            self._transport.close()

    def _tokens(self, count: int) -> bytes:
        text = WORD * count
        last = self._behaviour.finish and self._sent == self._total
        choice: dict = {"index": 0, "finish_reason": "length" if last else None}
        choice |= {"delta": {"content": text}} if "chat" in self._url else {"text": text}
        if self._ids:
            choice["token_ids"] = [7] * count
        return _event({"id": "x", "model": MODEL, "choices": [choice]})

    def _usage(self) -> bytes:
        assert self._answered is not None
        body = self._answered.body
        prompt = body["prompt"] if "prompt" in body else body["messages"][0]["content"]
        read, made = len(prompt.split()), body["max_tokens"] + self._behaviour.too_much_usage
        usage: dict = {"prompt_tokens": read, "completion_tokens": made, "total_tokens": read + made}
        if self._behaviour.cached_tokens:
            usage["prompt_tokens_details"] = {"cached_tokens": self._behaviour.cached_tokens}
        return _event({"id": "x", "model": MODEL, "choices": [], "usage": usage})

    def _error(self, status: int, words: str) -> None:
        self._json(status, {"error": {"message": words, "type": "invalid_request_error"}})

    def _json(self, status: int, value: dict) -> None:
        body = json.dumps(value).encode()
        length = b"Content-Length: %d\r\n" % len(body)
        self._transport.write(HEAD % (status, b"it", b"application/json", length) + body)


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


def _event(value: dict) -> bytes:
    return _chunk(b"data: " + json.dumps(value).encode() + b"\n\n")


def _end(done: bool = True) -> bytes:
    return (_chunk(b"data: [DONE]\n\n") if done else b"") + b"0\r\n\r\n"


class NullOpenAi:
    """The server on its own thread: ``with NullOpenAi(Behaviour()) as server: server.url``."""

    def __init__(
        self, behaviour: Behaviour | None = None, port: int = 0, tls: ssl.SSLContext | None = None
    ) -> None:
        self.log: list[Answered] = []
        self._behaviour, self._port, self._tls = behaviour or Behaviour(), port, tls
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)

    @property
    def connections(self) -> int:
        """That were made."""
        return len(self._connections)

    @property
    def url(self) -> str:
        return f"{'https' if self._tls else 'http'}://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> NullOpenAi:
        """Raises OSError if the port is taken."""
        self._thread.start()
        self._port = asyncio.run_coroutine_threadsafe(self._start(), self._loop).result()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the server, if it still runs; connections are cut off."""
        if self._thread.is_alive():
            asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    async def _start(self) -> int:
        """Returns the port."""
        self._connections: list[Connection] = []

        def connection() -> Connection:
            self._connections.append(made := Connection(self._behaviour, self.log))
            return made

        listening = socket.create_server(("127.0.0.1", self._port))
        self._server = await self._loop.create_server(connection, sock=listening, ssl=self._tls)
        return listening.getsockname()[1]

    async def _end(self) -> None:
        self._server.close()
        for connection in self._connections:
            connection.abort()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flightline.loadtest.null_openai", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--port", type=int, default=0, help="0: any that is free")
    parser.add_argument("--ttft-ms", type=float, default=50.0)
    parser.add_argument("--tpot-ms", type=float, default=10.0)
    parser.add_argument("--step", action="store_true", help="all streams at once, like in-flight batching")
    args = parser.parse_args()
    behaviour = Behaviour(args.ttft_ms / 1e3, args.tpot_ms / 1e3, args.step)
    try:
        with NullOpenAi(behaviour, args.port) as server:
            print(f"null server ready: {server.url}", flush=True)
            threading.Event().wait()
    except OSError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
