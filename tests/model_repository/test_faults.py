"""What breaks is noticed and put right; what ends leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from model_repository.serve import ServeError, Server
from tests.model_repository.doors import Call, GrpcError, ask, wait_until
from tests.serving import CONTEXT, settings_for

pytestmark = pytest.mark.slow

LONG = {"text_input": "the dog", "max_tokens": CONTEXT - 100, "end_id": -1, "stream": True}


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """What the server says."""
    return []


@pytest.fixture(scope="module")
def server(tiny_build: Path, tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> Iterator[Server]:
    """One to break; it asks itself more often whether it still works."""
    build = private_copy(tiny_build, tmp_path_factory.mktemp("faults"))
    settings = settings_for(build, baseline=False, probe_period_s=1.0, probe_timeout_s=10.0)
    with Server(settings, say=lines.append) as running:
        yield running


def private_copy(build: Path, folder: Path) -> Path:
    """Another build folder for the same engine: its own lock and logs."""
    shutil.copy(build / "deployment.json", folder)
    return folder


def stub_of(server: Server, model: str) -> psutil.Process:
    for child in psutil.Process(server.triton_pid).children():
        if f"/{model}/" in " ".join(child.cmdline()):
            return child
    raise AssertionError(f"no stub of {model}")


def recovered(server: Server) -> None:
    wait_until(lambda: server.wait_ready(0.1))
    for door in ("ensemble", "text_generation"):
        wait_until(lambda door=door: answers(server, door))


def answers(server: Server, door: str) -> bool:
    """False while a stub has not found the engine again, which it says."""
    try:
        return bool(ask(server, door).text)
    except GrpcError as error:
        assert "it is being started, try again" in str(error)
        return False


@pytest.mark.parametrize("door", ["ensemble", "text_generation"])
def test_killed_engine(server: Server, lines: list[str], door: str) -> None:
    call, old = Call(server, door, LONG), server.engine_pids[0]
    call.next()
    os.kill(old, signal.SIGKILL)
    with pytest.raises(GrpcError, match="the engine process ended while this request was in flight"):
        call.read()
    wait_until(lambda: server.engine_pids[0] != old)
    recovered(server)
    assert any("engine process was ended by SIGKILL: restarting it" in line for line in lines)


@pytest.mark.parametrize("model", ["text_generation", "tensorrt_llm"])
def test_killed_stub(server: Server, lines: list[str], model: str) -> None:
    door = "ensemble" if model == "tensorrt_llm" else model
    call, old = Call(server, door, LONG), server.triton_pid
    call.next()
    stub_of(server, model).kill()
    with pytest.raises(GrpcError):
        call.read()
    wait_until(lambda: server.triton_pid != old)
    recovered(server)
    assert any("a Python stub of Triton has died" in line for line in lines)


def test_killed_triton(server: Server, lines: list[str]) -> None:
    old, stubs = server.triton_pid, psutil.Process(server.triton_pid).children()
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: server.triton_pid != old)
    recovered(server)
    wait_until(lambda: not any(stub.is_running() for stub in stubs))
    assert any("Triton was ended by SIGKILL" in line for line in lines)


def test_frozen_stub(server: Server) -> None:
    old = server.triton_pid
    stub_of(server, "postprocessing").suspend()
    wait_until(lambda: server.triton_pid != old)
    recovered(server)


def test_frozen_engine(server: Server, lines: list[str]) -> None:
    old = server.engine_pids[0]
    psutil.Process(old).suspend()
    wait_until(lambda: server.engine_pids[0] != old)
    recovered(server)
    assert any("has stopped answering" in line for line in lines)


def test_one_server_a_build_folder(server: Server) -> None:
    with pytest.raises(ServeError, match=r"a server already runs from .* \(pid \d+\): stop it first"):
        Server(settings_for(server.settings.build_dir)).start()
    assert ask(server, "ensemble").text


def test_stop_leaves_nothing_even_with_an_open_stream(tiny_build: Path, tmp_path: Path) -> None:
    server = Server(settings_for(private_copy(tiny_build, tmp_path), baseline=False, drain_s=2.0))
    server.start()
    call = Call(server, "text_generation", LONG)
    call.next()
    processes = [psutil.Process(server.engine_pids[0]), psutil.Process(server.triton_pid)]
    processes += [child for process in processes for child in process.children(recursive=True)]
    assert len(processes) >= 6
    socket_dir, prefix = server._socket_dir, server._shm_prefix
    assert list(Path("/dev/shm").glob(prefix + "*"))
    server.stop()
    assert not any(process.is_running() for process in processes)
    assert not socket_dir.exists()
    assert not list(Path("/dev/shm").glob(prefix + "*"))
    call.close()


def test_taken_port(tiny_build: Path, tmp_path: Path) -> None:
    settings = settings_for(private_copy(tiny_build, tmp_path))
    with socket.socket() as taken:
        taken.bind((settings.host, settings.grpc_port))
        taken.listen()
        match = rf"port {settings.grpc_port} is taken by .* \(pid {os.getpid()}\).*: set GRPC_PORT"
        with pytest.raises(ServeError, match=match):
            Server(settings).start()


def test_engine_that_cannot_start(tiny_build: Path, tmp_path: Path) -> None:
    deployment = json.loads((tiny_build / "deployment.json").read_text())
    broken = tmp_path / "engine"
    shutil.copytree(deployment["engine_dir"], broken)
    config = json.loads((broken / "engine.json").read_text())
    (broken / "engine.json").write_text(json.dumps({**config, "model_dir": "/nowhere"}))
    (tmp_path / "deployment.json").write_text(json.dumps({**deployment, "engine_dir": str(broken)}))
    with pytest.raises(ServeError, match=r"the engine process ended with status 1 at start:\n.*nowhere"):
        Server(settings_for(tmp_path)).start()
    assert not list(tmp_path.glob("run/marks.json"))


def _command(settings: object) -> list[str]:
    ports = [f"--{name}-port={getattr(settings, f'{name}_port')}" for name in ("http", "grpc", "metrics")]
    return [
        sys.executable,
        "-m",
        "model_repository.serve",
        f"--build-dir={settings.build_dir}",
        "--no-baseline",
        *ports,
    ]


def test_command_line(tiny_build: Path, tmp_path: Path) -> None:
    """Ready message, Ctrl-C; and what a killed supervisor leaves, the next one ends."""
    command = _command(settings_for(private_copy(tiny_build, tmp_path)))
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert any(line.startswith("ready: ") for line in first.stdout)
    orphans = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    assert any(orphan.is_running() for orphan in orphans)

    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    output = ""
    for line in second.stdout:
        output += line
        if "make bench" in line:
            second.send_signal(signal.SIGINT)
    assert second.wait() == 0
    assert "left by a server that was killed" in output
    assert "/v2/models/ensemble/generate" in output
    assert output.endswith("serve: stopped\n")
    assert not any(orphan.is_running() for orphan in orphans)
