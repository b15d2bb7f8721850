"""Server, client and replicas between an engine that does nothing and its front ends: who is told what, and when."""

from __future__ import annotations

import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Client
from pathlib import Path
from types import SimpleNamespace

import pytest

from flightline.torch_engine.core.request import (
    Code,
    EngineStats,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    QueueFull,
    RequestOutput,
)
from flightline.torch_engine.process import server as engine_server
from flightline.torch_engine.process.client import EngineClient
from flightline.torch_engine.process.routing import Replicas
from flightline.torch_engine.process.server import EngineServer
from flightline.torch_engine.process.threads import STATUS


class Idler:
    """An engine whose requests run until they are cancelled."""

    info = ModelInfo(100, 100, (), "nowhere")
    failed_steps = 0

    def __init__(self, room: int) -> None:
        self.config = SimpleNamespace(abandon_after_s=60.0)
        self.sequences: dict[object, SimpleNamespace] = {}
        self.room = room

    @property
    def busy(self) -> bool:
        return bool(self.sequences)

    @property
    def stats(self) -> EngineStats:
        return EngineStats(active_requests=len(self.sequences))

    def add(self, key: object, request: GenerationRequest, arrival_ns: int) -> None:
        if request.max_tokens == 0:
            raise ZeroDivisionError("a fault of ours")
        if len(self.sequences) >= self.room:
            raise QueueFull("the queue is full: max_queue_size=1")
        self.sequences[key] = SimpleNamespace(request=request)

    def cancel(self, key: object) -> RequestOutput | None:
        found = self.sequences.pop(key, None)
        return None if found is None else RequestOutput(finish_reason=FinishReason.CANCELLED)

    def step(self) -> list:
        time.sleep(0.002)
        return []


Start = Callable[..., list[str]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts engines with so much room each; returns their sockets."""
    servers: list[EngineServer] = []
    threads: list[threading.Thread] = []
    with tempfile.TemporaryDirectory(prefix="fl") as folder:

        def engines(*rooms: int) -> list[str]:
            paths = [f"{folder}/{number}" for number in range(len(rooms))]
            for room, path in zip(rooms, paths, strict=True):
                servers.append(EngineServer(Idler(room), path))  # type: ignore[arg-type]
                threads.append(threading.Thread(target=servers[-1].run, daemon=True))
                threads[-1].start()
            return paths

        yield engines
        for server in servers:
            server.stop()
        for thread in threads:
            thread.join()


def replicas(paths: list[str]) -> Replicas:
    made = Replicas(paths)
    wait_until(lambda: made.connected)
    return made


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def request(name: str = "", max_tokens: int = 5) -> GenerationRequest:
    return GenerationRequest([1], max_tokens, request_id=name)


def test_an_engine_with_a_full_queue_passes_the_request_on(start: Start) -> None:
    engines = replicas(start(1, 1))
    outputs: list[queue.Queue[RequestOutput]] = [queue.Queue() for _ in range(3)]
    first = engines.engines[0]
    direct: queue.Queue[RequestOutput] = queue.Queue()
    other = EngineClient(first.path, connect_timeout_s=60)  # whose requests the replicas do not see
    other.submit(request(), direct.put)
    wait_until(lambda: engines.stats.active_requests == 1)
    handles = [engines.submit(request(), outputs[0].put)]
    wait_until(lambda: engines.stats.active_requests == 2)
    assert outputs[0].empty() and handles[0].engine is engines.engines[1]
    engines.submit(request(), outputs[1].put)
    refused = outputs[1].get(timeout=300)
    assert refused.error.code is Code.UNAVAILABLE and "queue is full" in refused.error.message
    engines.cancel(handles[0])
    assert outputs[0].get(timeout=300).finish_reason is FinishReason.CANCELLED
    other.close(), engines.close()


@pytest.mark.parametrize("count", [1, 2])
def test_a_stop_that_overtakes_its_request_waits_for_it(start: Start, count: int) -> None:
    engines = replicas(start(*[9] * count))
    engines.stop("early")
    outputs: queue.Queue[RequestOutput] = queue.Queue()
    if count > 1:
        time.sleep(0.2)  # both engines say that they know none before they are told to keep it
    engines.submit(request("early"), outputs.put)
    assert outputs.get(timeout=300).finish_reason is FinishReason.CANCELLED
    engines.submit(request("other"), outputs.put)
    engines.stop("other")
    assert outputs.get(timeout=300).finish_reason is FinishReason.CANCELLED
    # Now known and ended: one more stop is late, and means no request to come.
    engines.stop("other")
    time.sleep(0.2)
    engines.submit(request("other"), outputs.put)
    wait_until(lambda: engines.stats.active_requests == 1)
    assert outputs.empty()
    engines.close()


def test_a_stop_that_overtakes_several_answers_ends_them_all(start: Start) -> None:
    engines = replicas(start(9))
    engines.stop("early")
    time.sleep(0.2)  # the engine says that it knows none before it is told to keep it
    outputs: queue.Queue[RequestOutput] = queue.Queue()
    for sibling in request("early").siblings(3):
        engines.submit(sibling, outputs.put)
    ends = [outputs.get(timeout=300) for _ in range(3)]
    assert {end.finish_reason for end in ends} == {FinishReason.CANCELLED}
    assert sorted(end.sequence_index for end in ends) == [0, 1, 2]
    engines.submit(request("early"), outputs.put)  # for it the stop is used up
    wait_until(lambda: engines.stats.active_requests == 1)
    engines.close()


def test_a_stop_is_kept_for_a_bounded_time(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_server, "KEPT_S", 0.05)
    engines = replicas(start(9))
    engines.stop("early")
    time.sleep(0.2)
    engines.submit(request("early"), lambda output: None)
    wait_until(lambda: engines.stats.active_requests == 1)
    engines.close()


def test_a_request_that_breaks_the_engines_endpoint_is_answered(start: Start) -> None:
    engine = replicas(start(9))
    outputs: queue.Queue[RequestOutput] = queue.Queue()
    engine.submit(request(max_tokens=0), outputs.put)
    error = outputs.get(timeout=300).error
    assert error.code is Code.INTERNAL and "a fault of ours" in error.message
    engine.submit(request(), outputs.put)
    wait_until(lambda: engine.stats.active_requests == 1)
    engine.close()


def test_a_front_end_that_sends_nonsense_is_disconnected_and_nobody_else(
    start: Start, capfd: pytest.CaptureFixture[str]
) -> None:
    (path,) = start(9)
    engine = replicas([path])
    engine.submit(request(), lambda output: None)
    connection = Client(path, "AF_UNIX")
    connection.send(("submit", 1, 0, request()))
    wait_until(lambda: engine.stats.active_requests == 2)
    connection.send_bytes(b"no pickle")
    with pytest.raises(EOFError):
        while connection.poll(60):
            connection.recv()
    wait_until(lambda: engine.stats.active_requests == 1)
    assert "is disconnected" in capfd.readouterr().err
    engine.close()


DIES = """
import sys, time
from flightline.torch_engine.process.client import EngineClient
from flightline.torch_engine.core.request import GenerationRequest
def broken(output):
    raise RuntimeError("a fault of ours")
engine = EngineClient(sys.argv[1], connect_timeout_s=60)
engine.submit(GenerationRequest([1], 0), broken)
time.sleep(60)
"""


def test_a_reader_that_dies_takes_its_process_with_it(start: Start) -> None:
    (path,) = start(9)
    run = subprocess.run(
        [sys.executable, "-c", DIES, path],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert run.returncode == STATUS
    assert "a fault of ours" in run.stderr and "thread 'engine-reader' has failed" in run.stderr
