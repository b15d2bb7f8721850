"""Errors in OpenAI's envelope, with the HTTP status that fits."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import grpc
import orjson

from flightline.client.errors import (
    BY_STATUS,
    DeadlineExceeded,
    InvalidRequest,
    RequestCancelled,
    ServerUnavailable,
    from_stream_error,
)
from flightline.torch_engine.core.request import Code, RequestError

MOST_SHOWN = 400
"""Characters of a message; what a client has sent may stand in it."""
_FULL = ("queue is full", "maximum queue size")
_LATE = ("timeout expired",)
_SEQUENCE = re.compile(r"^sequence_index \d+: ")
_FIELD = re.compile(r"^(?!the )[a-z][a-z0-9_]*(\.[a-z0-9_]+|\[\d+\])*(?=[ :]|$)")


@dataclass
class ApiError(Exception):
    """What a client is told instead of an answer."""

    status: int
    message: str
    type: str = "invalid_request_error"
    param: str | None = None
    code: str | None = None
    retry_after_s: int | None = None

    def __str__(self) -> str:
        return self.message

    @property
    def inner(self) -> dict[str, str | None]:
        """The object inside the envelope."""
        return {"message": self.message, "type": self.type, "param": self.param, "code": self.code}

    def body(self) -> bytes:
        return orjson.dumps({"error": self.inner})


def invalid(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    return ApiError(400, shown(message), param=param, code=code)


def busy(message: str) -> ApiError:
    """The same request may be served in a moment."""
    return ApiError(429, message, "rate_limit_error", code="rate_limit_exceeded", retry_after_s=1)


def unavailable(message: str) -> ApiError:
    return ApiError(503, shown(message), "server_error", code="service_unavailable", retry_after_s=1)


def killed() -> ApiError:
    """What another process says for one that cannot any more."""
    return unavailable("the gateway process that was answering has ended: send the request again")


def internal(message: str) -> ApiError:
    return ApiError(500, shown(message), "server_error", code="internal_error")


def shown(message: str) -> str:
    """The first line, at a length that fits a log."""
    line = message.strip().split("\n", 1)[0]
    return line if len(line) <= MOST_SHOWN else line[: MOST_SHOWN - 1] + "…"


def renamed(error: ApiError, names: Mapping[str, str]) -> ApiError:
    """The same error about the fields that its client has sent; ``names``: what they were called on the way."""
    if not names:
        return error
    found = re.compile(rf"(?<![\w.])({'|'.join(map(re.escape, sorted(names, key=len, reverse=True)))})(?!\w)")

    def say(text: str) -> str:
        return found.sub(lambda match: names[match[0]], text)

    return replace(error, message=say(error.message), param=error.param and say(error.param))


def of_request(error: RequestError) -> ApiError:
    """What was found wrong on this side of Triton; such texts begin with the field."""
    if error.code in (Code.INVALID_ARG, Code.UNSUPPORTED):
        field = _FIELD.match(error.message)
        return invalid(error.message, field[0] if field else None)
    if error.code is Code.UNAVAILABLE:
        return unavailable(error.message)
    return internal(error.message)


def of_triton(text: str) -> ApiError:
    """The error on a stream, where Triton sends a text and no code."""
    text = _SEQUENCE.sub("", text)
    lowered = text.lower()
    if any(sign in lowered for sign in _FULL):
        return busy(shown(text))
    if any(sign in lowered for sign in _LATE):
        return ApiError(504, shown(text), "server_error", code="timeout")
    return _of_class(type(from_stream_error(text)), text)


def of_status(status: grpc.StatusCode, details: str) -> ApiError:
    """A call that has failed as a whole."""
    text = details or status.name
    if status is grpc.StatusCode.UNAVAILABLE:
        return unavailable(
            "the inference server does not answer: it is being started, or has just ended; try again"
        )
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return busy(shown(text))
    return _of_class(BY_STATUS.get(status.name, Exception), text)


def _of_class(kind: type[Exception], text: str) -> ApiError:
    if issubclass(kind, InvalidRequest):
        field = _FIELD.match(text)
        return invalid(text, field[0] if field else None)
    if issubclass(kind, DeadlineExceeded):
        return ApiError(504, "the answer was not complete in time", "server_error", code="timeout")
    if issubclass(kind, ServerUnavailable | RequestCancelled):
        return unavailable(text)
    return internal(text)
