"""gRPC's client side on asyncio: calls of one request and many answers, all on one HTTP/2 connection (hyper-h2).

A received message costs less than a third of what it costs in grpc.aio (``benchmarks/gateway.py``). The protocol:
https://github.com/grpc/grpc/blob/master/doc/PROTOCOL-HTTP2.md. Frames that carry nothing but a piece of an answer are
read here, since h2 took more than half of the gateway's time for them; all others go through h2. There are no
keepalive pings: Triton is on this machine, so the kernel tells when it has ended, and the supervisor ends one that
stands still.
"""

from __future__ import annotations

import asyncio
import ssl
from collections import deque
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import cast
from urllib.parse import unquote, urlsplit

import grpc
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.events import (
    ConnectionTerminated,
    DataReceived,
    Event,
    RemoteSettingsChanged,
    ResponseReceived,
    StreamEnded,
    StreamReset,
    TrailersReceived,
    WindowUpdated,
)
from h2.exceptions import H2Error, StreamClosedError
from h2.settings import SettingCodes
from hyperframe.frame import Frame, GoAwayFrame, WindowUpdateFrame

CONNECT_S = 5.0
CREDIT = 16 << 10
"""Bytes of a call that must have been taken before Triton is told; well below the window of 64 KiB."""
FRAME_HEADER, LONGEST_FRAME = 9, 16 << 10
"""Bytes (RFC 9113, 4.1 and 4.2; this side never asks for longer ones)."""
LAST_STREAM = 2**31 - 2**20
"""From here on the next call gets another connection: numbers of streams end at 2^31. A hundred calls a second take
four months."""
_LARGEST_WINDOW = 2**31 - 1
_CONFIGURATION = H2Configuration(
    client_side=True,
    header_encoding=None,
    validate_outbound_headers=False,
    normalize_outbound_headers=False,
    validate_inbound_headers=False,
)
_STATUS = {status.value[0]: status for status in grpc.StatusCode}
_OF_HTTP = {
    b"400": grpc.StatusCode.INTERNAL,
    b"401": grpc.StatusCode.UNAUTHENTICATED,
    b"403": grpc.StatusCode.PERMISSION_DENIED,
    b"404": grpc.StatusCode.UNIMPLEMENTED,
    b"429": grpc.StatusCode.UNAVAILABLE,
    b"502": grpc.StatusCode.UNAVAILABLE,
    b"503": grpc.StatusCode.UNAVAILABLE,
    b"504": grpc.StatusCode.UNAVAILABLE,
}
_OF_RESET: dict[int | None, grpc.StatusCode] = {
    ErrorCodes.REFUSED_STREAM: grpc.StatusCode.UNAVAILABLE,
    ErrorCodes.CANCEL: grpc.StatusCode.CANCELLED,
    ErrorCodes.ENHANCE_YOUR_CALM: grpc.StatusCode.RESOURCE_EXHAUSTED,
    ErrorCodes.INADEQUATE_SECURITY: grpc.StatusCode.PERMISSION_DENIED,
}


@dataclass
class CallFailed(Exception):
    """A call that has not ended with the status OK."""

    status: grpc.StatusCode
    details: str = ""


class Call:
    """One request and what comes back; made by ``Channel.call``, used by one task."""

    def __init__(self, path: str, request: bytes, timeout_s: float) -> None:
        loop = asyncio.get_running_loop()
        self.path = path
        self.unsent = memoryview(b"\0" + len(request).to_bytes(4, "big") + request)
        self.headers: dict[bytes, bytes] = {}
        """Of the answer, its trailers among them."""
        self.timeout_s = timeout_s
        self.ended = False
        self._loop = loop
        self._stream: _Stream | None = None
        self._messages: list[bytes] = []
        self._part = bytearray()
        """Of a message that is not whole yet."""
        self._not_told = 0
        """Bytes that were received and may be replaced by new ones as soon as the messages are taken."""
        self._failure: Exception | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._deadline = loop.call_later(timeout_s, self._is_late)

    async def take(self) -> list[bytes]:
        """The messages that have come, waiting for at least one; [] after the last.

        Raises:
            CallFailed: after the last message, the call has failed. What ``cancel`` was given is raised at once.
        """
        while not self._messages:
            if self._failure is not None:
                raise self._failure
            if self.ended:
                return []
            self._waiter = self._loop.create_future()
            await self._waiter
        messages, self._messages = self._messages, []
        self._give_credit()
        return messages

    def cancel(self, error: Exception | None = None) -> None:
        """Tells Triton that nobody waits any more; nothing of a call that has ended. ``take`` raises ``error``."""
        if error is not None:
            self._messages = []
            self._failure = error
        if self.ended:
            return
        stream = self._stream
        self.end(error or CallFailed(grpc.StatusCode.CANCELLED, "cancelled by its client"))
        if stream is not None:
            stream.connection.reset(stream.id)

    def release(self, patience_s: float) -> None:
        """Nobody reads any more; what is left of the call must end within ``patience_s``."""
        if not self.ended:
            self._loop.call_later(patience_s, self.cancel)

    # -- what the connection calls -------------------------------------------------------------------

    def begin(self, stream: _Stream) -> None:
        self._stream = stream

    @property
    def flows(self) -> bool:
        """Whether the answer has begun, and h2 need not see it: it would check a length."""
        return bool(self.headers) and b"content-length" not in self.headers

    def receive(self, data: bytes, size: int) -> None:
        """``size``: bytes that the server may replace when they are taken."""
        self._not_told += size
        part = self._part
        if part or len(data) < 5 or len(data) != 5 + int.from_bytes(data[1:5], "big"):
            part += data
            while len(part) >= 5 and len(part) >= (end := 5 + int.from_bytes(part[1:5], "big")):
                self._append(part[0], bytes(part[5:end]))
                del part[:end]
        else:  # the usual frame is one message
            self._append(data[0], data[5:])
        if self._messages:
            self._wake()
        else:
            self._give_credit()

    def end(self, failure: Exception | None) -> None:
        """Nothing will come any more."""
        if self.ended:
            return
        self.ended = True
        self._failure = self._failure or failure
        self._deadline.cancel()
        if self._stream is not None:
            self._stream.connection.credit(self._stream.id, self._not_told)
            self._stream = None
        self._wake()

    def finish(self) -> None:
        """The server has ended the call."""
        status, details = _status(self.headers)
        if status is grpc.StatusCode.OK and not self._part:
            self.end(None)
        elif status is grpc.StatusCode.OK:
            self.end(CallFailed(grpc.StatusCode.INTERNAL, "the answer ended within a message"))
        else:
            self.end(CallFailed(status, details))

    # ------------------------------------------------------------------------------------------------

    def _append(self, compressed: int, message: bytes) -> None:
        if compressed:  # nobody has offered that
            self.cancel(CallFailed(grpc.StatusCode.INTERNAL, "the answer is compressed"))
        else:
            self._messages.append(message)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _give_credit(self) -> None:
        if self._not_told >= CREDIT and self._stream is not None:
            size, self._not_told = self._not_told, 0
            self._stream.connection.credit(self._stream.id, size)

    def _is_late(self) -> None:
        self.cancel(CallFailed(grpc.StatusCode.DEADLINE_EXCEEDED, f"no end after {self.timeout_s:g} s"))


@dataclass(frozen=True, slots=True)
class _Stream:
    """Where a call is."""

    connection: _Connection
    id: int


class _Http2(H2Connection):
    """Streams that the server still serves go on after its GOAWAY (RFC 9113, 6.8); h2 would end them."""

    def _receive_goaway_frame(self, frame: GoAwayFrame) -> tuple[list[Frame], list[Event]]:
        event = ConnectionTerminated()
        event.error_code = frame.error_code
        event.last_stream_id = frame.last_stream_id
        event.additional_data = frame.additional_data or None
        return [], [event]


class _Connection(asyncio.Protocol):
    """One HTTP/2 connection and the calls on it."""

    def __init__(self, authority: str, scheme: str) -> None:
        self.open = False
        """Whether new calls may begin here."""
        self._http2 = _Http2(_CONFIGURATION)
        self._transport: asyncio.Transport
        self._calls: dict[int, Call] = {}
        self._queue: deque[Call] = deque()
        """Calls beyond the number of streams that the server takes at once."""
        self._unread = b""
        """The beginning of a frame."""
        self._sending: set[int] = set()
        """Streams whose request is larger than what the server takes now."""
        self._pseudo_headers = [
            (b":method", b"POST"),
            (b":scheme", scheme.encode()),
            (b":authority", authority.encode()),
        ]
        self._headers = [
            (b"te", b"trailers"),
            (b"content-type", b"application/grpc"),
            (b"user-agent", b"flightline-gateway"),
        ]

    # -- asyncio.Protocol ----------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._http2.initiate_connection()
        self._http2.update_settings({SettingCodes.ENABLE_PUSH: 0})
        # Only the windows of the streams bind, so that no slow reader hinders another.
        self._http2.increment_flow_control_window(_LARGEST_WINDOW - self._http2.inbound_flow_control_window)
        self.open = True
        self._flush()

    def data_received(self, data: bytes) -> None:
        data = self._unread + data if self._unread else data
        at = begin = 0
        """What is before has been read; from ``begin`` on it is for h2."""
        while len(data) - at >= FRAME_HEADER:
            length = int.from_bytes(data[at : at + 3], "big")
            end = at + FRAME_HEADER + length
            if length > LONGEST_FRAME:
                return self._lose(f"the server broke HTTP/2: a frame of {length} bytes")
            if end > len(data):
                break
            if data[at + 3] == data[at + 4] == 0:  # DATA, neither padded nor the last of its stream
                if begin < at:
                    self._note_all(data[begin:at])
                    begin = at
                call = self._calls.get(int.from_bytes(data[at + 5 : at + FRAME_HEADER], "big"))
                if call is not None and call.flows:
                    call.receive(data[at + FRAME_HEADER : end], length)
                    begin = end
            at = end
        self._unread = data[at:]
        if begin < at:
            self._note_all(data[begin:at])

    def connection_lost(self, exc: Exception | None) -> None:
        self._lose(f"the connection ended{f': {exc}' if exc else ''}")

    # -- what calls do -------------------------------------------------------------------------------

    def start(self, call: Call) -> None:
        """As soon as the server takes one more."""
        if not self.open:
            return self._fail([call], "the connection ended")
        self._queue.append(call)
        self._start_queued()
        self._flush()

    def reset(self, stream: int) -> None:
        """The call on ``stream`` is not wanted any more."""
        if self._calls.pop(stream, None) is None:
            return
        self._sending.discard(stream)
        with suppress(StreamClosedError):  # it has ended in what is being read now
            self._http2.reset_stream(stream, ErrorCodes.CANCEL)
        self._start_queued()
        self._flush()

    def credit(self, stream: int, size: int) -> None:
        """So many bytes more may come, of those that h2 has not seen."""
        if size and not self._transport.is_closing():
            streams = (0, stream) if stream in self._calls else (0,)
            self._transport.write(b"".join(WindowUpdateFrame(each, size).serialize() for each in streams))

    def close(self) -> None:
        self._lose("the channel was closed")

    # ------------------------------------------------------------------------------------------------

    def _flush(self) -> None:
        if (data := self._http2.data_to_send()) and not self._transport.is_closing():
            self._transport.write(data)

    def _start_queued(self) -> None:
        while self._queue and len(self._calls) < self._http2.remote_settings.max_concurrent_streams:
            call = self._queue.popleft()
            if call.ended:
                continue
            stream = self._http2.get_next_available_stream_id()
            self.open = self.open and stream < LAST_STREAM
            timeout = f"{min(max(1, round(call.timeout_s * 1e3)), 99_999_999)}m"
            path = (b":path", call.path.encode())
            headers = [*self._pseudo_headers, path, *self._headers, (b"grpc-timeout", timeout.encode())]
            self._http2.send_headers(stream, headers)
            self._calls[stream] = call
            call.begin(_Stream(self, stream))
            self._send(stream)

    def _send(self, stream: int) -> None:
        """As much of a request as the server takes now."""
        call = self._calls[stream]
        self._sending.discard(stream)
        with suppress(StreamClosedError):  # it has ended in what is being read now
            while call.unsent:
                room = min(self._http2.local_flow_control_window(stream), self._http2.max_outbound_frame_size)
                if room <= 0:
                    self._sending.add(stream)
                    return
                part, call.unsent = call.unsent[:room], call.unsent[room:]
                self._http2.send_data(stream, part, end_stream=not call.unsent)

    def _note_all(self, frames: bytes) -> None:
        try:
            for event in self._http2.receive_data(frames):
                self._note(event)
        except H2Error as error:
            self._lose(f"the server broke HTTP/2: {error}")
        self._flush()

    def _note(self, event: Event) -> None:
        if isinstance(event, DataReceived):
            self._http2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            if (call := self._calls.get(event.stream_id)) is not None:
                call.receive(event.data, 0)
            return
        if isinstance(event, ResponseReceived | TrailersReceived):
            if (call := self._calls.get(event.stream_id)) is not None:
                call.headers.update(event.headers)  # type: ignore[arg-type]  # bytes, as there is no encoding
        elif isinstance(event, StreamEnded):
            self._finish(event.stream_id)
        elif isinstance(event, StreamReset):
            self._was_reset(event)
        elif isinstance(event, WindowUpdated | RemoteSettingsChanged):
            for stream in list(self._sending):
                self._send(stream)
            self._start_queued()
        elif isinstance(event, ConnectionTerminated):
            self._go_away(event.last_stream_id or 0)

    def _finish(self, stream: int) -> None:
        call = self._calls.get(stream)
        if call is None:
            return
        if call.unsent:  # it was answered before it was read
            self.reset(stream)
        self._calls.pop(stream, None)
        call.finish()
        self._moved_on()

    def _was_reset(self, event: StreamReset) -> None:
        call = self._calls.pop(event.stream_id, None)
        if call is None:
            return
        self._sending.discard(event.stream_id)
        status = _OF_RESET.get(event.error_code, grpc.StatusCode.INTERNAL)
        call.end(CallFailed(status, f"the server reset the call ({event.error_code!s})"))
        self._moved_on()

    def _go_away(self, last_stream: int) -> None:
        """Calls up to ``last_stream`` are still answered; the others never were."""
        self.open = False
        refused = [stream for stream in self._calls if stream > last_stream]
        for stream in refused:
            self._sending.discard(stream)
        self._fail([self._calls.pop(stream) for stream in refused], "the server is going away")
        self._fail(self._queue, "the server is going away")
        self._queue.clear()
        self._moved_on()

    def _moved_on(self) -> None:
        """One call less: the next may begin, or the connection end."""
        self._start_queued()
        if not self.open and not self._calls:
            self._transport.close()

    def _lose(self, why: str) -> None:
        self.open = False
        calls = [*self._calls.values(), *self._queue]
        self._calls.clear()
        self._queue.clear()
        self._sending.clear()
        self._fail(calls, why)
        self._transport.close()

    @staticmethod
    def _fail(calls: Iterable[Call], why: str) -> None:
        for call in calls:
            call.end(CallFailed(grpc.StatusCode.UNAVAILABLE, why))


class Channel:
    """To one server: it connects with the first call, and again after the connection has ended."""

    def __init__(self, url: str, tls_cert: bytes | None = None, tls_name: str = "") -> None:
        """``tls_cert``: PEM, the only certificate that is trusted; it is for ``tls_name``, or the host of ``url``."""
        parts = urlsplit(f"//{url}")
        self._host, self._port = parts.hostname or "", parts.port or 443
        self._name = tls_name or self._host
        self._tls = None if tls_cert is None else _trusting(tls_cert)
        self._authority = tls_name or url
        self._connection: _Connection | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._waiting: list[Call] = []

    def call(self, path: str, request: bytes, timeout_s: float) -> Call:
        """Sends ``request`` to a method; its failures come out of ``Call.take``."""
        call = Call(path, request, timeout_s)
        if self._connection is not None and self._connection.open:
            self._connection.start(call)
            return call
        self._waiting.append(call)
        if self._connecting is None:
            self._connecting = asyncio.create_task(self._connect())
        return call

    async def close(self) -> None:
        """Ends the calls that still run."""
        if self._connecting is not None:
            self._connecting.cancel()
        for call in self._waiting:
            call.cancel()
        if self._connection is not None:
            self._connection.close()

    async def _connect(self) -> None:
        loop = asyncio.get_running_loop()
        scheme = "http" if self._tls is None else "https"
        failure = ""
        try:
            async with asyncio.timeout(CONNECT_S):
                _, self._connection = await loop.create_connection(
                    lambda: _Connection(self._authority, scheme),
                    self._host,
                    self._port,
                    ssl=self._tls,
                    server_hostname=None if self._tls is None else self._name,
                )
        except (OSError, TimeoutError) as error:
            failure = f"cannot connect to {self._host}:{self._port}: {error or 'no answer'}"
        finally:
            self._connecting = None
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            if failure or self._connection is None:
                call.end(CallFailed(grpc.StatusCode.UNAVAILABLE, failure))
            else:
                self._connection.start(call)


def _trusting(pem: bytes) -> ssl.SSLContext:
    """Of nobody but the holder of one certificate, whoever has signed it."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(cadata=pem.decode())
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols(["h2"])
    return context


def _status(headers: dict[bytes, bytes]) -> tuple[grpc.StatusCode, str]:
    """(status, details) that an answer ends with."""
    code = headers.get(b"grpc-status", b"")
    if code.isdigit():
        return _STATUS.get(int(code), grpc.StatusCode.UNKNOWN), unquote(
            headers.get(b"grpc-message", b"").decode("latin-1")
        )
    http = headers.get(b":status", b"")
    status = grpc.StatusCode.INTERNAL if http == b"200" else _OF_HTTP.get(http, grpc.StatusCode.UNKNOWN)
    return status, f"the answer ended with HTTP status {http.decode('latin-1')} and without one of gRPC"
