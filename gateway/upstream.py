"""Requests to Triton's ``text_generation`` over one gRPC channel, and their answers as they come."""

from __future__ import annotations

import asyncio
import struct
from array import array
from collections import deque
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import grpc
from tritonclient.grpc import service_pb2

from flightline.client.wire import CHANNEL_OPTIONS, STREAM_INFER, TEXT_GENERATION
from flightline.gateway import errors
from flightline.gateway.errors import ApiError
from flightline.gateway.settings import Upstream

MOST_WAITING = 64
"""Messages of one request that may wait for its client; then Triton is not read any further."""
END_S = 5.0
"""So soon after the last piece of an answer its call must end."""
PACK = {"INT32": "i", "FP32": "f", "UINT64": "Q", "BOOL": "?"}
RECONNECT = [
    (f"grpc.{name}_reconnect_backoff_ms", ms) for name, ms in (("initial", 100), ("min", 100), ("max", 1000))
]
"""A Triton that is back must be found at once; gRPC's own patience grows to two minutes."""
KEEPALIVE: list[tuple[str, Any]] = [("grpc.keepalive_time_ms", 60_000), ("grpc.keepalive_timeout_ms", 20_000)]


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


_REASONS = {b"length": "length", b"end_id": "stop", b"stop_words": "stop"}
_INT = struct.Struct("<i")


def read(message: service_pb2.ModelStreamInferResponse, first_choice: int) -> Piece | None:
    """None for the empty message that only ends a stream.

    Raises:
        ApiError: the message is an error.
    """
    if message.error_message:
        raise errors.of_triton(message.error_message)
    response = message.infer_response
    piece = Piece(first_choice)
    outputs = response.outputs
    if not outputs:
        return None
    for output, raw in zip(outputs, response.raw_output_contents, strict=True):
        name = output.name
        if name == "text_output":
            piece.text = raw[4:].decode("utf-8", "replace")
        elif name == "num_output_tokens":
            (piece.num_output_tokens,) = _INT.unpack(raw)
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
    return piece


class Triton:
    """The channel of one process; create it inside the running event loop."""

    def __init__(self, url: str, tls_cert: bytes | None = None, tls_name: str = "") -> None:
        options: list[tuple[str, Any]] = [*CHANNEL_OPTIONS, *KEEPALIVE, *RECONNECT]
        if tls_cert is None:
            self._channel = grpc.aio.insecure_channel(url, options=options)
        else:
            credentials = grpc.ssl_channel_credentials(root_certificates=tls_cert)
            options += [("grpc.ssl_target_name_override", tls_name)] if tls_name else []
            self._channel = grpc.aio.secure_channel(url, credentials, options=options)
        self._call = self._channel.unary_stream(
            STREAM_INFER, response_deserializer=service_pb2.ModelStreamInferResponse.FromString
        )

    @classmethod
    def of(cls, upstream: Upstream) -> Triton:
        """With Triton's certificate as the only one that is trusted, where its port speaks TLS."""
        if not upstream.tls_cert:
            return cls(upstream.grpc_url)
        pem = Path(upstream.tls_cert).read_bytes()
        return cls(upstream.grpc_url, pem, upstream.tls_name)

    def ask(self, requests: Sequence[bytes], choices: int, timeout_s: float) -> Answers:
        """One call for each of ``requests``, each of ``choices`` answers; to be closed."""
        calls = [self._call(request, timeout=timeout_s) for request in requests]
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

    def __init__(self, call: Any, choices: int) -> None:
        self._call = call
        self._open_choices = choices
        self._failure: ApiError | None = None

    async def next(self) -> list[Piece]:
        while self._open_choices:
            try:
                message = await self._call.read()
            except asyncio.CancelledError:
                if self._failure is None:
                    raise
                raise self._failure from None
            except grpc.RpcError as error:
                raise errors.of_rpc(error) from None
            if message is grpc.aio.EOF:
                raise self._failure or await _early_end(self._call)
            piece = read(message, 0)
            if piece is not None:
                self._open_choices -= piece.finish_reason is not None
                return [piece]
        return []

    def abort(self, error: ApiError) -> None:
        self._failure = error
        self._call.cancel()

    def close(self) -> None:
        if self._open_choices:
            self._call.cancel()
        else:
            _in_background(_read_to_its_end(self._call))


class SeveralCalls:
    """Of several prompts: the calls' pieces in the order in which they come."""

    def __init__(self, calls: Sequence[Any], choices: int) -> None:
        self._calls = calls
        self._choices = choices
        self._open_choices = len(calls) * choices
        self._waiting: deque[Piece] = deque()
        self._came = asyncio.Event()
        self._room = asyncio.Event()
        self._failure: ApiError | None = None
        self._readers = [asyncio.create_task(self._read(number)) for number in range(len(calls))]

    async def _read(self, number: int) -> None:
        reader = OneCall(self._calls[number], self._choices)
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
        finally:
            reader.close()

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


async def _early_end(call: Any) -> ApiError:
    """Why a call has ended without a finish reason."""
    code = await call.code()
    if code is grpc.StatusCode.OK:
        return errors.internal("the answer ended without a finish reason")
    return errors.of_status(code, await call.details() or "")


async def _read_to_its_end(call: Any) -> None:
    """An answer that is whole need not be cancelled: its end is on the way."""
    try:
        async with asyncio.timeout(END_S):
            while await call.read() is not grpc.aio.EOF:
                pass
    except (grpc.RpcError, TimeoutError):
        call.cancel()


_background: set[asyncio.Task] = set()


def _in_background(work: Coroutine[Any, Any, None]) -> None:
    task = asyncio.create_task(work)
    _background.add(task)  # the event loop holds its tasks weakly
    task.add_done_callback(_background.discard)


def bias_tensors(bias: Mapping[int, float]) -> list[tuple[str, str, Sequence[Any]]]:
    return [("logit_bias_ids", "INT32", list(bias)), ("logit_bias_weights", "FP32", list(bias.values()))]
