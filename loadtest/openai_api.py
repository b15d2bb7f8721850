"""Any OpenAI server as a contestant: ``/completions`` or ``/chat/completions``, streamed as server-sent events.

Tokens are counted twice: by the server, whose ``usage`` ends the stream, and by the client: the token ids that come
with the text, where the server sends them (``return_token_ids``, vLLM's), or else the pieces in which the text came, of
which there cannot be more than tokens. A record in which the two disagree has a problem.

Protocol: OpenAI's API reference, Chat Completions and Completions; server-sent events as in the HTML standard, 9.2.
"""

from __future__ import annotations

import asyncio
import json
import os
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from flightline.loadtest.http_client import HttpAnswer, HttpClient, HttpFailure, Pieces
from flightline.loadtest.records import RequestRecord
from flightline.loadtest.transport import Load

OPENAI = "openai"
"""Locust's name of such an endpoint; reports have the model's."""
COMPLETIONS, CHAT = "completions", "chat"
APIS = (COMPLETIONS, CHAT)
PATHS = {COMPLETIONS: "/completions", CHAT: "/chat/completions"}
KEY_VARIABLE = "OPENAI_API_KEY"


def is_openai(url: str) -> bool:
    """Triton's gRPC addresses have no scheme."""
    return url.startswith(("http://", "https://"))


@dataclass(frozen=True)
class OpenAiSettings:
    """What to say to the server besides the prompt."""

    model: str
    api: str = COMPLETIONS
    token_ids: bool = False
    """Ask for the ids of the tokens: an extension, which some servers refuse and others ignore."""


@dataclass(frozen=True)
class OpenAiRequest:
    id: str
    data: bytes


class OpenAiTransport:
    """Requests of one event loop to one server.

    Args:
        url: ``http://HOST:PORT/v1``. The environment's ``OPENAI_API_KEY`` is sent along if there is one.
    """

    def __init__(self, url: str, settings: OpenAiSettings) -> None:
        self._url = url
        self._settings = settings
        key = os.environ.get(KEY_VARIABLE)
        self._client = HttpClient(url, {"Authorization": f"Bearer {key}"} if key else None)

    async def open(self) -> None:
        """Connections are made when they are needed."""

    async def close(self) -> None:
        self._client.close()

    def prepare(self, load: Load) -> OpenAiRequest:
        """The request's bytes, with a new id."""
        settings, length = self._settings, load.output_tokens
        body: dict[str, Any] = {
            "model": settings.model,
            "max_tokens": length,
            "temperature": 0,
            "stream": True,
        }
        body["stream_options"] = {"include_usage": True}
        if settings.api == CHAT:
            body["messages"] = [{"role": "user", "content": load.prompt}]
        else:
            body["prompt"] = load.prompt
        if load.exact:  # extensions that vLLM, SGLang, TensorRT-LLM and others share
            body |= {"min_tokens": length, "ignore_eos": True}
        if settings.token_ids:
            body["return_token_ids"] = True
        id_ = uuid.uuid4().hex
        return OpenAiRequest(
            id_, self._client.request("POST", PATHS[settings.api], json.dumps(body).encode(), id_)
        )

    async def exchange(self, request: OpenAiRequest, record: RequestRecord, timeout_s: float | None) -> str:
        """As :class:`~flightline.loadtest.transport.Transport` says."""
        answer = HttpAnswer()
        try:
            async with asyncio.timeout(timeout_s):
                await self._client.send(request.data, answer)
        except TimeoutError:
            record.error = f"no complete answer within {timeout_s:g} s"
        except HttpFailure as failure:
            record.error = f"{failure} ({self._url})"
        except asyncio.CancelledError:
            record.cancelled = True
        return fill(record, answer)

    async def models(self) -> list[str]:
        """Names that the server answers to.

        Raises:
            HttpFailure: no connection, or no such list; one line.
        """
        answer = HttpAnswer()
        async with asyncio.timeout(10.0):
            await self._client.send(self._client.request("GET", "/models"), answer)
        try:
            if answer.status == 200:
                return [str(model["id"]) for model in json.loads(answer.body)["data"]]
        except (ValueError, KeyError, TypeError):
            pass
        raise HttpFailure(f"{self._url}/models has no list of models: {_refusal(answer)}")


@dataclass
class _Stream:
    """What the events of a stream said."""

    error: str | None = None
    ended_ns: int | None = None
    """When ``[DONE]``, which some servers leave out, or a reason for the end came first."""
    usage: dict | None = None


def fill(record: RequestRecord, answer: HttpAnswer) -> str:
    """Reads the events, after the last one has come, into the record; returns the text."""
    if answer.status and answer.status != 200:
        record.error = record.error or _refusal(answer)
        return ""
    if answer.status and not answer.headers.get("content-type", "").startswith("text/event-stream"):
        record.error = (
            record.error or f"the answer is no stream: {answer.headers.get('content-type', 'no type')}"
        )
        return ""
    stream, words, ids = _Stream(), [], []
    for arrived_ns, data in events(answer.pieces):
        word, tokens = _read(arrived_ns, data, stream)
        if word or tokens:
            if word and record.first_text_chunk is None:
                record.first_text_chunk = len(record.chunk_ns)
            record.chunk_ns.append(arrived_ns)
            words.append(word)
            ids.append(tokens)
    if record.error is None and not record.cancelled:
        record.error = stream.error or _missing(stream)
        if record.error is None and not words:  # the model had nothing to say
            record.chunk_ns, words, ids = [stream.ended_ns or 0], [""], [0]
    _count(record, stream.usage or {}, words, ids)
    return "" if record.error else "".join(words)


def events(pieces: Pieces) -> Iterator[tuple[int, bytes]]:
    """(time of arrival, data) of each event that is complete; comments and other fields are left out."""
    buffer = b""
    for arrived_ns, piece in pieces:
        *lines, buffer = (buffer + piece).split(b"\n")
        for line in lines:
            # One line is one event's data, with every server there is; the blank line after it says no more.
            if line.startswith(b"data:"):
                yield arrived_ns, line[5:].strip()


def _read(arrived_ns: int, data: bytes, stream: _Stream) -> tuple[str, int]:
    """The text and the number of token ids of an event."""
    if data == b"[DONE]":
        stream.ended_ns = stream.ended_ns or arrived_ns
        return "", 0
    try:
        event = json.loads(data)
        if event.get("error"):
            error = event["error"]
            stream.error = stream.error or str(
                error.get("message", error) if isinstance(error, dict) else error
            )
            return "", 0
        if isinstance(event.get("usage"), dict):
            stream.usage = event["usage"]
        if not event.get("choices"):
            return "", 0
        choice = event["choices"][0]
        if choice.get("finish_reason"):
            stream.ended_ns = stream.ended_ns or arrived_ns
        said = choice.get("delta") or choice
        words = (said.get(name) for name in ("reasoning", "reasoning_content", "content", "text"))
        return "".join(filter(None, words)), len(choice.get("token_ids") or ())
    except (ValueError, AttributeError, TypeError, LookupError):
        stream.error = stream.error or f"an event is not what OpenAI's API says: {data[:80]!r}"
        return "", 0


def _missing(stream: _Stream) -> str | None:
    if stream.ended_ns is None:
        return "the stream ended without [DONE] or a finish_reason"
    if stream.usage is None:
        return "the stream has no usage: the server must honour stream_options.include_usage"
    return None


def _count(record: RequestRecord, usage: dict, words: list[str], ids: list[int]) -> None:
    """The tokens up to each piece: by their ids, or else as far into the usage as into the text."""
    record.num_input_tokens = _whole(usage, "prompt_tokens")
    record.num_output_tokens = _whole(usage, "completion_tokens")
    record.cached_tokens = _whole(usage.get("prompt_tokens_details"), "cached_tokens")
    record.text_pieces = sum(map(bool, words))
    record.counted_tokens = sum(ids) if any(ids) else None
    total, length = record.num_output_tokens, sum(map(len, words))
    one_each = not total or record.text_pieces == total
    said, counted = 0, 0
    for word, tokens in zip(words, ids, strict=True):
        said, counted = said + len(word), counted + tokens
        if record.counted_tokens is not None:
            record.chunk_tokens.append(counted)
        elif one_each:
            record.chunk_tokens.append(len(record.chunk_tokens) + 1)
        else:
            record.chunk_tokens.append(round((total or 0) * said / length) if length else total or 0)


def _whole(values: object, name: str) -> int | None:
    value = values.get(name) if isinstance(values, dict) else None
    return value if type(value) is int else None


def _refusal(answer: HttpAnswer) -> str:
    """The server's own words, in one line."""
    try:
        error = json.loads(answer.body)["error"]
        words = error["message"] if isinstance(error, dict) else str(error)
    except (ValueError, KeyError, TypeError):
        words = answer.body[:200].decode(errors="replace")
    remedy = f" ({KEY_VARIABLE} has the key)" if answer.status in (401, 403) else ""
    return f"HTTP {answer.status}: {' '.join(str(words).split())}{remedy}"
