"""The way to Triton's own HTTP endpoints: a few of them, with bodies that it survives.

Triton 2.51 has no limit on bodies and dies of some (``docs/SECURITY.md``). What passes here is whole, of limited size,
JSON, and not nested deeper than 1,000; it goes to Triton in one piece with a length.
"""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import quote

import aiohttp
import orjson

from flightline.gateway.errors import ApiError, invalid
from flightline.gateway.exchange import Exchange, Headers, parse_json

MODEL = r"/v2/models/[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}(/versions/[0-9]{1,9})?"
ANSWERS = re.compile(f"{MODEL}/(generate|generate_stream|infer)")
FACTS = re.compile(rf"/v2/?|/v2/health/(live|ready)|{MODEL}(/config|/ready|/stats)?")
CONNECT_S = 5.0
WIDE = {
    *(
        "seed",
        "sampling_param_seed",
        "lora_task_id",
        "lora_id",
        "prompt_table_extra_id",
        "prompt_table_extra_ids",
    ),
    *("mrope_position_deltas", "image_sizes_input"),
}
"""Tensors of 64 bits."""


class Passage:
    """Of one process; made inside the running event loop."""

    def __init__(self, url: str, max_body_bytes: int, body_timeout_s: float) -> None:
        """``url``: of Triton's HTTP port."""
        self._url = url
        self._most = max_body_bytes
        self._body_timeout_s = body_timeout_s
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S),
            auto_decompress=False,
        )

    async def close(self) -> None:
        await self._session.close()

    def method(self, path: str) -> str:
        """What an endpoint is asked with. Raises ApiError: 403, nobody may reach it from here."""
        if ANSWERS.fullmatch(path):
            return "POST"
        if FACTS.fullmatch(path):
            return "GET"
        raise ApiError(403, f"{path[:200]} is closed", code="closed")

    async def serve(self, exchange: Exchange) -> None:
        """Raises ApiError as long as nothing was answered."""
        method = self.method(exchange.path)
        if exchange.method not in (method, "HEAD" if method == "GET" else method):
            raise ApiError(405, f"{exchange.path[:200]} takes {method}", code="method_not_allowed")
        if b"inference-header-content-length" in exchange.headers:
            raise ApiError(
                415, "binary tensors do not pass: send JSON, or use gRPC", code="unsupported_media_type"
            )
        body = await exchange.body(self._most, self._body_timeout_s)
        if method == "POST":
            refuse_what_wraps(parse_json(body))
        await exchange.unless_gone(self._pass_on(exchange, method, body))

    async def _pass_on(self, exchange: Exchange, method: str, body: bytes) -> None:
        headers = {"Content-Type": "application/json", "triton-request-id": exchange.id}
        url = self._url + quote(exchange.path)
        try:
            async with self._session.request(method, url, data=body or None, headers=headers) as answer:
                if answer.content_type != "text/event-stream":
                    exchange.let_go()
                await exchange.start(answer.status, _headers(answer))
                async for part in answer.content.iter_any():
                    await exchange.write(part)
                await exchange.write(b"", more=False)
        except aiohttp.ClientError:
            if exchange.status:
                raise
            raise ApiError(503, "the inference server does not answer: try again", retry_after_s=1) from None


def refuse_what_wraps(body: Any) -> None:
    """Raises ApiError: 400, a number that Triton 2.51 would cut to the 32 bits of its tensor without a word."""
    for name, value in body.items() if isinstance(body, dict) else ():
        if name in WIDE:
            continue
        for number in value if isinstance(value, list) else (value,):
            if isinstance(number, int) and not -(2**31) <= number < 2**31:
                raise invalid(f"{name[:100]} is {number}: it must be a 32-bit integer", name[:100])


def _headers(answer: aiohttp.ClientResponse) -> Headers:
    kind = answer.headers.get("Content-Type", "application/json")
    length = answer.headers.get("Content-Length")
    return [(b"content-type", kind.encode()), *([(b"content-length", length.encode())] if length else [])]


def envelope(error: ApiError) -> bytes:
    """An error as Triton's HTTP endpoints tell it."""
    return orjson.dumps({"error": error.message})
