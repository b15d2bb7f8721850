"""A null server that sends the tokens of one step to all requests in one write, like in-flight batching does.

``python -m flightline.loadtest.burst_server --step-ms 20``

What a client can take in depends on how tokens arrive: a hundred in one packet cost a fraction of a hundred packets.
gRPC's own Python server sends every message by itself and needs more CPU for it than the client does, so a ceiling
found with it would be the server's. This one speaks as much HTTP/2 (RFC 9113) as one streaming method needs, and
answers whatever is called as ``ModelStreamInfer``.
"""

from __future__ import annotations

import argparse
import asyncio
import struct
import time
from collections import deque

from tritonclient.grpc import service_pb2

from flightline.loadtest.null_server import ResponseWriter, Served, read_inputs

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, PING, WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
END_STREAM, ACK, END_HEADERS = 1, 1, 4
INITIAL_WINDOW_SIZE = 4
DEFAULT_WINDOW = 65_535
# HPACK (RFC 7541): ":status: 200" is entry 8 of the static table, "content-type" 31; trailers are spelled out.
RESPONSE_HEADERS = b"\x88\x0f\x10\x10application/grpc"
TRAILERS = b"\x00\x0bgrpc-status\x010"


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


class Stream:
    """One request."""

    def __init__(self, number: int, window: int) -> None:
        self.number = number
        self.window = window
        self.body = b""
        self.count = 0
        self.writer: ResponseWriter | None = None
        self.served: Served | None = None
        self.first_at = 0.0
        """When its first token is due (event loop's clock)."""

    def begin(self, now: float, ttft_s: float) -> None:
        request = service_pb2.ModelInferRequest.FromString(self.body[5:])  # past gRPC's own prefix
        self.served = Served(request.id, request.model_name, read_inputs(request), time.time_ns())
        self.served.first_scheduled_ns = self.served.arrival_ns
        self.writer = ResponseWriter(request, self.served)
        self.first_at = now + ttft_s

    def token(self) -> tuple[bytes, bool]:
        """The next message with its prefix, and whether it is the last."""
        assert self.served is not None and self.writer is not None
        self.count += 1
        self.served.note_token()
        final = self.count >= self.served.inputs["max_tokens"]
        message = self.writer.write(" word", self.count, final=final)
        return b"\0" + struct.pack(">I", len(message)) + message, final


class Connection(asyncio.Protocol):
    """One client's connection; ``peers`` holds all of them."""

    def __init__(self, peers: set[Connection], ttft_s: float) -> None:
        self._peers = peers
        self._ttft_s = ttft_s
        self._buffer = b""
        self._greeted = False
        self._streams: dict[int, Stream] = {}
        self._window = DEFAULT_WINDOW
        self._stream_window = DEFAULT_WINDOW
        self._waiting: deque[tuple[Stream, bytes, bool]] = deque()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._peers.add(self)
        transport.write(frame(SETTINGS, 0, 0, b""))

    def connection_lost(self, error: Exception | None) -> None:
        self._peers.discard(self)

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._greeted:
            if len(self._buffer) < len(PREFACE):
                return
            self._greeted, self._buffer = True, self._buffer[len(PREFACE) :]
        while len(self._buffer) >= 9:
            length = int.from_bytes(self._buffer[:3], "big")
            if len(self._buffer) < 9 + length:
                return
            kind, flags, number = struct.unpack_from(">BBI", self._buffer, 3)
            payload, self._buffer = self._buffer[9 : 9 + length], self._buffer[9 + length :]
            self._on_frame(kind, flags, number & 0x7FFFFFFF, payload)

    def _on_frame(self, kind: int, flags: int, number: int, payload: bytes) -> None:
        if kind == HEADERS:
            self._streams[number] = Stream(number, self._stream_window)
        elif kind == DATA:
            self._on_data(flags, number, payload)
        elif kind == RST_STREAM:
            self._streams.pop(number, None)
        elif kind == SETTINGS and not flags & ACK:
            for at in range(0, len(payload), 6):
                name, value = struct.unpack_from(">HI", payload, at)
                if name == INITIAL_WINDOW_SIZE:
                    for stream in self._streams.values():
                        stream.window += value - self._stream_window
                    self._stream_window = value
            self._transport.write(frame(SETTINGS, ACK, 0, b""))
        elif kind == PING and not flags & ACK:
            self._transport.write(frame(PING, ACK, 0, payload))
        elif kind == WINDOW_UPDATE:
            more = int.from_bytes(payload, "big") & 0x7FFFFFFF
            if number == 0:
                self._window += more
            elif number in self._streams:
                self._streams[number].window += more
            self._flush()

    def _on_data(self, flags: int, number: int, payload: bytes) -> None:
        if payload:
            self._transport.write(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", len(payload))))
        stream = self._streams.get(number)
        if stream is None:
            return
        stream.body += payload
        if flags & END_STREAM:
            stream.begin(asyncio.get_running_loop().time(), self._ttft_s)
            self._transport.write(frame(HEADERS, END_HEADERS, number, RESPONSE_HEADERS))

    def step(self, now: float) -> None:
        """One token to every request whose first one is due."""
        for stream in self._streams.values():
            if stream.writer is not None and stream.first_at <= now:
                message, final = stream.token()
                if final:
                    stream.writer = None
                self._waiting.append((stream, message, final))
        self._flush()

    def _flush(self) -> None:
        """Writes, at once, what the client's windows allow."""
        parts = []
        while self._waiting:
            stream, message, final = self._waiting[0]
            if stream.number in self._streams:
                if min(self._window, stream.window) < len(message):
                    break
                self._window -= len(message)
                stream.window -= len(message)
                parts.append(frame(DATA, 0, stream.number, message))
                if final:
                    parts.append(frame(HEADERS, END_HEADERS | END_STREAM, stream.number, TRAILERS))
                    del self._streams[stream.number]
            self._waiting.popleft()
        if parts:
            self._transport.write(b"".join(parts))


async def serve(port: int, ttft_s: float, step_s: float) -> None:
    """Until it is cancelled; prints its address when it is ready."""
    peers: set[Connection] = set()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Connection(peers, ttft_s), "127.0.0.1", port)
    print(f"burst server ready: 127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    due = loop.time()
    while True:
        due = max(due + step_s, loop.time())
        await asyncio.sleep(due - loop.time())
        for connection in list(peers):
            connection.step(due)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m flightline.loadtest.burst_server")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--ttft-ms", type=float, default=100.0)
    parser.add_argument("--step-ms", type=float, default=20.0)
    args = parser.parse_args()
    try:
        asyncio.run(serve(args.port, args.ttft_ms / 1e3, args.step_ms / 1e3))
    except OSError as error:
        raise SystemExit(f"error: {error}") from None
    except KeyboardInterrupt:
        pass


if __name__ == "__main__":
    main()
