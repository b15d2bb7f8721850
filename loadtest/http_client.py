"""HTTP/1.1 for streamed answers, as lean as a load generator must be: time stamps and bytes now, everything else later.

Each piece of a body is kept as it came with the time at which it came. A coroutine is woken once an answer, not once a
token; the parser is httptools, which is C.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from httptools import HttpParserError, HttpResponseParser

Pieces = list[tuple[int, bytes]]
"""``time.monotonic_ns()`` of arrival, and a part of the body."""


@dataclass
class HttpAnswer:
    """What has come so far of one answer."""

    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    """Names in lower case."""
    pieces: Pieces = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(piece for _, piece in self.pieces)


class HttpFailure(Exception):
    """The connection failed, or what came was no HTTP; one line that says how."""


class HttpClient:
    """Connections to one server, kept open between requests; as many as there are requests at a time.

    Args:
        url: ``http://HOST[:PORT]/PATH`` or ``https://...``; paths of requests are appended to its own.
        headers: Sent with every request.
    """

    def __init__(self, url: str, headers: dict[str, str] | None = None) -> None:
        parts = urlsplit(url)
        self._host = parts.hostname or ""
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._path = parts.path.rstrip("/")
        named = {"Host": parts.netloc.rpartition("@")[2], **(headers or {})}
        self._head = "".join(f"{name}: {value}\r\n" for name, value in named.items())
        self._idle: list[_Connection] = []

    def request(self, method: str, path: str, body: bytes = b"", request_id: str = "") -> bytes:
        """The bytes of a request, made before its time has come."""
        more = f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n" if body else ""
        more += f"X-Request-Id: {request_id}\r\n" if request_id else ""
        return f"{method} {self._path}{path} HTTP/1.1\r\n{self._head}{more}\r\n".encode() + body

    async def send(self, request: bytes, answer: HttpAnswer) -> None:
        """Fills ``answer`` as it comes and returns when it is complete; a cancelled call closes its connection.

        Raises:
            HttpFailure: no connection, one that ended too early, or no HTTP.
        """
        while self._idle:
            connection = self._idle.pop()
            try:
                await self._exchange(connection, request, answer)
                return
            except _Stale:  # the server had closed it before it saw the request
                continue
        loop = asyncio.get_running_loop()
        try:
            _, connection = await loop.create_connection(_Connection, self._host, self._port, ssl=self._tls)
        except OSError as error:
            raise HttpFailure(f"no server at {self._host}:{self._port}: {error.strerror or error}") from None
        try:
            await self._exchange(connection, request, answer)
        except _Stale as error:
            raise HttpFailure(str(error)) from None

    def close(self) -> None:
        for connection in self._idle:
            connection.abort()
        self._idle.clear()

    async def _exchange(self, connection: _Connection, request: bytes, answer: HttpAnswer) -> None:
        try:
            if await connection.exchange(request, answer):
                self._idle.append(connection)
            else:
                connection.abort()
        except BaseException:
            connection.abort()
            raise


class _Stale(HttpFailure):
    """The connection ended before the first byte of an answer."""


class _Connection(asyncio.Protocol):
    """One request at a time."""

    def __init__(self) -> None:
        self._transport: asyncio.Transport | None = None
        self._parser: HttpResponseParser | None = None
        self._answer = HttpAnswer()
        self._done: asyncio.Future[bool] | None = None
        self._now = 0
        self._started = False

    async def exchange(self, request: bytes, answer: HttpAnswer) -> bool:
        """True if the connection may be used again."""
        if self._transport is None or self._transport.is_closing():
            raise _Stale("the connection was closed")
        self._parser, self._answer, self._started = HttpResponseParser(self), answer, False
        self._done = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._done

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._now, self._started = time.monotonic_ns(), True
        if self._parser is None or self._done is None or self._done.done():
            self.abort()  # something that nobody asked for
            return
        try:
            self._parser.feed_data(data)
        except HttpParserError as error:
            self._end(HttpFailure(f"the answer is not HTTP: {error}"))

    def connection_lost(self, error: Exception | None) -> None:
        if not self._started:
            self._end(_Stale(f"the connection was closed without an answer{f' ({error})' if error else ''}"))
        elif self._answer.headers.keys() & {"content-length", "transfer-encoding"} or error is not None:
            self._end(HttpFailure("the connection was closed before the answer was complete"))
        elif self._done is not None and not self._done.done():
            self._done.set_result(False)  # a body whose end is the connection's

    # What the parser calls.

    def on_header(self, name: bytes, value: bytes) -> None:
        self._answer.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_headers_complete(self) -> None:
        assert self._parser is not None
        self._answer.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self._answer.pieces.append((self._now, body))

    def on_message_complete(self) -> None:
        assert self._parser is not None
        if self._answer.status >= 200 and self._done is not None and not self._done.done():
            self._done.set_result(self._parser.should_keep_alive())

    def _end(self, failure: HttpFailure) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(failure)
