"""Requests to Triton's ``text_generation``, and their answers as they come."""

from __future__ import annotations

import asyncio
import struct
from array import array
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from tritonclient.grpc import service_pb2

from flightline.client.wire import STREAM_INFER, TEXT_GENERATION
from flightline.gateway import errors
from flightline.gateway.channel import Call, CallFailed, Channel
from flightline.gateway.errors import ApiError
from flightline.gateway.settings import Upstream

MOST_WAITING = 64
"""Messages of one request that may wait for its client; then Triton is not read any further."""
END_S = 5.0
"""So soon after the last piece of an answer its call must end."""
PACK = {"INT32": "i", "FP32": "f", "UINT64": "Q", "BOOL": "?"}


def infer_request(
    request_id: str, tensors: Sequence[tuple[str, str, Sequence[Any]]], model: str = TEXT_GENERATION
) -> bytes:
    """A ModelInferRequest of (name, Triton datatype, values), each of shape [1, n]."""
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    for name, datatype, values in tensors:
        request.inputs.add(name=name, datatype=datatype).shape.extend((1, len(values)))
        if datatype == "BYTES":
            raw = b"".join(struct.pack("<I", len(word)) + word for word in map(str.encode, values))
        else:
            raw = array(PACK[datatype], values).tobytes() if datatype != "BOOL" else bytes(values)
        request.raw_input_contents.append(raw)
    return request.SerializeToString()


@dataclass(slots=True)
class Piece:
    """What one message of Triton says about one choice."""

    choice: int
    text: str = ""
    num_output_tokens: int = 0
    """So far."""
    finish_reason: str | None = None
    """``stop`` or ``length``, in the last piece of a choice."""
    token_ids: Sequence[int] = ()
    log_probs: Sequence[float] = ()
    top_ids: Sequence[int] = ()
    """As many for each token as ``top_logprobs`` asked for, one token after the other; -1: no token."""
    top_log_probs: Sequence[float] = ()
    prompt_log_probs: Sequence[float] = ()
    """Of the prompt's tokens but the first, in the first piece of a choice that asks for them; the likeliest tokens
    in their places are as above."""
    prompt_top_ids: Sequence[int] = ()
    prompt_top_log_probs: Sequence[float] = ()
    num_cached_tokens: int | None = None
    """Of the prompt, in the last piece of a choice; None: it is not said."""


_REASONS = {b"length": "length", b"end_id": "stop", b"stop_words": "stop"}
_INT = struct.Struct("<i")


def read(message: service_pb2.ModelStreamInferResponse, first_choice: int) -> Piece | None:
    """None for the empty message that only ends a stream.

    Raises:
        ApiError: the message is an error.
    """
    response = message.infer_response
    outputs = response.outputs
    if not outputs:
        if message.error_message:
            raise errors.of_triton(message.error_message)
        return None
    piece = Piece(first_choice)
    for output, raw in zip(outputs, response.raw_output_contents, strict=True):
        name = output.name
        if name == "text_output":
            piece.text = raw[4:].decode("utf-8", "replace")
        elif name == "num_output_tokens":
            (piece.num_output_tokens,) = _INT.unpack(raw)
        elif name == "num_cached_tokens":
            (piece.num_cached_tokens,) = _INT.unpack(raw)
        elif name == "finish_reason":
            if (reason := _REASONS.get(raw[4:])) is None:
                raise errors.unavailable("the answer was cancelled by the server")
            piece.finish_reason = reason
        elif name == "sequence_index":
            piece.choice += _INT.unpack(raw)[0]
        elif name == "token_ids":
            piece.token_ids = array("i", raw)
        elif name == "output_log_probs":
            piece.log_probs = array("f", raw)
        elif name == "top_token_ids":
            piece.top_ids = array("i", raw)
        elif name == "top_log_probs":
            piece.top_log_probs = array("f", raw)
        elif name == "prompt_log_probs":
            piece.prompt_log_probs = array("f", raw)
        elif name == "prompt_top_token_ids":
            piece.prompt_top_ids = array("i", raw)
        elif name == "prompt_top_log_probs":
            piece.prompt_top_log_probs = array("f", raw)
    return piece


class Triton:
    """The channel of one process; create it inside the running event loop."""

    def __init__(self, url: str, tls_cert: bytes | None = None, tls_name: str = "") -> None:
        self._channel = Channel(url, tls_cert, tls_name)

    @classmethod
    def of(cls, upstream: Upstream) -> Triton:
        """With Triton's certificate as the only one that is trusted, where its port speaks TLS."""
        if not upstream.tls_cert:
            return cls(upstream.grpc_url)
        pem = Path(upstream.tls_cert).read_bytes()
        return cls(upstream.grpc_url, pem, upstream.tls_name)

    def ask(self, requests: Sequence[bytes], choices: int, timeout_s: float) -> Answers:
        """One call for each of ``requests``, each of ``choices`` answers; to be closed."""
        calls = [self._channel.call(STREAM_INFER, request, timeout_s) for request in requests]
        return OneCall(calls[0], choices) if len(calls) == 1 else SeveralCalls(calls, choices)

    async def answers(self, timeout_s: float) -> bool:
        """Whether a token comes back; a full queue is an answer, too.

        Raises:
            ApiError: what comes instead.
        """
        tensors: list[tuple[str, str, Sequence[Any]]] = [
            ("text_input", "BYTES", ["a"]),
            ("max_tokens", "INT32", [1]),
            ("return_finish_reason", "BOOL", [1]),
        ]
        answers = self.ask([infer_request("ready", tensors)], 1, timeout_s)
        try:
            return bool(await answers.next())
        except ApiError as error:
            if error.status == 429:
                return True
            raise
        finally:
            answers.close()

    async def close(self) -> None:
        await self._channel.close()


class Answers(Protocol):
    """All that Triton says to one HTTP request."""

    async def next(self) -> list[Piece]:
        """What has come since the last time, waiting for at least one piece; [] after the last.

        Raises:
            ApiError: the request has failed, or one of its choices.
        """

    def abort(self, error: ApiError) -> None:
        """``next`` raises ``error``, now or the next time."""

    def close(self) -> None:
        """Cancels what still runs."""


class OneCall:
    """The usual case: whoever waits for the next piece reads the call itself."""

    def __init__(self, call: Call, choices: int) -> None:
        self._call = call
        self._open_choices = choices
        self._failure: ApiError | None = None

    async def next(self) -> list[Piece]:
        while self._open_choices:
            if self._failure is not None:
                raise self._failure
            try:
                messages = await self._call.take()
            except CallFailed as failed:
                raise errors.of_status(failed.status, failed.details) from None
            if not messages:
                raise errors.internal("the answer ended without a finish reason")
            if pieces := self._read(messages):
                return pieces
        return []

    def _read(self, messages: Sequence[bytes]) -> list[Piece]:
        """Those before the first error, which comes the next time."""
        pieces = []
        try:
            for message in messages:
                piece = read(service_pb2.ModelStreamInferResponse.FromString(message), 0)
                if piece is not None:
                    pieces.append(piece)
                    self._open_choices -= piece.finish_reason is not None
        except ApiError as error:
            self._failure = error
        return pieces

    def abort(self, error: ApiError) -> None:
        self._call.cancel(error)

    def close(self) -> None:
        if self._open_choices:
            self._call.cancel()
        else:
            self._call.release(END_S)


class SeveralCalls:
    """Of several prompts: the calls' pieces in the order in which they come."""

    def __init__(self, calls: Sequence[Call], choices: int) -> None:
        self._choices = choices
        self._open_choices = len(calls) * choices
        self._waiting: deque[Piece] = deque()
        self._came = asyncio.Event()
        self._room = asyncio.Event()
        self._failure: ApiError | None = None
        self._calls = [OneCall(call, choices) for call in calls]
        self._readers = [asyncio.create_task(self._read(number)) for number in range(len(calls))]

    async def _read(self, number: int) -> None:
        reader = self._calls[number]
        try:
            while pieces := await reader.next():
                for piece in pieces:
                    piece.choice += number * self._choices
                self._waiting += pieces
                self._came.set()
                if len(self._waiting) >= MOST_WAITING:
                    self._room.clear()
                    await self._room.wait()
        except ApiError as error:
            self.abort(error)

    def abort(self, error: ApiError) -> None:
        self._failure = self._failure or error
        self._came.set()

    async def next(self) -> list[Piece]:
        if not self._open_choices:
            return []
        await self._came.wait()
        if self._failure is not None:
            raise self._failure
        pieces = list(self._waiting)
        self._waiting.clear()
        self._came.clear()
        self._room.set()
        self._open_choices -= sum(piece.finish_reason is not None for piece in pieces)
        return pieces

    def close(self) -> None:
        for reader in self._readers:
            reader.cancel()
        for call in self._calls:
            call.close()


def bias_tensors(bias: Mapping[int, float]) -> list[tuple[str, str, Sequence[Any]]]:
    return [("logit_bias_ids", "INT32", list(bias)), ("logit_bias_weights", "FP32", list(bias.values()))]
