"""From Locust's greenlets to ``grpc.aio`` on one native thread, and back.

Streaming under gevent costs three to five times the CPU per token, and delays tokens long before the
worker looks busy; on a thread of its own the client holds several times the load, and with uvloop's event
loop an eighth more than with asyncio's. Timestamps are taken on that thread, and so are the times of an open
loop. Needs real threads: start Locust through :mod:`loadtest.locust_main`.
"""

from __future__ import annotations

import asyncio
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import gevent
import grpc
import uvloop
from gevent.event import AsyncResult
from tritonclient.grpc import service_pb2

from client import wire
from client.errors import from_rpc_error
from client.leaving import leave_async
from client.params import GenerateParams
from loadtest.punctual import Alarm
from loadtest.records import ClientSample, RequestRecord

Messages = list[tuple[int, bytes]]
"""Time of arrival and the message as it came: parsed ones would take ten times the memory until the answer ends."""

WATCH_NS = 20_000_000
"""Distance of the moments at which the event loop's lateness is looked at."""
SAMPLE_NS = 1_000_000_000


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

    def request(self) -> service_pb2.ModelInferRequest:
        """With a new id."""
        # min_tokens = max_tokens makes the length exact, whatever the model wants to say.
        least = self.output_tokens if self.exact else None
        params = GenerateParams(max_tokens=self.output_tokens, min_tokens=least)
        return wire.infer_request(self.endpoint, uuid.uuid4().hex, self.prompt, params, stream=True)


@dataclass(frozen=True)
class Answer:
    """The record of a request, and the text for who wants to go on from it."""

    record: RequestRecord
    text: str


class Bridge:
    """One channel and one event loop for all users of a worker process; create it after any fork.

    Args:
        url: gRPC address.
        on_record: Called on the bridge's thread with every request that has ended.
        on_sample: Called on the bridge's thread about once a second.
        worker: Number of this process among the workers.
    """

    def __init__(
        self,
        url: str,
        on_record: Callable[[RequestRecord], None] = lambda record: None,
        on_sample: Callable[[ClientSample], None] = lambda sample: None,
        worker: int = 0,
    ) -> None:
        self._url = url
        self._on_record = on_record
        self._on_sample = on_sample
        self._worker = worker
        self._running: set[asyncio.Task] = set()
        self._helpers: set[asyncio.Task] = set()
        self._loop = uvloop.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="grpc-aio", daemon=True)
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._open(), self._loop).result()

    def run(self, load: Load) -> Answer:
        """Sends the request and waits, in a greenlet, until it is answered or has failed.

        A greenlet that is killed meanwhile cancels its request; the record is written all the same.
        """
        answer, hub = AsyncResult(), gevent.get_hub()
        future = asyncio.run_coroutine_threadsafe(self._measure(load, load.request()), self._loop)
        future.add_done_callback(lambda done: hub.loop.run_callback_threadsafe(_hand_over, done, answer))
        try:
            return answer.get()
        except gevent.GreenletExit:
            future.cancel()
            raise

    def send_at_times(
        self, loads: Iterable[Load], report: Callable[[RequestRecord], None], done: Callable[[], None]
    ) -> None:
        """Sends each request at its ``intended_ns``, whatever became of those before it: an open loop.

        Args:
            loads: In the order of their times; drawn shortly before they are due.
            report: Called in gevent's hub with the record of every request that was not cut off.
            done: Called in gevent's hub when all of them have been answered or have failed.
        """
        hub = gevent.get_hub()

        async def one(load: Load, request: service_pb2.ModelInferRequest) -> None:
            answer = await self._measure(load, request)
            if not answer.record.cancelled:
                hub.loop.run_callback_threadsafe(report, answer.record)

        async def all_of_them() -> None:
            sent, alarm = [], Alarm()
            try:
                for load in loads:
                    assert load.intended_ns is not None
                    request = load.request()  # before its time, which it would delay
                    await alarm.wait_until(load.intended_ns)
                    sent.append(asyncio.create_task(one(load, request)))
                    sent = [task for task in sent if not task.done()] if len(sent) > 1000 else sent
            finally:
                alarm.close()
            await asyncio.gather(*sent, return_exceptions=True)
            hub.loop.run_callback_threadsafe(done)

        self._loop.call_soon_threadsafe(lambda: self._help(all_of_them()))

    @property
    def in_flight(self) -> int:
        return len(self._running)

    def close(self) -> None:
        """Cancels what is in flight, waits until its records are written, and ends the thread."""
        closing = asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop)
        deadline = time.monotonic() + 10.0
        while not closing.done() and time.monotonic() < deadline:
            gevent.sleep(0.005)  # Locust's messages must go on meanwhile
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=10)

    async def _open(self) -> None:
        self._channel = grpc.aio.insecure_channel(self._url, options=wire.CHANNEL_OPTIONS)
        self._call = self._channel.unary_stream(
            wire.STREAM_INFER,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
        )
        self._help(self._watch())

    def _help(self, coroutine) -> None:
        task = self._loop.create_task(coroutine)
        self._helpers.add(task)
        task.add_done_callback(self._helpers.discard)

    async def _watch(self) -> None:
        """How late this thread is at regular moments: no arrival can be stamped more exactly."""
        lags: list[float] = []
        alarm = Alarm()
        due = last = time.monotonic_ns()
        try:
            while True:
                due = max(due + WATCH_NS, time.monotonic_ns())
                await alarm.wait_until(due)
                now = time.monotonic_ns()
                lags.append(round((now - due) / 1e6, 3))
                if now - last >= SAMPLE_NS:
                    last = now
                    self._sample(lags)
                    lags = []
        finally:
            alarm.close()
            self._sample(lags)

    def _sample(self, lags: list[float]) -> None:
        self._on_sample(
            ClientSample(
                worker=self._worker,
                time_ns=time.monotonic_ns(),
                wall_ns=time.time_ns(),
                cpu_s=time.process_time(),
                in_flight=len(self._running),
                lags_ms=lags,
            )
        )

    async def _shut_down(self) -> None:
        for task in [*self._helpers, *self._running]:
            if not task.cancelling():  # a second time would cut its clean-up short
                task.cancel()
        await asyncio.gather(*self._helpers, *self._running, return_exceptions=True)
        await self._channel.close()

    async def _measure(self, load: Load, request: service_pb2.ModelInferRequest) -> Answer:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        record = RequestRecord(
            id=request.id,
            endpoint=load.endpoint,
            block=load.block,
            prompt_index=load.prompt_index,
            requested_tokens=load.output_tokens,
            sent_ns=time.monotonic_ns(),
            sent_unix_ns=time.time_ns(),
            intended_ns=load.intended_ns,
            exact=load.exact,
            turn=load.turn,
            worker=self._worker,
        )
        messages: Messages = []
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
        text = fill(record, messages)
        self._on_record(record)
        return Answer(record, text)


def _hand_over(done: Future, answer: AsyncResult) -> None:
    if done.cancelled():
        return  # the greenlet that waited is gone
    if error := done.exception():
        answer.set_exception(error)
    else:
        answer.set(done.result())


def fill(record: RequestRecord, messages: Messages) -> str:
    """Reads the responses, after the last one has come, into the record; returns the text.

    Meanwhile the tokens of other requests wait, so all outputs are read of the last response alone, and of the
    others just the text and the number of tokens so far.
    """
    words: list[bytes] = []
    tokens, layout = 0, _Layout()
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
        tokens = int.from_bytes(raws[layout.count][:4], "little") if layout.count >= 0 else tokens + 1
        record.chunk_ns.append(arrived_ns)
        record.chunk_tokens.append(tokens)
        last = message
    if record.error is not None:
        return ""
    if record.chunk_ns:
        chunk = wire.parse_response(last)
        assert chunk is not None
        record.num_input_tokens = chunk.num_input_tokens
        record.num_output_tokens = chunk.num_output_tokens
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
