"""How a request gets to a server and its answer into a record: one class for each protocol, the same for the rest."""

from __future__ import annotations

import asyncio
import time
import uuid
from dataclasses import dataclass
from typing import Any, Protocol

import grpc
from tritonclient.grpc import service_pb2

from flightline.client import wire
from flightline.client.errors import from_rpc_error
from flightline.client.leaving import leave_async
from flightline.client.params import GenerateParams
from flightline.loadtest.records import RequestRecord

Messages = list[tuple[int, bytes]]
"""Time of arrival and the message as it came: parsed ones would take ten times the memory until the answer ends."""


@dataclass(frozen=True)
class Load:
    """What to send."""

    endpoint: str
    prompt: str
    prompt_index: int
    output_tokens: int
    block: str = ""
    timeout_s: float | None = None
    exact: bool = True
    turn: int = 0
    intended_ns: int | None = None
    """None: now."""


class Request(Protocol):
    """Ready to be sent."""

    @property
    def id(self) -> str: ...


class Transport(Protocol):
    """Requests of one event loop to one server."""

    async def open(self) -> None:
        """Before the first request, on the loop."""

    async def close(self) -> None:
        """After the last one."""

    def prepare(self, load: Load) -> Any:
        """A :class:`Request` with a new id; making it takes time that is not to be measured."""

    async def exchange(self, request: Any, record: RequestRecord, timeout_s: float | None) -> str:
        """Sends the request, and fills the record once the answer has ended; returns the text.

        Failures are in the record. So is a cancelled call: it returns like any other.
        """


class TritonTransport:
    """``ModelStreamInfer`` of Triton's gRPC service on one channel."""

    def __init__(self, url: str) -> None:
        self._url = url

    async def open(self) -> None:
        self._channel = grpc.aio.insecure_channel(self._url, options=wire.CHANNEL_OPTIONS)
        self._call = self._channel.unary_stream(
            wire.STREAM_INFER,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        )

    async def close(self) -> None:
        await self._channel.close()

    def prepare(self, load: Load) -> service_pb2.ModelInferRequest:
        # min_tokens = max_tokens makes the length exact, whatever the model wants to say.
        least = load.output_tokens if load.exact else None
        params = GenerateParams(max_tokens=load.output_tokens, min_tokens=least)
        return wire.infer_request(load.endpoint, uuid.uuid4().hex, load.prompt, params, stream=True)

    async def exchange(
        self, request: service_pb2.ModelInferRequest, record: RequestRecord, timeout_s: float | None
    ) -> str:
        messages: Messages = []
        call = self._call(request, timeout=timeout_s)

        async def read() -> None:
            async for message in call:
                messages.append((time.monotonic_ns(), message))

        reading = asyncio.create_task(read())
        try:
            await asyncio.shield(reading)
        except grpc.RpcError as error:
            record.error = str(from_rpc_error(error, self._url, timeout_s))
        except asyncio.CancelledError:
            record.cancelled = True
            await leave_async(call, request, self._call, reading)
        return fill(record, messages)


def fill(record: RequestRecord, messages: Messages) -> str:
    """Reads the responses, after the last one has come, into the record; returns the text.

    Meanwhile the tokens of other requests wait, so all outputs are read of the last response alone, and of the
    others just the text and the number of tokens.
    """
    words: list[bytes] = []
    tokens, layout, adds_up = 0, _Layout(), record.endpoint in wire.COUNTS_EACH_RESPONSE
    for arrived_ns, data in messages:
        message = service_pb2.ModelStreamInferResponse.FromString(data)
        if message.error_message:
            record.error = message.error_message
            break
        raws = message.infer_response.raw_output_contents
        if not raws:
            continue
        if len(raws) != layout.size:
            layout = _Layout.of(message.infer_response)
        word = raws[layout.text][4:] if layout.text >= 0 else b""
        if word and record.first_text_chunk is None:
            record.first_text_chunk = len(record.chunk_ns)
        words.append(word)
        told = layout.count >= 0
        count = int.from_bytes(raws[layout.count][:4], "little") if told else 1
        tokens = tokens + count if adds_up or not told else count
        record.chunk_ns.append(arrived_ns)
        record.chunk_tokens.append(tokens)
        last = message
    if record.error is not None:
        return ""
    if record.chunk_ns:
        chunk = wire.parse_response(last)
        assert chunk is not None
        record.num_input_tokens = chunk.num_input_tokens
        record.num_output_tokens = None if chunk.num_output_tokens is None else tokens
        if chunk.perf_metrics is not None:
            record.server_times_ns = {
                name: value for name, value in vars(chunk.perf_metrics).items() if value is not None
            }
    elif not record.cancelled:
        record.error = "the stream ended without any output"
    return b"".join(words).decode(errors="replace")


@dataclass(frozen=True)
class _Layout:
    """Where a response has its text and its count: the same in all responses of as many outputs."""

    size: int = -1
    text: int = -1
    count: int = -1

    @classmethod
    def of(cls, response: service_pb2.ModelInferResponse) -> _Layout:
        names = [tensor.name for tensor in response.outputs]

        def place(name: str) -> int:
            return names.index(name) if name in names else -1

        return cls(len(names), place("text_output"), place("num_output_tokens"))
