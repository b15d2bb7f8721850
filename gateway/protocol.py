"""uvicorn's HTTP/1.1 with limits that it does not have: bytes and seconds of a request's head."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from flightline.gateway.errors import ApiError
from flightline.gateway.last_words import CONNECTION


class LimitedProtocol(HttpToolsProtocol):
    """A connection. Whoever sends no whole head in time is dropped without an answer; a large one gets 431."""

    head_timeout_s = 10.0
    max_header_bytes = 32 << 10
    _timer: asyncio.TimerHandle | None = None
    _head_bytes = 0
    _refused = False

    @classmethod
    def limited(cls, head_timeout_s: float, max_header_bytes: int) -> type[LimitedProtocol]:
        limits = {"head_timeout_s": head_timeout_s, "max_header_bytes": max_header_bytes}
        return type("Limited", (cls,), limits)

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        secret = transport.get_extra_info("ssl_object") is not None
        self._connection = None if secret else transport.get_extra_info("socket")
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._head_is_whole()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        self._head_is_whole()
        self._head_bytes = 0
        self._timer = self.loop.call_later(self.head_timeout_s, self._drop)

    def _head_is_whole(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _drop(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()

    def data_received(self, data: bytes) -> None:
        if self._refused:
            return
        super().data_received(data)
        if self._timer is None:
            return
        # A head that is not whole yet; one that is was measured header by header.
        self._head_bytes += len(data)
        if self._head_bytes > self.max_header_bytes:
            self._refuse()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self.scope["extensions"] = {CONNECTION: {"socket": self._connection}}
        self._await_head()
        self._size = 0

    def on_url(self, url: bytes) -> None:
        self._size += len(url)
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        self._size += len(name) + len(value) + 4
        if self._size <= self.max_header_bytes:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_is_whole()
        if self._size > self.max_header_bytes:
            self._refuse()
        elif not self._refused:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if not self._refused:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if not self._refused:
            super().on_message_complete()

    def _refuse(self) -> None:
        self._close_with(
            "431 Request Header Fields Too Large",
            ApiError(
                431,
                f"the head has more than {self.max_header_bytes} bytes: shorten it",
                code="headers_too_large",
            ),
        )

    def send_400_response(self, msg: str) -> None:
        self._close_with("400 Bad Request", ApiError(400, "this is not HTTP/1.1", code="bad_request"))

    def _close_with(self, status: str, error: ApiError) -> None:
        """Answers what never became a request of the application."""
        if self._refused:
            return
        self._refused = True
        self._head_is_whole()
        cycle = self.cycle
        if (
            cycle is None or cycle.response_complete or not cycle.response_started
        ):  # else it would stand in an answer
            body = error.body()
            head = f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\n"
            self.transport.write(head.encode() + f"content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()
