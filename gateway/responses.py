"""/v1/responses: a chat whose answer is told in the events of OpenAI's Responses API."""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import orjson

from flightline.gateway import job
from flightline.gateway.chat.responses import Event, ResponseStream, to_chat
from flightline.gateway.errors import ApiError, of_request, renamed
from flightline.gateway.forms import ChatChoice, Counts
from flightline.gateway.job import Job
from flightline.gateway.logprobs import TokenNames
from flightline.gateway.served import ServedModel
from flightline.gateway.upstream import Piece
from flightline.torch_engine.core.request import RequestError

NAMES = {
    "messages": "input",
    "response_format.json_schema": "text.format",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
}
"""Fields of a chat, and what they are called here."""


def prepare(body: Any, model: ServedModel, request_id: str) -> Job:
    """Raises ApiError or RequestError; called off the event loop."""
    chat = to_chat(body)
    try:
        made = job.of_chat(chat, model, request_id)
    except (ApiError, RequestError) as error:
        raise _told(error) from None
    made.names = {tensor: NAMES.get(name, name) for tensor, name in made.names.items()}
    return made


def _told(error: ApiError | RequestError) -> ApiError:
    """In the words of this endpoint; which item has become which message is not told."""
    error = of_request(error) if isinstance(error, RequestError) else error
    anywhere = replace(
        error,
        message=_MESSAGE.sub("messages", error.message),
        param=error.param and _MESSAGE.sub("messages", error.param),
    )
    return renamed(anywhere, NAMES)


_MESSAGE = re.compile(r"messages\[\d+\]")


class _Told:
    """One answer as a response."""

    def __init__(self, made: Job, model: ServedModel, body: Any) -> None:
        self.counts = Counts(made, model.vocabulary.bytes)
        self._choice = ChatChoice(made, TokenNames(model.vocabulary.bytes, made.ids_as_tokens))
        self._response = ResponseStream(body, f"resp_{uuid.uuid4().hex}", time.time(), made.model)

    def events(self, pieces: Sequence[Piece]) -> list[Event]:
        made: list[Event] = []
        for piece in pieces:
            self.counts.note(piece)
            deltas = self._choice.feed(piece)
            made += self._response.feed(deltas) if deltas else []
            if self._choice.finish_reason is not None:
                made += self._response.finish(self._choice.finish_reason, self.counts.usage())
        return made


class EventStream(_Told):
    """Server-sent events with names; they need no [DONE]."""

    def open(self) -> bytes:
        return _bytes(self._response.start())

    def feed(self, pieces: Sequence[Piece]) -> bytes:
        return _bytes(self.events(pieces))

    def close(self) -> bytes:
        return b""

    def fail(self, error: ApiError) -> bytes:
        return _bytes(self._response.fail(error.inner))


class WholeResponse(_Told):
    """The response object."""

    def __init__(self, made: Job, model: ServedModel, body: Any) -> None:
        super().__init__(made, model, body)
        self._response.start()

    def feed(self, pieces: Sequence[Piece]) -> None:
        self.events(pieces)

    def body(self) -> bytes:
        return orjson.dumps(self._response.response())


def last_event(error: ApiError) -> bytes:
    """Of a stream, by somebody who does not know where it is: the error, without a place among the others."""
    fields = {"code": error.code, "message": error.message, "param": error.param}
    return _bytes([("error", {"type": "error", **fields, "sequence_number": 0})])


def _bytes(events: Sequence[Event]) -> bytes:
    return b"".join(
        b"event: " + name.encode() + b"\ndata: " + orjson.dumps(value) + b"\n\n" for name, value in events
    )
