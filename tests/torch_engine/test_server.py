"""The engine process and its client, over the real socket."""

from __future__ import annotations

import dataclasses
import os
import pickle
import queue
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.connection import Client
from pathlib import Path

import pytest

from flightline.torch_engine.core.blocks import ROOT, BlockEvent
from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.request import (
    Code,
    FinishReason,
    GenerationRequest,
    PerfMetrics,
    RequestError,
    RequestOutput,
)
from flightline.torch_engine.process.client import EngineClient

LONG = GenerationRequest([5, 6, 7], 4000, end_id=-1)


class Process:
    def __init__(self, model_dir: Path, **settings: object) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="fl"))  # a socket's path must be short
        self.socket = str(self.folder / "e.sock")
        defaults = {"num_kv_blocks": 600, "max_seq_len": 4096, "num_threads": 1}
        EngineConfig(model_dir=str(model_dir), **{**defaults, **settings}).save(self.folder)
        self.start()

    def start(self) -> None:
        command = [
            sys.executable,
            "-m",
            "flightline.torch_engine.process.server",
            "--engine-dir",
            str(self.folder),
            "--socket",
            self.socket,
        ]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()
        Path(self.socket).unlink(missing_ok=True)


@pytest.fixture(scope="module")
def process(llama_dir: Path) -> Iterator[Process]:
    running = Process(llama_dir)
    yield running
    running.kill()


@pytest.fixture
def engine(process: Process) -> Iterator[EngineClient]:
    client = EngineClient(process.socket, connect_timeout_s=60)
    yield client
    client.close()


def submit(engine: EngineClient, request: GenerationRequest) -> tuple[int, queue.Queue[RequestOutput]]:
    outputs: queue.Queue[RequestOutput] = queue.Queue()
    return engine.submit(request, outputs.put), outputs


def last(outputs: queue.Queue[RequestOutput]) -> RequestOutput:
    whole = RequestOutput()
    while whole.finish_reason is None:
        whole.extend(outputs.get(timeout=300))
    return whole


def free_blocks(engine: EngineClient, expected: int) -> int:
    deadline = time.monotonic() + 10
    while engine.stats.kv_blocks_free != expected and time.monotonic() < deadline:
        time.sleep(0.02)
    return engine.stats.kv_blocks_free


def test_tokens_stream_and_metrics_come_last(engine: EngineClient) -> None:
    _, outputs = submit(engine, GenerationRequest([5, 6, 7], 600, end_id=-1))
    first = outputs.get(timeout=300)
    assert first.token_ids and first.finish_reason is None and first.metrics is None
    rest = last(outputs)
    assert len(first.token_ids + rest.token_ids) == 600
    times = rest.metrics
    assert 0 < times.arrival_time_ns <= times.first_scheduled_time_ns <= times.first_token_time_ns
    assert times.first_token_time_ns < times.last_token_time_ns
    assert times.kv_cache_alloc_total_blocks == 38


def test_a_request_that_does_not_stream_is_told_once(engine: EngineClient) -> None:
    _, streamed = submit(engine, GenerationRequest([5, 6, 7], 50, end_id=-1))
    _, outputs = submit(engine, GenerationRequest([5, 6, 7], 50, end_id=-1, stream=False))
    whole = outputs.get(timeout=300)
    assert whole.finish_reason is FinishReason.LENGTH and whole.metrics is not None
    assert whole.token_ids == last(streamed).token_ids and len(whole.token_ids) == 50
    handle, outputs = submit(engine, dataclasses.replace(LONG, stream=False))
    engine.cancel(handle)
    assert outputs.get(timeout=300).finish_reason is FinishReason.CANCELLED
    assert outputs.empty()


def test_cancel_and_disconnect_free_the_blocks(process: Process, engine: EngineClient) -> None:
    handle, outputs = submit(engine, LONG)
    outputs.get(timeout=300)
    engine.cancel(handle)
    assert last(outputs).finish_reason is FinishReason.CANCELLED
    assert free_blocks(engine, 600) == 600
    other = EngineClient(process.socket, connect_timeout_s=60)
    _, outputs = submit(other, LONG)
    outputs.get(timeout=300)
    other.close()
    assert last(outputs).finish_reason is FinishReason.ERROR
    assert free_blocks(engine, 600) == 600


def test_requests_shorter_than_the_statistics_period_are_seen_in_them(
    process: Process, engine: EngineClient
) -> None:
    connection = Client(process.socket, "AF_UNIX")
    assert connection.recv()[0] == "hello"
    seen = 0
    for number in range(10):
        connection.send(("submit", number, time.monotonic_ns(), GenerationRequest([5, 6, 7], 20, end_id=-1)))
        active, done = 0, False
        while not done or active:  # the engine is idle again before the next one
            kind, body = connection.recv()
            if kind == "stats":
                seen += body.active_requests > active
                active = body.active_requests
            else:
                connection.send(("taken",))
                done = body[0][1].finish_reason is not None
    connection.close()
    assert seen >= 8  # one may be overtaken by the next in the outbox


def test_a_refused_request_gets_its_error_and_the_engine_goes_on(engine: EngineClient) -> None:
    _, outputs = submit(engine, GenerationRequest([], 4))
    error = last(outputs).error
    assert error.code is Code.INVALID_ARG and "empty" in error.message
    _, outputs = submit(engine, GenerationRequest([5], 4))
    assert last(outputs).error is None


def test_outputs_coalesce_for_a_slow_front_end_and_none_is_lost(
    process: Process, engine: EngineClient
) -> None:
    """A raw connection that takes nothing for a while, then everything."""
    connection = Client(process.socket, "AF_UNIX")
    assert connection.recv()[0] == "hello"
    connection.send(("submit", 1, time.monotonic_ns(), GenerationRequest([5, 6, 7], 300, end_id=-1)))
    deadline = time.monotonic() + 60
    while engine.stats.active_requests == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    while engine.stats.active_requests and time.monotonic() < deadline:
        time.sleep(0.01)
    steps, tokens = 0, 0
    done = False
    while not done:
        kind, body = connection.recv()
        if kind == "step":
            steps += 1
            tokens += len(body[0][1].token_ids)
            done = body[0][1].finish_reason is not None
            connection.send(("taken", None))
    assert tokens == 300
    assert steps == 2, "the first message, then all the rest in one"


def test_output_that_nobody_takes_is_dropped_in_time(llama_dir: Path) -> None:
    process = Process(llama_dir, abandon_after_s=0.3)
    try:
        observer = EngineClient(process.socket, connect_timeout_s=60)
        connection = Client(process.socket, "AF_UNIX")
        connection.send(("submit", 1, time.monotonic_ns(), LONG))
        deadline = time.monotonic() + 60
        while observer.stats.active_requests == 0 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert free_blocks(observer, 600) == 600
        assert observer.stats.generated_tokens < 4000
        connection.close()
        observer.close()
    finally:
        process.kill()


def test_requests_in_flight_get_an_error_when_the_engine_dies_and_it_comes_back(llama_dir: Path) -> None:
    process = Process(llama_dir)
    try:
        engine = EngineClient(process.socket, connect_timeout_s=60)
        _, outputs = submit(engine, LONG)
        outputs.get(timeout=300)
        process.kill()
        error = last(outputs).error
        assert error.code is Code.UNAVAILABLE and "engine process ended" in error.message
        with pytest.raises(RequestError, match="not running"):
            engine.submit(LONG, outputs.put)
        process.start()
        deadline = time.monotonic() + 60
        while not engine.connected and time.monotonic() < deadline:
            time.sleep(0.02)
        _, outputs = submit(engine, GenerationRequest([5], 4, end_id=-1))
        assert len(last(outputs).token_ids) == 4
        engine.close()
    finally:
        process.kill()


def test_sigterm_ends_it_cleanly(llama_dir: Path) -> None:
    process = Process(llama_dir)
    engine = EngineClient(process.socket, connect_timeout_s=60)
    submit(engine, LONG)
    process.process.send_signal(signal.SIGTERM)
    out, err = process.process.communicate(timeout=300)
    assert process.process.returncode == 0 and err == ""
    assert out.startswith("engine ready: LlamaForCausalLM")
    assert not os.path.exists(process.socket)
    engine.close()


def test_a_broken_build_is_one_line_and_a_status(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "flightline.torch_engine.process.server",
        "--engine-dir",
        str(tmp_path),
        "--socket",
        "x",
    ]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 1
    assert run.stderr.count("\n") == 1 and "make build-engines" in run.stderr


def test_a_front_end_that_watches_is_told_of_the_prefix_cache(engine: EngineClient) -> None:
    """What was there before, then each full block as it is computed, its parent first."""
    told: queue.Queue[list[BlockEvent]] = queue.Queue()
    prompt = list(range(40, 140))
    last(submit(engine, GenerationRequest(prompt, 1))[1])
    engine.watch_blocks(told.put)
    before = {event.uid: event for event in told.get(timeout=300)}
    chain = spelled(before, prompt)
    assert chain == prompt[: len(chain)] and len(chain) >= 64
    longer = [*prompt[: len(chain)], *range(150, 290)]
    last(submit(engine, GenerationRequest(longer, 1))[1])
    deadline = time.monotonic() + 60
    while len(spelled(before, longer)) < 200 and time.monotonic() < deadline:
        before |= {event.uid: event for event in told.get(timeout=300)}
    assert spelled(before, longer) == longer[: len(spelled(before, longer))]
    assert len(spelled(before, longer)) >= 200


def spelled(events: dict[int, BlockEvent], prompt: list[int]) -> list[int]:
    """The longest beginning of a prompt that the events tell of."""
    parent, found = ROOT, list[int]()
    while True:
        following = [
            event
            for event in events.values()
            if event.parent_uid == parent
            and event.tokens
            and tuple(prompt[len(found) : len(found) + len(event.tokens)]) == event.tokens
        ]
        if not following:
            return found
        parent = following[0].uid
        found += following[0].tokens


def test_outputs_travel_whole() -> None:
    """They have a short form for the way between processes; no field may be forgotten there."""
    values = {
        "token_ids": [1, 2], "text": "a b", "log_probs": [-0.5, -1.0], "top_log_probs": [[(1, -0.5)], []],
        "cum_log_prob": -1.5, "num_input_tokens": 3, "num_output_tokens": 2, "finish_reason": FinishReason.ERROR,
        "error": RequestError(Code.INTERNAL, "why"), "metrics": PerfMetrics(), "prompt_log_probs": [-2.0],
        "prompt_top_log_probs": [[(4, -2.0)]], "sequence_index": 1, "lane_outputs": {"name": 1},
    }  # fmt: skip
    fields = [field.name for field in dataclasses.fields(RequestOutput)]
    assert set(values) == set(fields)
    for chosen in ([], fields, *([name] for name in fields)):
        output = RequestOutput(**{name: values[name] for name in chosen})
        travelled = pickle.loads(pickle.dumps(output))
        for name in fields:
            ours, theirs = getattr(travelled, name), getattr(output, name)
            assert ours == theirs or (name == "error" and str(ours) == str(theirs)), name
        travelled.extend(RequestOutput([5], " c", [-0.1]))  # its lists are its own
    assert RequestOutput().log_probs == pickle.loads(pickle.dumps(RequestOutput())).log_probs == []
