"""gRPC over our own HTTP/2, against a server that says exactly what a test lets it say."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
import pytest
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import DataReceived, PingAckReceived, RequestReceived, StreamEnded, StreamReset
from h2.settings import SettingCodes
from hyperframe.frame import GoAwayFrame

from flightline.gateway.channel import LAST_STREAM, Call, CallFailed, Channel

T = TypeVar("T")
PATIENCE_S = 30.0
OK = [("grpc-status", "0")]


class Peer(asyncio.Protocol):
    """The server's end of one connection."""

    def __init__(self, settings: dict[SettingCodes, int]) -> None:
        self.http2 = H2Connection(H2Configuration(client_side=False, header_encoding="utf-8"))
        self._settings = settings
        self.events: list[Any] = []
        self.received: dict[int, bytes] = {}
        self._answered: set[int] = set()

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.http2.initiate_connection()
        self.http2.update_settings(self._settings)
        self.flush()

    def data_received(self, data: bytes) -> None:
        for event in self.http2.receive_data(data):
            self.events.append(event)
            if isinstance(event, DataReceived):
                stream = event.stream_id
                self.received[stream] = self.received.get(stream, b"") + event.data
                self.http2.acknowledge_received_data(event.flow_controlled_length, stream)
        self.flush()

    def flush(self) -> None:
        self.transport.write(self.http2.data_to_send())

    def of_kind(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]

    async def asked(self, count: int = 1) -> list[int]:
        """The streams of ``count`` whole requests, in their order."""
        await until(lambda: len(self.of_kind(StreamEnded)) >= count)
        return [event.stream_id for event in self.of_kind(StreamEnded)]

    def say(self, stream: int, *parts: bytes) -> None:
        """The head of an answer, and frames."""
        if stream not in self._answered:
            self._answered.add(stream)
            self.http2.send_headers(stream, [(":status", "200"), ("content-type", "application/grpc")])
        for part in parts:
            self.http2.send_data(stream, part)
        self.flush()

    def end(self, stream: int, trailers: list[tuple[str, str]] = OK) -> None:
        self.http2.send_headers(stream, trailers, end_stream=True)
        self.flush()


class Server:
    """All connections, and the channel to them."""

    def __init__(self) -> None:
        self.peers: list[Peer] = []
        self.settings: dict[SettingCodes, int] = {}
        self.channel: Channel

    def call(self, request: bytes = b"question", timeout_s: float = PATIENCE_S) -> Call:
        return self.channel.call("/some.Service/Method", request, timeout_s)

    async def peer(self, number: int = 0) -> Peer:
        await until(lambda: len(self.peers) > number)
        return self.peers[number]

    def accept(self) -> Peer:
        self.peers.append(Peer(self.settings))
        return self.peers[-1]


async def until(met: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not met():
            await asyncio.sleep(0.001)


def served(test: Callable[[Server], Awaitable[None]]) -> None:
    """Runs ``test`` beside a server."""

    async def run() -> None:
        server = Server()
        listening = await asyncio.get_running_loop().create_server(server.accept, "127.0.0.1", 0)
        server.channel = Channel(f"127.0.0.1:{listening.sockets[0].getsockname()[1]}")
        try:
            await test(server)
        finally:
            await server.channel.close()
            listening.close()

    asyncio.run(run())


def framed(message: bytes, compressed: int = 0) -> bytes:
    return bytes([compressed]) + len(message).to_bytes(4, "big") + message


async def everything(call: Call) -> list[bytes]:
    async with asyncio.timeout(PATIENCE_S):
        messages: list[bytes] = []
        while part := await call.take():
            messages += part
        return messages


async def failure(call: Call) -> CallFailed:
    with pytest.raises(CallFailed) as failed:
        await everything(call)
    return failed.value


def test_a_call_as_the_protocol_wants_it() -> None:
    async def test(server: Server) -> None:
        call = server.call(b"x" * 300_000, timeout_s=7.0)  # more than the first window
        peer = await server.peer()
        (stream,) = await peer.asked()
        head = dict(peer.of_kind(RequestReceived)[0].headers)
        assert (head[":method"], head[":path"], head["te"]) == ("POST", "/some.Service/Method", "trailers")
        assert head["content-type"] == "application/grpc" and head["grpc-timeout"] == "7000m"
        assert peer.received[stream] == framed(b"x" * 300_000)
        peer.say(stream, framed(b"one"), framed(b"two") + framed(b"") + framed(b"three")[:4])
        assert await call.take() == [b"one", b"two", b""]
        peer.http2.send_data(stream, framed(b"three")[4:7])
        peer.http2.send_data(stream, framed(b"three")[7:])
        peer.end(stream)
        assert await everything(call) == [b"three"]

    served(test)


@pytest.mark.parametrize(
    ("trailers", "status", "details"),
    [
        (
            [("grpc-status", "3"), ("grpc-message", "no %22n%22: 5%25 \u00fc")],
            "INVALID_ARGUMENT",
            'no "n": 5% ü',
        ),
        ([("grpc-status", "99")], "UNKNOWN", ""),
        ([("grpc-message", "x")], "INTERNAL", "without one of gRPC"),
    ],
)
def test_how_a_call_ends(trailers: list[tuple[str, str]], status: str, details: str) -> None:
    """After its messages, or at once."""
    encoded = [(name, value.replace("\u00fc", "%C3%BC")) for name, value in trailers]

    async def test(server: Server) -> None:
        call, at_once = server.call(), server.call()
        peer = await server.peer()
        first, second = await peer.asked(2)
        peer.say(first, framed(b"one"))
        peer.end(first, encoded)
        peer.end(second, [(":status", "200"), ("content-type", "application/grpc"), *encoded])
        assert await call.take() == [b"one"]
        for failed in (await failure(call), await failure(at_once)):
            assert failed.status is grpc.StatusCode[status] and details in failed.details

    served(test)


def test_what_is_no_answer() -> None:
    async def test(server: Server) -> None:
        calls = [server.call() for _ in range(4)]
        peer = await server.peer()
        proxy, compressed, cut, refused = await peer.asked(4)
        peer.end(proxy, [(":status", "503")])
        peer.say(compressed, framed(b"x", compressed=1))
        peer.say(cut, framed(b"abc")[:6])
        peer.end(cut)
        peer.http2.reset_stream(refused, ErrorCodes.REFUSED_STREAM)
        peer.flush()
        found = [(await failure(call)).status.name for call in calls]
        assert found == ["UNAVAILABLE", "INTERNAL", "INTERNAL", "UNAVAILABLE"]
        await until(lambda: [event.stream_id for event in peer.of_kind(StreamReset)] == [compressed])

    served(test)


def test_whoever_cancels_is_heard() -> None:
    async def test(server: Server) -> None:
        call, late, other = server.call(), server.call(timeout_s=0.05), server.call()
        peer = await server.peer()
        streams = await peer.asked(3)
        assert (await failure(late)).status is grpc.StatusCode.DEADLINE_EXCEEDED
        waiting = asyncio.create_task(call.take())
        await asyncio.sleep(0)
        call.cancel(ValueError("not wanted"))
        with pytest.raises(ValueError, match="not wanted"):
            await waiting
        await until(lambda: len(peer.of_kind(StreamReset)) == 2)
        assert {event.stream_id for event in peer.of_kind(StreamReset)} == set(streams[:2])
        assert all(event.error_code == ErrorCodes.CANCEL for event in peer.of_kind(StreamReset))
        peer.say(streams[2], framed(b"fine"))
        peer.end(streams[2])
        assert await everything(other) == [b"fine"]

    served(test)


@pytest.mark.parametrize("size", [1, 7, 4096])
def test_frames_of_every_kind_in_pieces(size: int) -> None:
    """Padded, the last of a stream, of an answer with a length: h2 reads them between those that it never sees."""

    async def test(server: Server) -> None:
        calls = [server.call() for _ in range(3)]
        peer = await server.peer()
        streams = await peer.asked(3)
        http2 = peer.http2
        two = framed(b"one") + framed(b"two")
        head = [(":status", "200"), ("content-type", "application/grpc")]
        http2.send_headers(streams[0], head)
        http2.send_headers(streams[1], [*head, ("content-length", str(len(two)))])
        http2.send_data(streams[0], framed(b"plain"))
        http2.send_data(streams[0], framed(b"padded")[:6], pad_length=9)
        http2.send_data(streams[1], two[:4])
        http2.send_data(streams[0], framed(b"padded")[6:])
        http2.send_data(streams[0], b"")
        http2.ping(b"12345678")
        http2.send_data(streams[1], two[4:])
        http2.send_headers(streams[2], head)
        http2.send_data(streams[2], framed(b"last"), end_stream=True)
        for stream in streams[:2]:
            http2.send_headers(stream, OK, end_stream=True)
        data = http2.data_to_send()
        for at in range(0, len(data), size):
            peer.transport.write(data[at : at + size])
            await asyncio.sleep(0)
        assert await everything(calls[0]) == [b"plain", b"padded"]
        assert await everything(calls[1]) == [b"one", b"two"]
        assert await calls[2].take() == [b"last"]
        assert "without one of gRPC" in (await failure(calls[2])).details
        await until(lambda: bool(peer.of_kind(PingAckReceived)))

    served(test)


def test_the_window_of_all_calls_comes_back() -> None:
    """Of several, each below what its own call tells by itself."""

    async def test(server: Server) -> None:
        windows = []
        for number in range(10):
            call = server.call()
            peer = await server.peer()
            stream = (await peer.asked(number + 1))[number]
            windows.append(peer.http2.outbound_flow_control_window)
            peer.say(stream, framed(bytes(10_000)))
            peer.end(stream)
            assert await everything(call) == [bytes(10_000)]
        assert windows[0] - windows[-1] < 20_000

    served(test)


def test_a_frame_that_is_too_long() -> None:
    async def test(server: Server) -> None:
        call = server.call()
        peer = await server.peer()
        (stream,) = await peer.asked()
        peer.say(stream)
        peer.transport.write((20_000).to_bytes(3, "big") + b"\0\0" + stream.to_bytes(4, "big"))
        assert "broke HTTP/2" in (await failure(call)).details

    served(test)


def test_whoever_reads_slowly_stops_only_its_own_call() -> None:
    """And a message may be larger than the window."""

    async def test(server: Server) -> None:
        slow, quick, large = server.call(), server.call(), server.call()
        peer = await server.peer()
        streams = await peer.asked(3)
        message, sent = framed(b"x" * 1000), 0
        peer.say(streams[0])
        while peer.http2.local_flow_control_window(streams[0]) >= len(message):
            peer.http2.send_data(streams[0], message)
            sent += 1
        peer.flush()
        assert sent < 100
        peer.say(streams[1], framed(b"fine"))
        peer.end(streams[1])
        assert await everything(quick) == [b"fine"]
        rest = memoryview(framed(bytes(300_000)))
        peer.say(streams[2])
        while rest:
            await until(lambda: peer.http2.local_flow_control_window(streams[2]) > 0)
            size = min(len(rest), peer.http2.local_flow_control_window(streams[2]), 16384)
            peer.http2.send_data(streams[2], rest[:size])
            rest = rest[size:]
            peer.flush()
        peer.end(streams[2])
        assert await everything(large) == [bytes(300_000)]
        assert peer.http2.local_flow_control_window(streams[0]) < len(message)
        assert len(await slow.take()) == sent
        await until(lambda: peer.http2.local_flow_control_window(streams[0]) >= len(message))

    served(test)


def test_a_server_that_takes_one_call_at_a_time() -> None:
    async def test(server: Server) -> None:
        server.settings = {SettingCodes.MAX_CONCURRENT_STREAMS: 1}
        before = server.call()
        peer = await server.peer()
        await peer.asked()
        cancelled, *others = [server.call() for _ in range(3)]
        cancelled.cancel()
        for number, call in enumerate((before, *others), 1):
            (*_, stream) = await peer.asked(number)
            assert len(peer.of_kind(RequestReceived)) == number
            peer.say(stream, framed(b"fine"))
            peer.end(stream)
            assert await everything(call) == [b"fine"]

    served(test)


def test_a_server_that_goes_away() -> None:
    """It answers what it has taken; what it has not fails, and the next call finds another connection."""

    async def test(server: Server) -> None:
        taken, refused = server.call(), server.call()
        peer = await server.peer()
        first, _ = await peer.asked(2)
        peer.say(first, framed(b"one"))
        peer.transport.write(GoAwayFrame(0, last_stream_id=first).serialize())
        assert (await failure(refused)).status is grpc.StatusCode.UNAVAILABLE
        new = server.call()
        other = await server.peer(1)
        (stream,) = await other.asked()
        other.say(stream, framed(b"new"))
        other.end(stream)
        assert await everything(new) == [b"new"]
        peer.say(first, framed(b"two"))
        peer.end(first)
        assert await everything(taken) == [b"one", b"two"]
        await until(peer.transport.is_closing)

    served(test)


def test_numbers_of_streams_end() -> None:
    async def test(server: Server) -> None:
        for number in range(2):
            first = server.call()
            peer = await server.peer(number)
            (stream,) = await peer.asked()
            peer.end(stream, [(":status", "200"), *OK])
            assert await everything(first) == []
            connection = server.channel._connection
            assert connection is not None and connection.open
            connection._http2.highest_outbound_stream_id = LAST_STREAM - 1
            last = server.call()
            (_, stream) = await peer.asked(2)
            assert stream > LAST_STREAM and not connection.open
            peer.say(stream, framed(b"fine"))
            peer.end(stream)
            assert await everything(last) == [b"fine"]
            await until(peer.transport.is_closing)

    served(test)


def test_a_server_that_ends() -> None:
    """Every call is told; the next one connects again, or is told that nobody is there."""

    async def test(server: Server) -> None:
        calls = [server.call() for _ in range(3)]
        peer = await server.peer()
        (*_, last) = await peer.asked(3)
        peer.say(last, framed(b"one"))
        assert await calls[2].take() == [b"one"]
        peer.transport.abort()
        assert {(await failure(call)).status for call in calls} == {grpc.StatusCode.UNAVAILABLE}
        again = server.call()
        await (await server.peer(1)).asked()
        server.peers[1].transport.write(bytes(4) + b"\1" + bytes(4))  # headers of no stream
        assert (await failure(again)).status is grpc.StatusCode.UNAVAILABLE
        nobody = Channel("127.0.0.1:1")
        failed = await failure(nobody.call("/a/b", b"", PATIENCE_S))
        assert (
            failed.status is grpc.StatusCode.UNAVAILABLE and "cannot connect to 127.0.0.1:1" in failed.details
        )

    served(test)
