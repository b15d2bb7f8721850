"""Talks to the engine process over its Unix socket; used by Triton's stubs and by tests.

One ``multiprocessing.connection`` each way over one socket: messages are small picklable tuples, and
the end of the other process is seen at once as end-of-file. Nothing here imports torch.

    engine = EngineClient("/run/flightline/engine.sock")
    handle = engine.submit(GenerationRequest(prompt_ids=[1, 2], max_tokens=8), on_output)
    engine.cancel(handle)
"""

from __future__ import annotations

import itertools
import os
import socket
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Client, Connection

from flightline.torch_engine.core.blocks import BlockEvent
from flightline.torch_engine.core.request import (
    Code,
    EngineStats,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    RequestError,
    RequestOutput,
)
from flightline.torch_engine.process.threads import vital

OutputCallback = Callable[[RequestOutput], None]
BlocksCallback = Callable[[list[BlockEvent]], None]

GONE = "the engine process ended while this request was in flight: send it again in a few seconds"
RETRY_S = 0.1
"""Between two looks for an engine that is not there."""
NOT_THERE = "the engine process is not running; it is being started, try again in a few seconds"


class EngineClient:
    """One connection to an engine process, re-opened whenever the engine comes back.

    ``submit`` and ``cancel`` never block on the engine's work. Callbacks run on this client's reader
    thread, in order, one message per engine step; they must return quickly.
    """

    def __init__(self, socket_path: str, connect_timeout_s: float = 0.0) -> None:
        """Starts connecting in the background; waits up to ``connect_timeout_s`` for the engine.

        Raises:
            RequestError: UNAVAILABLE, the engine did not answer within a positive ``connect_timeout_s``.
        """
        self.path = socket_path
        self._lock = threading.Lock()
        self._connection: Connection | None = None
        self._callbacks: dict[int, OutputCallback] = {}
        self._ids = itertools.count(1)
        self._closed = threading.Event()
        self._connected = threading.Event()
        self._stats = EngineStats()
        self._on_blocks: BlocksCallback | None = None
        self._info: ModelInfo | None = None
        self._reader = vital(self._read_for_ever, "engine-reader")
        if connect_timeout_s > 0 and not self._connected.wait(connect_timeout_s):
            self.close()
            raise RequestError(Code.UNAVAILABLE, f"no engine process answers at {socket_path}")

    @property
    def info(self) -> ModelInfo:
        """Facts about the loaded model. Raises RequestError UNAVAILABLE before the first connection."""
        if self._info is None:
            raise RequestError(Code.UNAVAILABLE, NOT_THERE)
        return self._info

    @property
    def stats(self) -> EngineStats:
        """The engine's last snapshot, at most about 100 ms old while it works."""
        return self._stats

    @property
    def connected(self) -> bool:
        return self._connected.is_set()

    @property
    def in_flight(self) -> int:
        """Requests of this client that have not ended."""
        return len(self._callbacks)

    def submit(self, request: GenerationRequest, on_output: OutputCallback) -> int:
        """Queues a request; every request ends in exactly one message with a ``finish_reason``.

        Returns the handle for :meth:`cancel`. Raises RequestError UNAVAILABLE if there is no engine.
        """
        handle = next(self._ids)
        with self._lock:
            if self._connection is None:
                raise RequestError(Code.UNAVAILABLE, NOT_THERE)
            self._callbacks[handle] = on_output
            try:
                self._connection.send(("submit", handle, time.monotonic_ns(), request))
            except OSError:
                self._callbacks.pop(handle, None)
                raise RequestError(Code.UNAVAILABLE, NOT_THERE) from None
        return handle

    def watch_blocks(self, on_blocks: BlocksCallback) -> None:
        """Tells what the prefix cache holds now, and then what happens to it, on the reader thread and in order.

        It ends with the engine: one that is started again holds nothing. TensorRT-LLM's engines tell nothing.
        """
        self._on_blocks = on_blocks
        self._send("watch")

    def cancel(self, handle: int) -> None:
        """Asks the engine to stop a request; its last message (CANCELLED, or a finish that was faster) follows."""
        if handle in self._callbacks:
            self._send("cancel", handle)

    def stop(
        self, request_id: str, keep: bool = True, on_known: Callable[[bool], None] = lambda known: None
    ) -> None:
        """Asks the engine to stop all requests of this name, other clients' too; each gets its last message.

        Args:
            keep: whether a request of this name that comes within the next seconds is stopped too, if the engine
                knows none: the stop may have overtaken it.
            on_known: told whether the engine knows such a request, or has just ended one.
        """

        def answered(output: RequestOutput) -> None:
            on_known(output.error is None)

        handle = next(self._ids)
        with self._lock:
            if self._connection is not None:
                self._callbacks[handle] = answered
                try:
                    self._connection.send(("stop", handle, request_id, keep))
                except OSError:
                    pass  # the reader sees the same end of file and answers
                return
        on_known(False)

    def _send(self, *message: object) -> None:
        with self._lock:
            if self._connection is None:
                return
            try:
                self._connection.send(message)
            except OSError:
                return  # the reader sees the same end of file and answers every request

    def close(self) -> None:
        """Closes the connection; the engine cancels what this client still has in flight."""
        self._closed.set()
        with self._lock:
            if self._connection is not None:
                hang_up(self._connection)
        self._reader.join(timeout=5)

    def _read_for_ever(self) -> None:
        while not self._closed.is_set():
            try:
                connection = Client(self.path, "AF_UNIX")
            except OSError:
                self._closed.wait(RETRY_S)
                continue
            try:
                self._read(connection)
            except (EOFError, OSError):
                pass
            self._drop(connection)

    def _read(self, connection: Connection) -> None:
        while True:
            kind, body = connection.recv()
            if kind == "step":
                for handle, output in body:
                    if output.finish_reason is None:
                        callback = self._callbacks.get(handle)
                    else:
                        with self._lock:
                            callback = self._callbacks.pop(handle, None)
                    if callback is not None:
                        callback(output)
                # The engine sends the next message only when this one was taken; meanwhile it merges.
                with self._lock:
                    connection.send(("taken", None))
            elif kind == "blocks":
                if self._on_blocks is not None:
                    self._on_blocks(body)
            elif kind == "stats":
                self._stats = body
            elif kind == "hello":
                self._info = body
                with self._lock:
                    self._connection = connection
                self._connected.set()

    def _drop(self, connection: Connection) -> None:
        """The engine is gone: answers what was in flight, since nobody else can."""
        with self._lock:
            self._connection = None
            self._connected.clear()
            orphans, self._callbacks = self._callbacks, {}
            connection.close()
        self._stats = EngineStats()
        for callback in orphans.values():
            error = RequestError(Code.UNAVAILABLE, GONE)
            callback(RequestOutput(finish_reason=FinishReason.ERROR, error=error))


def hang_up(connection: Connection) -> None:
    """Ends both directions, so that readers blocked in ``recv``, here and there, wake up with end-of-file."""
    with socket.socket(fileno=os.dup(connection.fileno())) as duplicate:
        try:
            duplicate.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
