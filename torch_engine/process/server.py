"""The engine process: ``python -m flightline.torch_engine.process.server --engine-dir DIR --socket PATH``.

The engine does not live under the interpreter lock of Triton's stub. Front ends connect over a Unix
socket (``process/client.py``); several may be connected at once and share the engine.

Nothing on the step loop waits for a front end: the outputs of a step are put into each connection's
outbox and sent by that connection's own thread. While a front end is slow to take a message, later
outputs of the same request are merged into the one that waits.
"""

from __future__ import annotations

import argparse
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.connection import Connection, Listener
from typing import Any

from flightline.torch_engine.core.blocks import BlockEvent
from flightline.torch_engine.core.config import ConfigError, EngineConfig
from flightline.torch_engine.core.request import (
    Code,
    EngineStats,
    FinishReason,
    GenerationRequest,
    RequestError,
    RequestOutput,
)
from flightline.torch_engine.engine import Engine, freeze_garbage_collector
from flightline.torch_engine.model.fields import UnsupportedModel
from flightline.torch_engine.parallel.ranks import RankLost
from flightline.torch_engine.process.client import hang_up
from flightline.torch_engine.process.interface import CacheTeller, ServedEngine
from flightline.torch_engine.process.log import logger
from flightline.torch_engine.process.threads import vital
from flightline.torch_engine.text.stream import UnsupportedTokenizer

STATS_PERIOD_S = 0.1
MAX_FAILED_STEPS = 3
KEPT_S = 10.0
"""How long a stop waits for its request, which may still be tokenised."""


class FrontEnd:
    """One connected process: reads its commands, sends it outputs and statistics."""

    def __init__(
        self, connection: Connection, number: int, commands: queue.SimpleQueue[Any], hello: object
    ) -> None:
        self.number = number
        self._connection = connection
        self._commands = commands
        self._ready = threading.Condition()
        self._outbox: dict[int, RequestOutput] = {}
        self._since: dict[int, float] = {}
        """When each waiting output began to wait (monotonic seconds)."""
        self._stats: EngineStats | None = None
        self._blocks: list[BlockEvent] = []
        self.watches = False
        """It wants to know what the prefix cache holds."""
        self._taken = True
        self.closed = False
        connection.send(("hello", hello))
        for target in (self._read, self._write):
            vital(self._guard, f"front-end-{number}", target)

    def put(self, handle: int, output: RequestOutput) -> None:
        """Queues an output; merges it with what still waits for the same request."""
        with self._ready:
            waiting = self._outbox.get(handle)
            if waiting is None:
                self._outbox[handle] = output
                self._since[handle] = time.monotonic()
            else:
                waiting.extend(output)

    def flush(self, stats: EngineStats | None) -> None:
        """Wakes the sender once a step, after all its outputs were put."""
        with self._ready:
            self._stats = stats or self._stats
            self._ready.notify()

    def tell(self, events: list[BlockEvent]) -> None:
        """Queues what has happened to the prefix cache, in order; sent with the next flush."""
        with self._ready:
            self._blocks += events
            self._ready.notify()

    def abandoned(self, after_s: float) -> list[int]:
        """Requests whose output nobody has taken for ``after_s`` seconds."""
        limit = time.monotonic() - after_s
        with self._ready:
            return [handle for handle, since in self._since.items() if since < limit]

    def _guard(self, work: Callable[[], None]) -> None:
        """Whatever ends one of the threads ends the connection, and says so unless it is the other side's end.

        The front end then answers its clients and connects anew; the others do not notice.
        """
        try:
            work()
        except (EOFError, OSError):
            pass
        except Exception:
            logger("engine").exception("front end %d is disconnected", self.number)
        self.close()

    def _read(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                if message[0] == "taken":
                    with self._ready:
                        self._taken = True
                        self._ready.notify()
                else:
                    self._commands.put((self, *message))
        finally:
            self._commands.put((self, "gone"))

    def _write(self) -> None:
        while True:
            with self._ready:
                self._ready.wait_for(
                    lambda: self.closed or self._stats or self._blocks or (self._taken and self._outbox)
                )
                if self.closed:
                    return
                stats, self._stats = self._stats, None
                blocks, self._blocks = self._blocks, []
                batch: dict[int, RequestOutput] = {}
                if self._taken and self._outbox:
                    batch, self._outbox = self._outbox, {}
                    self._since.clear()
                    self._taken = False
            if blocks:
                self._connection.send(("blocks", blocks))
            if stats is not None:
                self._connection.send(("stats", stats))
            if batch:
                self._connection.send(("step", list(batch.items())))

    def close(self) -> None:
        """Ends the connection and with it both threads."""
        with self._ready:
            if self.closed:
                return
            self.closed = True
            self._ready.notify()
        hang_up(self._connection)


class EarlyStops:
    """Stops of requests that have not come yet, and requests that a stop may come too late for; for ``KEPT_S``."""

    def __init__(self) -> None:
        self._early: dict[str, float] = {}
        self._ended: dict[str, float] = {}
        self._groups: dict[str, float] = {}
        """Siblings of which the first was stopped."""

    def keep(self, request_id: str) -> None:
        self._note(self._early, request_id)

    def ended(self, request_id: str) -> None:
        self._note(self._ended, request_id)

    def has_ended(self, request_id: str) -> bool:
        return self._ended.get(request_id, 0.0) > time.monotonic() - KEPT_S

    def overtook(self, request: GenerationRequest) -> bool:
        """Whether this request, which has just come, was stopped already; that stop is used up, but for siblings."""
        if request.group in self._groups:
            return True
        if self._early.pop(request.request_id, 0.0) <= time.monotonic() - KEPT_S:
            return False
        if request.group:
            self._note(self._groups, request.group)
        return True

    @staticmethod
    def _note(times: dict[str, float], request_id: str) -> None:
        now = time.monotonic()
        times.pop(request_id, None)
        times[request_id] = now
        while (oldest := next(iter(times))) and times[oldest] < now - KEPT_S:
            del times[oldest]


class EngineServer:
    """Feeds one engine from all front ends until told to stop."""

    def __init__(self, engine: ServedEngine, socket_path: str) -> None:
        self.engine = engine
        self._listener = Listener(socket_path, "AF_UNIX", backlog=16)
        os.chmod(socket_path, 0o600)
        self._commands: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._front_ends: list[FrontEnd] = []
        self._stopping = False
        self._stats_due = 0.0
        self._stops = EarlyStops()
        self._names: dict[tuple[FrontEnd, int], str] = {}
        """Of the running requests that have one."""
        vital(self._accept, "accept")

    def stop(self) -> None:
        """Ends :meth:`run`; safe to call from a signal handler (a ``SimpleQueue`` may be put to there)."""
        self._stopping = True
        self._commands.put(None)

    def run(self) -> int:
        """Steps the engine while there is work, sleeps while there is none. Returns the exit status."""
        while not self._stopping:
            self._run_commands()
            if self._stopping or not self.engine.busy:
                continue
            try:
                outputs = self.engine.step()
            except RankLost:  # who watches the ranks has said which, and why
                return 1
            for key, output in outputs:
                self._put(key, output)
            self._flush()
            failures = [output.error for _, output in outputs if output.error is not None]
            for message in {error.message for error in failures if error.code is Code.INTERNAL}:
                logger("engine").error("%s", message)
            if self.engine.failed_steps >= MAX_FAILED_STEPS:
                logger("engine").critical("%d steps in a row failed, giving up", MAX_FAILED_STEPS)
                return 1
        self._listener.close()
        return 0

    def _accept(self) -> None:
        number = 0
        while not self._stopping:
            try:
                connection = self._listener.accept()
            except (OSError, EOFError):
                continue
            number += 1
            try:
                front_end = FrontEnd(connection, number, self._commands, self.engine.info)
            except OSError:
                continue  # it hung up at once
            self._commands.put((front_end, "join"))

    def _run_commands(self) -> None:
        """Carries out all commands that have arrived; waits for one if the engine has nothing to do."""
        if not self.engine.busy:
            self._flush(force=True)
            self._command(self._commands.get())
        while not self._commands.empty():
            self._command(self._commands.get())
        for front_end in self._front_ends:
            for handle in front_end.abandoned(self.engine.config.abandon_after_s):
                self._cancel(front_end, handle)

    def _command(self, message: tuple[Any, ...] | None) -> None:
        if message is None:
            return
        front_end, kind, *body = message
        if kind == "submit":
            self._submit(front_end, *body)
        elif kind == "cancel":
            self._cancel(front_end, *body)
        elif kind == "stop":
            self._stop(front_end, *body)
        elif kind == "watch":
            self._watch(front_end)
        elif kind == "join":
            self._front_ends.append(front_end)
            front_end.flush(self.engine.stats)
        elif kind == "gone":
            if front_end in self._front_ends:
                self._front_ends.remove(front_end)
            for key in [key for key in self.engine.sequences if key[0] is front_end]:
                self._cancel(*key)

    def _submit(self, front_end: FrontEnd, handle: int, arrival_ns: int, request: GenerationRequest) -> None:
        try:
            if front_end.closed:
                return
            if self._stops.overtook(request):
                stopped = RequestOutput(finish_reason=FinishReason.CANCELLED)
                stopped.sequence_index = request.sequence_index
                front_end.put(handle, stopped)
                front_end.flush(None)
                return
            self.engine.add((front_end, handle), request, arrival_ns)
            if request.request_id:
                self._names[front_end, handle] = request.request_id
        except RequestError as error:
            self._refuse(front_end, handle, error)
        except Exception as error:  # whatever it is about this request, the others go on
            logger("engine").exception("request not taken")
            self._refuse(front_end, handle, RequestError(Code.INTERNAL, f"request not taken: {error!r}"))

    def _watch(self, front_end: FrontEnd) -> None:
        """An engine that does not tell of its cache tells nothing."""
        if isinstance(self.engine, CacheTeller):
            self._tell_blocks()  # those who watch already get what is theirs first
            front_end.watches = True
            front_end.tell(self.engine.watch_blocks())

    def _tell_blocks(self) -> None:
        if isinstance(self.engine, CacheTeller) and (events := self.engine.block_events()):
            for front_end in self._front_ends:
                if front_end.watches:
                    front_end.tell(events)

    def _refuse(self, front_end: FrontEnd, handle: int, error: RequestError) -> None:
        front_end.put(handle, RequestOutput(finish_reason=FinishReason.ERROR, error=error))
        front_end.flush(None)

    def _cancel(self, front_end: FrontEnd, handle: int) -> None:
        output = self.engine.cancel((front_end, handle))
        if output is not None:
            self._put((front_end, handle), output)
            front_end.flush(None)

    def _put(self, key: tuple[FrontEnd, int], output: RequestOutput) -> None:
        front_end, handle = key
        front_end.put(handle, output)
        if output.finish_reason is not None and (name := self._names.pop(key, "")):
            self._stops.ended(name)

    def _stop(self, front_end: FrontEnd, handle: int, request_id: str, keep: bool) -> None:
        """Answers with a last message: an error if no such request is known."""
        sequences = self.engine.sequences.items()
        running = [key for key, sequence in sequences if sequence.request.request_id == request_id]
        for key in running:
            self._cancel(*key)
        answer = RequestOutput(finish_reason=FinishReason.CANCELLED)
        if not running and not self._stops.has_ended(request_id):
            answer.finish_reason = FinishReason.ERROR
            answer.error = RequestError(Code.INVALID_ARG, f"no request {request_id!r} is running")
            if keep:
                self._stops.keep(request_id)
        front_end.put(handle, answer)
        front_end.flush(None)

    def _flush(self, force: bool = False) -> None:
        self._tell_blocks()
        now = time.monotonic()
        stats = None
        if force or now >= self._stats_due:
            # The first step after an idle moment is told at once, as idleness is: short requests would never be seen.
            self._stats_due = 0.0 if force else now + STATS_PERIOD_S
            stats = self.engine.stats
        for front_end in self._front_ends:
            front_end.flush(stats)


def main(arguments: list[str] | None = None) -> int:
    def load(engine_dir: str) -> Engine:
        logger("engine")
        engine = Engine(EngineConfig.load(engine_dir))
        engine.ranks.ends_process = True
        engine.guided.grammars.warm_up()
        freeze_garbage_collector()
        return engine

    errors = (ConfigError, UnsupportedModel, UnsupportedTokenizer, OSError, MemoryError)
    return run("python -m flightline.torch_engine.process.server", "engine.json", load, errors, arguments)


def run(
    program: str,
    engine_file: str,
    load: Callable[[str], ServedEngine],
    errors: tuple[type[Exception], ...],
    arguments: list[str] | None = None,
) -> int:
    """Command line of an engine process: loads, says ``engine ready: ...``, serves until SIGTERM or SIGINT.

    ``errors`` of ``load`` are the user's, told in one line; exit code 1.
    """
    parser = argparse.ArgumentParser(prog=program)
    parser.add_argument(
        "--engine-dir", required=True, help=f"folder with {engine_file}, from make build-engines"
    )
    parser.add_argument("--socket", required=True, help="Unix socket to listen on; must not exist")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        engine = load(options.engine_dir)
        server = EngineServer(engine, options.socket)
    except RankLost:
        return 1
    except errors as error:
        print(f"engine: {error}", file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    print(
        f"engine ready: {engine.info.description} (loaded in {time.monotonic() - started:.1f} s)", flush=True
    )
    status = server.run()
    if os.path.exists(options.socket):
        os.unlink(options.socket)
    engine.close()
    return status


if __name__ == "__main__":
    sys.exit(main())
