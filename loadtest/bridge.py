"""From Locust's greenlets to ``grpc.aio`` on one native thread, and back.

Streaming under gevent costs three to five times the CPU per token, and delays tokens long before the
worker looks busy; on a thread of its own the client holds several times the load. Timestamps are taken
on that thread. Needs real threads: start Locust through :mod:`loadtest.locust_main`.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from concurrent.futures import Future
from dataclasses import dataclass

import gevent
import grpc
from gevent.event import AsyncResult
from tritonclient.grpc import service_pb2

from client import wire
from client.errors import ClientError, from_rpc_error
from client.leaving import leave_async
from client.params import GenerateParams
from loadtest.records import RecordWriter, RequestRecord


@dataclass(frozen=True)
class Load:
    """What to send."""

    endpoint: str
    prompt: str
    prompt_index: int
    output_tokens: int
    block: str = ""
    timeout_s: float | None = None


class Bridge:
    """One channel and one event loop for all users of a worker process; create it after any fork."""

    def __init__(self, url: str, writer: RecordWriter | None = None) -> None:
        self._url = url
        self._writer = writer
        self._running: set[asyncio.Task] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpc-aio", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._connect(), self._loop).result()

    def run(self, load: Load) -> RequestRecord:
        """Sends the request and waits, in a greenlet, until it is answered or has failed.

        A greenlet that is killed meanwhile cancels its request; the record is written all the same.
        """
        answer, hub = AsyncResult(), gevent.get_hub()
        future = asyncio.run_coroutine_threadsafe(self._measure(load), self._loop)
        future.add_done_callback(lambda done: hub.loop.run_callback_threadsafe(_hand_over, done, answer))
        try:
            return answer.get()
        except gevent.GreenletExit:
            future.cancel()
            raise

    def close(self) -> None:
        """Cancels what is in flight, waits until its records are written, and ends the thread."""
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result(timeout=10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    async def _connect(self) -> None:
        self._channel = grpc.aio.insecure_channel(self._url, options=wire.CHANNEL_OPTIONS)
        self._call = self._channel.unary_stream(
            wire.STREAM_INFER,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )

    async def _shut_down(self) -> None:
        for task in self._running:
            if not task.cancelling():  # a second time would cut its clean-up short
                task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        await self._channel.close()

    async def _measure(self, load: Load) -> RequestRecord:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        # min_tokens = max_tokens makes the length exact, whatever the model wants to say.
        params = GenerateParams(max_tokens=load.output_tokens, min_tokens=load.output_tokens)
        request = wire.infer_request(load.endpoint, uuid.uuid4().hex, load.prompt, params, stream=True)
        record = RequestRecord(
            id=request.id,
            endpoint=load.endpoint,
            block=load.block,
            prompt_index=load.prompt_index,
            requested_tokens=load.output_tokens,
            sent_ns=time.monotonic_ns(),
            sent_unix_ns=time.time_ns(),
        )
        messages: list[tuple[int, service_pb2.ModelStreamInferResponse]] = []
        call = self._call(request, timeout=load.timeout_s)

        async def read() -> None:
            async for message in call:
                messages.append((time.monotonic_ns(), message))

        reading = asyncio.create_task(read())
        try:
            await asyncio.shield(reading)
        except grpc.RpcError as error:
            record.error = str(from_rpc_error(error, self._url, load.timeout_s))
        except asyncio.CancelledError:
            record.cancelled = True
            await leave_async(call, request, self._call, reading)
        _fill(record, messages)
        if self._writer is not None:
            self._writer.write(record)
        return record


def _hand_over(done: Future, answer: AsyncResult) -> None:
    if done.cancelled():
        return  # the greenlet that waited is gone
    if error := done.exception():
        answer.set_exception(error)
    else:
        answer.set(done.result())


def _fill(record: RequestRecord, messages: list[tuple[int, service_pb2.ModelStreamInferResponse]]) -> None:
    """Parses the responses, after the last one has come."""
    tokens = 0
    for arrived_ns, message in messages:
        try:
            chunk = wire.parse_response(message)
        except ClientError as error:
            record.error = str(error)
            return
        if chunk is None:
            continue
        if chunk.text and record.first_text_chunk is None:
            record.first_text_chunk = len(record.chunk_ns)
        tokens = tokens + 1 if chunk.num_output_tokens is None else chunk.num_output_tokens
        record.chunk_ns.append(arrived_ns)
        record.chunk_tokens.append(tokens)
        record.num_input_tokens = chunk.num_input_tokens or record.num_input_tokens
        record.num_output_tokens = chunk.num_output_tokens or record.num_output_tokens
        if chunk.perf_metrics is not None:
            times = {name: getattr(chunk.perf_metrics, name) for name in wire.REQUIRED_PERF_FIELDS}
            record.server_times_ns = times
    if not record.cancelled and record.error is None and not record.chunk_ns:
        record.error = "the stream ended without any output"
