"""A pod that is deleted: the chart's own command line, environment and grace period, with streams in the middle."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import openai
import psutil
import pytest

from tests.deploy.chart import environment, rendered, server
from tests.model_repository.endpoints import PATIENCE_S, wait_until
from tests.serving import free_ports
from tests.supervisor.test_faults import private_copy

pytestmark = pytest.mark.slow
STREAMS = 32
TOKENS = 600
"""So many that an engine that is :func:`held_back` is at work long after 32 clients of one process have begun."""
DRAIN_S = 600
"""So long that a busy machine ends all streams within it."""


class Pod:
    """The chart's container as a process of this machine: other ports, another build folder."""

    def __init__(self, build: Path) -> None:
        self.spec = server(rendered("cpu-trial", f"server.drainSeconds={DRAIN_S}"))["spec"]
        (container,) = self.spec["containers"]
        http, grpc, metrics = free_ports(3)
        self.url = f"http://127.0.0.1:{http}"
        env = environment(container) | {"FLIGHTLINE_HOST": "127.0.0.1"}
        env |= {"FLIGHTLINE_HTTP_PORT": str(http), "FLIGHTLINE_GRPC_PORT": str(grpc)}
        env["FLIGHTLINE_METRICS_PORT"] = str(metrics)
        command = [sys.executable if word == "python3" else word for word in container["command"]]
        command[command.index("/engines")] = str(build)
        self.log, self.ready = build.parent / "pod.log", build / "run" / "ready"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, env={**os.environ, **env}, stdout=log, stderr=log)

    @property
    def engine(self) -> psutil.Process:
        children = psutil.Process(self.process.pid).children()
        return next(
            child for child in children if "flightline.torch_engine.process.server" in child.cmdline()
        )

    def status(self, path: str) -> int:
        try:
            with urllib.request.urlopen(self.url + path, timeout=PATIENCE_S) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0


@pytest.fixture
def pod(tiny_build: Path, tmp_path: Path) -> Iterator[Pod]:
    running = Pod(private_copy(tiny_build, tmp_path))
    try:
        wait_until(lambda: running.process.poll() is not None or running.status("/health/ready") == 200)
        # A stop before the baseline has answered, too, ends the command with 130, for a start that was given up.
        wait_until(lambda: running.process.poll() is not None or running.ready.exists())
        assert running.process.poll() is None
        yield running
    finally:
        running.process.kill()
        print(running.log.read_text(encoding="utf-8", errors="replace"))


@contextmanager
def held_back(process: psutil.Process) -> Iterator[None]:
    """It works a tenth of the time, and stands still in the end: clients are slower than a tiny model's engine, which
    would have made all tokens before the last of them has read its first."""
    enough = threading.Event()

    def hold() -> None:
        while not enough.wait(0.09):
            process.resume()
            enough.wait(0.01)
            process.suspend()

    process.suspend()
    thread = threading.Thread(target=hold)
    thread.start()
    try:
        yield
    finally:
        enough.set()
        thread.join()


def test_sigterm_under_32_streams_ends_them_all_whole(pod: Pod) -> None:
    llm = openai.OpenAI(base_url=f"{pod.url}/v1", api_key="none", max_retries=0)
    model = llm.models.list().data[0].id
    begun = threading.Semaphore(0)

    def stream(number: int) -> tuple[int, str | None]:
        """(tokens, finish reason), or the SDK's error."""
        events = llm.completions.create(
            model=model,
            prompt=f"{number} the fox",
            max_tokens=TOKENS,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        tokens, reason = 0, None
        for count, event in enumerate(events):
            if count == 0:
                begun.release()
            if event.choices and event.choices[0].finish_reason:
                reason = event.choices[0].finish_reason
            if event.usage:
                tokens = event.usage.completion_tokens
        return tokens, reason

    def refusal() -> httpx2.Response:
        with pytest.raises(openai.InternalServerError) as refused:
            llm.completions.create(model=model, prompt="new", max_tokens=1)
        assert refused.value.status_code == 503 and "stopping" in refused.value.message
        return refused.value.response

    engine = pod.engine
    with ThreadPoolExecutor(STREAMS) as pool:
        with held_back(engine):
            streams = [pool.submit(stream, number) for number in range(STREAMS)]
            for _ in range(STREAMS):
                assert begun.acquire(timeout=PATIENCE_S)
        assert not any(each.done() for each in streams)
        pod.process.send_signal(signal.SIGTERM)
        wait_until(lambda: pod.status("/health/ready") == 503)
        # The models refuse at once; the gateway's own refusal, which ends the connection too, may come a moment later.
        wait_until(lambda: refusal().headers.get("connection") == "close")
        assert pod.status("/health") == 200, "liveness would kill it in the middle"
        engine.resume()
        ends = [each.result(PATIENCE_S) for each in streams]
    assert ends == [(TOKENS, "length")] * STREAMS
    (container,) = pod.spec["containers"]
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod.process.wait(pod.spec["terminationGracePeriodSeconds"] - before) == 0
