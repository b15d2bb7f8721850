"""From Locust's greenlets to an event loop on one native thread, and back.

Streaming under gevent costs three to five times the CPU per token, and delays tokens long before the
worker looks busy; on a thread of its own the client holds several times the load, and with uvloop's event
loop an eighth more than with asyncio's. Timestamps are taken on that thread, and so are the times of an open
loop. Needs real threads: start Locust through :mod:`flightline.loadtest.locust_main`.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass

import gevent
import uvloop
from gevent.event import AsyncResult

from flightline.loadtest.punctual import Alarm
from flightline.loadtest.records import ClientSample, RequestRecord
from flightline.loadtest.transport import Load, Request, Transport

WATCH_NS = 20_000_000
"""Distance of the moments at which the event loop's lateness is looked at."""
SAMPLE_NS = 1_000_000_000


@dataclass(frozen=True)
class Answer:
    """The record of a request, and the text for who wants to go on from it."""

    record: RequestRecord
    text: str


class Bridge:
    """One event loop for all users of a worker process; create it after any fork.

    Args:
        transport: Of this loop alone.
        on_record: Called on the bridge's thread with every request that has ended.
        on_sample: Called on the bridge's thread about once a second.
        worker: Number of this process among the workers.
    """

    def __init__(
        self,
        transport: Transport,
        on_record: Callable[[RequestRecord], None] = lambda record: None,
        on_sample: Callable[[ClientSample], None] = lambda sample: None,
        worker: int = 0,
    ) -> None:
        self._transport = transport
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
        future = asyncio.run_coroutine_threadsafe(
            self._measure(load, self._transport.prepare(load)), self._loop
        )
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

        async def one(load: Load, request: Request) -> None:
            answer = await self._measure(load, request)
            if not answer.record.cancelled:
                hub.loop.run_callback_threadsafe(report, answer.record)

        async def all_of_them() -> None:
            sent, alarm = [], Alarm()
            try:
                for load in loads:
                    assert load.intended_ns is not None
                    request = self._transport.prepare(load)  # before its time, which it would delay
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
        await self._transport.open()
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
        await self._transport.close()

    async def _measure(self, load: Load, request: Request) -> Answer:
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
        text = await self._transport.exchange(request, record, load.timeout_s)
        self._on_record(record)
        return Answer(record, text)


def _hand_over(done: Future, answer: AsyncResult) -> None:
    if done.cancelled():
        return  # the greenlet that waited is gone
    if error := done.exception():
        answer.set_exception(error)
    else:
        answer.set(done.result())
