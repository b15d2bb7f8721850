"""One gateway process in front of any server that speaks Triton's gRPC, unsupervised: for tests and benchmarks."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from flightline.gateway.settings import GatewaySettings, ProcessSettings, Upstream

PATIENCE_S = 60.0


@dataclass(frozen=True)
class Alone:
    """A running one."""

    process: subprocess.Popen
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


@contextmanager
def alone(
    upstream: Upstream,
    limits: GatewaySettings | None = None,
    env: Mapping[str, str] | None = None,
    **settings: object,
) -> Iterator[Alone]:
    """Starts it on a free port of 127.0.0.1, waits until it answers, and ends it with SIGTERM.

    Args:
        env: more variables.
        settings: fields of ``ProcessSettings``.

    Raises:
        RuntimeError: it ends at its start.
    """
    with socket.create_server(("127.0.0.1", 0)) as listener:
        fields = ProcessSettings(limits or GatewaySettings(), upstream, (listener.fileno(),), **settings)  # type: ignore[arg-type]
        process = subprocess.Popen(
            [sys.executable, "-m", "flightline.gateway", fields.to_json()],
            pass_fds=[number for number in (listener.fileno(), fields.last_words_fd) if number >= 0],
            env={**os.environ, **(env or {})},
            stdout=None if os.environ.get("GATEWAY_LOG") else subprocess.DEVNULL,
        )
        running = Alone(process, listener.getsockname()[1])
    try:
        _await(running)
        yield running
    finally:
        if process.poll() is None:
            process.terminate()
        try:
            process.wait(PATIENCE_S)
        finally:
            process.kill()


def _await(running: Alone) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while time.monotonic() < deadline:
        if running.process.poll() is not None:
            raise RuntimeError(f"the gateway ended at its start with status {running.process.returncode}")
        try:
            with urllib.request.urlopen(f"{running.url}/health", timeout=PATIENCE_S) as answer:
                if answer.status == 200:
                    return
        except OSError:
            time.sleep(0.02)
    raise RuntimeError("the gateway did not answer")
