"""One HTTP request and its answer over ASGI, with limits; https://asgi.readthedocs.io/en/latest/specs/www.html."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from http import HTTPStatus
from typing import Any, TypeVar

import orjson

from flightline.gateway.errors import ApiError, invalid
from flightline.gateway.last_words import CONNECTION, Channel, Held

T = TypeVar("T")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

JSON: Headers = [(b"content-type", b"application/json")]
SSE: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
"""What uvicorn sends when the body of a request with ``expect: 100-continue`` is read."""
_MOST_DISCARDED_BYTES = 1 << 28
_AT_ONCE_BYTES = 1 << 14
"""An answer of so many is in the kernel's hands as soon as it is written."""
_GOOD_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")


class ClientGone(Exception):
    """Nobody is left to answer."""


def new_id() -> str:
    return f"req_{uuid.uuid4().hex}"


def good_id(value: str) -> bool:
    """Whether a client's own request id may stand in logs and headers."""
    return _GOOD_ID.fullmatch(value) is not None


class Exchange:
    """Reads the body within its limits, writes the answer, and knows when the client has gone."""

    def __init__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        self.method: str = scope["method"]
        self.path: str = scope["path"]
        self.query: bytes = scope["query_string"]
        self.headers: dict[bytes, bytes] = dict(scope["headers"])
        self.client = (scope.get("client") or ("-",))[0]
        given = self.headers.get(b"x-request-id", b"").decode("latin-1")
        self.id = given if good_id(given) else new_id()
        self.status = 0
        """Sent; 0 = none yet."""
        self.began = time.monotonic()
        self.first_byte_at = 0.0
        self.writing_since = 0.0
        """When the write that still waits for the client began; 0 = none waits."""
        self.extra: Headers = []
        """Headers of every answer."""
        self.note: dict[str, Any] = {}
        """Facts for the log."""
        self._connection = (scope.get("extensions") or {}).get(CONNECTION, {}).get("socket")
        self._held: Held | None = None
        self._receive = receive
        self._send = send

    # -- the request ---------------------------------------------------------------------------------

    async def body(self, most: int, timeout_s: float) -> bytes:
        """The whole body, however it is cut into pieces.

        Raises:
            ApiError: 408, 413.
            ClientGone: it has gone before the end.
        """
        if self.headers.get(b"content-encoding", b"identity").lower() != b"identity":
            text = "content-encoding is not supported: send the body as it is"
            raise ApiError(415, text, code="unsupported_media_type")
        declared = self.headers.get(b"content-length", b"")
        parts: list[bytes] = []
        size, too_large = 0, declared.isdigit() and int(declared) > most
        try:
            async with asyncio.timeout(timeout_s):
                while size <= _MOST_DISCARDED_BYTES:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    part = message.get("body", b"")
                    size += len(part)
                    too_large = too_large or size > most
                    if too_large:
                        parts.clear()  # the rest is read all the same: who still writes does not see an answer
                    else:
                        parts.append(part)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            if not too_large:
                self.extra.append((b"connection", b"close"))
                text = f"the body was not complete after {timeout_s:g} s: send it faster"
                raise ApiError(408, text, code="request_timeout") from None
        if too_large:
            self.extra.append((b"connection", b"close"))
            text = f"the body has more than {most} bytes: shorten the request"
            raise ApiError(413, text, code="request_too_large")
        return b"".join(parts)

    async def json(self, most: int, timeout_s: float) -> Any:
        """The body as JSON. Raises as ``body``, and ApiError: 400, it is none."""
        kind = self.headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":
            shown = kind.decode("latin-1")[:100] or "missing"
            raise invalid(f"content-type is {shown}: it must be application/json")
        return parse_json(await self.body(most, timeout_s))

    async def unless_gone(self, work: Coroutine[Any, Any, T]) -> T:
        """What ``work`` returns; it is cancelled when the client goes. Only after the body has been read.

        Raises:
            ClientGone: it has.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(self._receive())
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                raise ClientGone
            return await task
        finally:
            gone.cancel()
            if not task.done():
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    # -- the answer ----------------------------------------------------------------------------------

    async def start(self, status: int, headers: Headers) -> None:
        self.status = status
        await self._send(
            {"type": "http.response.start", "status": status, "headers": [*headers, *self._own()]}
        )

    async def write(self, data: bytes, more: bool = True) -> None:
        """Waits while the client does not take what it was sent before."""
        self.writing_since = time.monotonic()
        if not self.first_byte_at:
            self.first_byte_at = self.writing_since
        await self._send({"type": "http.response.body", "body": data, "more_body": more})
        self.writing_since = 0.0

    async def respond(self, body: bytes, status: int = 200, headers: Headers = JSON) -> None:
        if len(body) > _AT_ONCE_BYTES:
            self.let_go()
        length = (b"content-length", str(len(body)).encode())
        await self.start(status, [*headers, length])
        await self.write(body, more=False)

    # -- if this process is killed -------------------------------------------------------------------

    def hold(self, channel: Channel, error: ApiError, body: bytes, event: bytes) -> None:
        """Until ``let_go``: the client is told ``error`` all the same, as a response with ``body`` or, once that has
        begun, by ``event`` as a stream's last chunk (RFC 9112, 7.1)."""
        headers = [*_of_error(error), (b"content-length", str(len(body)).encode()), *self._own()]
        head = b"".join(b"%s: %s\r\n" % header for header in headers)
        status = f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\nconnection: close\r\n"
        chunk = b"%x\r\n%s\r\n0\r\n\r\n" % (len(event), event)
        waits = self.headers.get(b"expect", b"").lower() == b"100-continue"
        ahead = len(CONTINUE) if waits else 0
        self._held = channel.hold(self._connection, ahead, status.encode() + head + b"\r\n" + body, chunk)

    def let_go(self) -> None:
        """The answer is written, or nobody can end it any more but by closing."""
        if self._held is not None:
            self._held.release()

    async def fail(self, error: ApiError, body: bytes | None = None) -> None:
        """The envelope, or another ``body``, if no status was sent yet."""
        if self.status:
            return
        await self.respond(error.body() if body is None else body, error.status, _of_error(error))

    def _own(self) -> Headers:
        return [(b"x-request-id", self.id.encode()), *self.extra]


def _of_error(error: ApiError) -> Headers:
    headers = list(JSON)
    if error.retry_after_s is not None:
        headers.append((b"retry-after", str(error.retry_after_s).encode()))
    if error.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    return headers


def parse_json(data: bytes) -> Any:
    """Raises ApiError: 400, not JSON, or nested more than 1,000 deep."""
    try:
        return orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise invalid(f"the body is not valid JSON: {error}") from None
