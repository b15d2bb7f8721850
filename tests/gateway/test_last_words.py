"""A gateway process that is killed: each of its clients is told, and nobody else's connection is kept."""

from __future__ import annotations

import asyncio
import http.client
import http.server
import json
import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from flightline.gateway.alone import Alone, alone
from flightline.gateway.exchange import CONTINUE
from flightline.gateway.last_words import HOLD, HOLDS, LETS_GO, NUMBER, RETRY_S, Channel
from flightline.gateway.settings import GatewaySettings, Upstream
from flightline.loadtest.null_server import NullServer, Timing
from flightline.supervisor.last_words import LastWords
from tests.answering import answering
from tests.client.waiting import eventually
from tests.tiny import byte_level_tokenizer, save_tokenizer

Start = Callable[..., tuple[Alone, LastWords]]
SLOW = Timing(ttft_s=0.0, tpot_s=0.05)
NEVER = Timing(ttft_s=3600.0, tpot_s=0.0)


class TritonStream(http.server.BaseHTTPRequestHandler):
    """An event, and then nothing more."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        self.wfile.write(b'data: {"text_output":"a"}\n\n')
        self.wfile.flush()
        self.rfile.read(1)  # until it is left

    def log_message(self, *_: object) -> None: ...


@contextmanager
def heard(upstream: Upstream, settings: GatewaySettings, **more: Any) -> Iterator[tuple[Alone, LastWords]]:
    words = LastWords()
    with alone(upstream, settings, last_words_fd=words.channel.fileno(), **more) as running:
        words.given()
        yield running, words


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """A gateway process in front of a server of some timing, and who speaks for it."""
    save_tokenizer(byte_level_tokenizer(), tmp_path)
    template = tmp_path / "template.jinja"
    template.write_text("{% for message in messages %}{{ message.content }}{% endfor %}")

    with ExitStack() as stack:

        def started(timing: Timing, http_url: str = "") -> tuple[Alone, LastWords]:
            triton = stack.enter_context(NullServer(timing))
            upstream = Upstream(
                triton.url,
                http_url=http_url,
                tokenizer_dir=str(tmp_path),
                model="tiny",
                max_seq_len=4096,
            )
            settings = GatewaySettings(chat_template=str(template))
            context: AbstractContextManager[tuple[Alone, LastWords]] = heard(upstream, settings)
            return stack.enter_context(context)

        yield started


def client(gateway: Alone) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


def kill(gateway: Alone) -> None:
    gateway.process.kill()
    gateway.process.wait()


def stream_of(llm: openai.OpenAI, endpoint: str) -> Any:
    if endpoint == "chat":
        message: Any = {"role": "user", "content": "a"}
        return llm.chat.completions.create(model="tiny", messages=[message], max_tokens=4000, stream=True)
    if endpoint == "responses":
        return llm.responses.create(model="tiny", input="a", max_output_tokens=4000, stream=True)
    return llm.completions.create(model="tiny", prompt="a", max_tokens=4000, stream=True)


@pytest.mark.parametrize("endpoint", ["chat", "completions", "responses"])
def test_a_stream_ends_with_an_error_that_the_sdk_raises(start: Start, endpoint: str) -> None:
    gateway, _ = start(SLOW)
    with client(gateway) as llm:
        stream = stream_of(llm, endpoint)
        for _ in range(6):
            next(stream)
        kill(gateway)
        if endpoint == "responses":
            last = list(stream)[-1]  # this SDK hands over the event as one of the others
            assert (last.type, last.code) == ("error", "service_unavailable")
            assert "send the request again" in last.message
        else:
            with pytest.raises(openai.APIError, match="send the request again") as told:
                list(stream)
            assert told.value.code == "service_unavailable"


def test_every_one_of_many_streams_is_told_after_whole_events(start: Start) -> None:
    gateway, _ = start(Timing(ttft_s=0.0, tpot_s=0.002))
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 4000, "stream": True}).encode()
    connections = [asked(gateway, "/v1/completions", body) for _ in range(32)]
    began = [connection.recv(1000) for connection in connections]
    kill(gateway)
    for connection, first in zip(connections, began, strict=True):
        *events, error, done, rest = body_of(first + until_closed(connection)).split(b"\n\n")
        assert (done, rest) == (b"data: [DONE]", b"")
        assert json.loads(error.removeprefix(b"data: "))["error"]["code"] == "service_unavailable"
        assert all(json.loads(event.removeprefix(b"data: "))["choices"] for event in events)


@pytest.mark.parametrize("streaming", [False, True])
def test_before_the_status_it_is_a_503(start: Start, streaming: bool) -> None:
    gateway, words = start(NEVER)
    found: list[openai.APIStatusError] = []

    def ask() -> None:
        with client(gateway) as llm, pytest.raises(openai.APIStatusError) as told:
            llm.completions.create(model="tiny", prompt="a", max_tokens=9, stream=streaming)
        found.append(told.value)

    asking = threading.Thread(target=ask)
    asking.start()
    assert eventually(lambda: words.held == 1)
    kill(gateway)
    asking.join(30)
    (error,) = found
    assert (error.status_code, error.code) == (503, "service_unavailable")
    assert error.response.headers["retry-after"] == "1"
    assert error.response.headers["x-request-id"]


def test_who_waited_for_a_continue_gets_the_503_after_it(start: Start) -> None:
    gateway, words = start(NEVER)
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 9}).encode()
    connection = asked(gateway, "/v1/completions", body, "Expect: 100-continue", sends_body=False)
    assert connection.recv(100) == CONTINUE
    connection.sendall(body)
    assert eventually(lambda: words.held == 1)
    kill(gateway)
    assert until_closed(connection).startswith(b"HTTP/1.1 503 Service Unavailable\r\n")


def test_a_connection_that_does_not_fit_in_is_not_held() -> None:
    """The kernel leaves a descriptor out that would be one too many; the others are held all the same."""
    words, ours = LastWords(), socket.socketpair()
    message = HOLDS + HOLD.pack(1, 0, 1) + b"ab"
    words.channel.send(message)
    socket.send_fds(words.channel, [HOLDS + HOLD.pack(2, 0, 1) + b"ab"], [ours[0].fileno()])
    assert eventually(lambda: words.held == 1)
    words.channel.send(LETS_GO + NUMBER.pack(1) + NUMBER.pack(2))
    assert eventually(lambda: words.held == 0)
    words.given()
    words.join(30)
    for end in ours:
        end.close()


def test_who_is_let_go_while_the_supervisor_does_not_listen_is_let_go_later() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)

    async def fill_and_let_go() -> set[int]:
        channel = Channel(theirs.detach())
        connection = socket.create_connection(listener.getsockname())
        held = []
        while (one := channel.hold(connection, 0, b"a" * 1000, b"b")) is not None:
            held.append(one)
        for one in held:
            one.release()
        await asyncio.sleep(2 * RETRY_S)  # nobody could be told
        connection.close()
        ours.setblocking(False)
        told: set[int] = set()
        while len(told) < len(held):
            try:
                data, files, *_ = socket.recv_fds(ours, 1 << 16, 1)
            except BlockingIOError:
                await asyncio.sleep(0.01)
                continue
            for file in files:
                os.close(file)
            if data[:1] == LETS_GO:
                told |= {number for (number,) in NUMBER.iter_unpack(data[1:])}
        assert held
        return told

    with ours, socket.create_server(("127.0.0.1", 0)) as listener:
        told = asyncio.run(asyncio.wait_for(fill_and_let_go(), 30))
    assert told == set(range(len(told)))


def test_tritons_own_stream_ends_with_an_error_as_triton_tells_it(start: Start) -> None:
    with answering(TritonStream) as url:
        gateway, _ = start(SLOW, http_url=url)
        connection = asked(gateway, "/v2/models/tiny/generate_stream", b'{"text_input": "a"}')
        first = b""
        while b"text_output" not in first:
            first += connection.recv(4096)
        kill(gateway)
        last = body_of(first + until_closed(connection)).split(b"\n\n")[-2]
        assert "send the request again" in json.loads(last.removeprefix(b"data: "))["error"]


def test_who_has_its_answer_or_left_is_held_no_longer(start: Start) -> None:
    gateway, words = start(SLOW)
    files = len(os.listdir("/proc/self/fd"))
    body = json.dumps({"model": "tiny", "prompt": "a", "max_tokens": 3}).encode()
    bad = json.dumps({"model": "tiny", "prompt": 7}).encode()
    kept = http.client.HTTPConnection("127.0.0.1", gateway.port, timeout=30)
    for sent, status in ((body, 200), (bad, 400), (body, 200)):
        kept.request("POST", "/v1/completions", sent, {"Content-Type": "application/json"})
        answer = kept.getresponse()
        assert (answer.status, json.loads(answer.read()).get("id") is not None) == (status, status == 200)
    closed = asked(gateway, "/v1/completions", body, "Connection: close")
    assert until_closed(closed).startswith(b"HTTP/1.1 200")
    gone = asked(gateway, "/v1/completions", json.dumps({"prompt": "a", "max_tokens": 4000}).encode())
    assert eventually(lambda: words.held == 1)
    gone.close()
    assert eventually(lambda: words.held == 0)
    kill(gateway)
    assert until_closed(kept.sock) == b""
    # Its end of the channel and its connection to the server go when their threads see that it is gone.
    assert eventually(lambda: len(os.listdir("/proc/self/fd")) < files)


def asked(
    gateway: Alone, path: str, body: bytes, header: str = "Accept: */*", sends_body: bool = True
) -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", gateway.port), timeout=30)
    head = f"POST {path} HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\n{header}\r\n"
    connection.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body * sends_body)
    return connection


def until_closed(connection: socket.socket) -> bytes:
    with connection:
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def body_of(answer: bytes) -> bytes:
    """What came in whole chunks (RFC 9112, 7.1), of which there must be a last one."""
    head, rest = answer.split(b"\r\n\r\n", 1)
    assert head.startswith(b"HTTP/1.1 200") and b"transfer-encoding: chunked" in head
    body = b""
    while True:
        line, rest = rest.split(b"\r\n", 1)
        size = int(line, 16)
        body += rest[:size]
        assert rest[size : size + 2] == b"\r\n"
        rest = rest[size + 2 :]
        if size == 0:
            assert rest == b""
            return body
