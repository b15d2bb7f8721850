"""What breaks is noticed and put right; what ends leaves nothing."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from flightline.supervisor import triton
from flightline.supervisor.serve import ServeError, Server, ready_message
from tests.model_repository.endpoints import PATIENCE_S, Answer, Call, GrpcError, ask, wait_until
from tests.serving import CONTEXT, WATCHFUL, settings_for

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
    settings = settings_for(build, baseline=False, drain_s=600.0, **WATCHFUL)
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
    """All of it answers again; and what broke is forgotten, or the next restart would wait the longer for it."""
    wait_until(lambda: server.wait_ready(0.1))
    server._back_off.clear()
    for endpoint in ("ensemble", "text_generation"):
        wait_until(lambda endpoint=endpoint: answers(server, endpoint))


def answers(server: Server, endpoint: str) -> bool:
    """False while a stub has not found the engine again, which it says."""
    try:
        return bool(ask(server, endpoint).text)
    except GrpcError as error:
        assert "it is being started, try again" in str(error)
        return False


@pytest.mark.parametrize("endpoint", ["ensemble", "text_generation"])
def test_killed_engine(server: Server, lines: list[str], endpoint: str) -> None:
    call, old = Call(server, endpoint, LONG), server.engine_pids[0]
    call.next()
    os.kill(old, signal.SIGKILL)
    with pytest.raises(GrpcError, match="the engine process ended while this request was in flight"):
        call.read()
    wait_until(lambda: server.engine_pids[0] != old)
    recovered(server)
    assert any("engine process was ended by SIGKILL: restarting it" in line for line in lines)


@pytest.mark.parametrize("model", ["text_generation", "tensorrt_llm"])
def test_killed_stub(server: Server, lines: list[str], model: str) -> None:
    endpoint = "ensemble" if model == "tensorrt_llm" else model
    said = len(lines)
    call, old = Call(server, endpoint, LONG), server.triton_pid
    call.next()
    stub_of(server, model).kill()
    with pytest.raises(GrpcError):
        call.read()
    wait_until(lambda: server.triton_pid != old)
    recovered(server)
    # Whoever sees it first: who looks after the processes, or who asks for tokens. Or Triton gives up by itself.
    told = ("a Python stub of Triton has died", f"model {endpoint} is dead", "Triton was ended by SIGABRT")
    assert any(any(each in line for each in told) for line in lines[said:])


def test_killed_triton(server: Server, lines: list[str]) -> None:
    old, stubs = server.triton_pid, psutil.Process(server.triton_pid).children()
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: server.triton_pid != old)
    recovered(server)
    wait_until(lambda: not any(stub.is_running() for stub in stubs))
    assert any("Triton was ended by SIGKILL" in line for line in lines)


def test_engine_and_triton_killed_together(server: Server, lines: list[str]) -> None:
    """Both are restarted before anybody asks whether an endpoint works."""
    said = len(lines)
    old = server.triton_pid, server.engine_pids[0]
    for pid in old:
        os.kill(pid, signal.SIGKILL)
    wait_until(lambda: server.triton_pid != old[0] and server.engine_pids[0] != old[1])
    recovered(server)
    assert not [line for line in lines[said:] if "restart failed" in line]
    assert len([line for line in lines[said:] if "is back after" in line]) == 2


def test_a_body_that_ends_triton(server: Server, lines: list[str]) -> None:
    """Its HTTP port follows 2,000,000 nested brackets until the stack is full (Triton 2.51)."""
    old = server.triton_pid
    url = f"{server.settings.triton_http_url}/v2/models/ensemble/generate"
    body = nested(2_000_000)
    with pytest.raises(OSError):
        urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=PATIENCE_S)
    wait_until(lambda: server.triton_pid != old)
    recovered(server)
    assert any("Triton was ended by SIGSEGV" in line for line in lines)


def nested(depth: int) -> bytes:
    return b'{"max_tokens": 1, "text_input": ' + b"[" * depth + b"]" * depth + b"}"


@pytest.mark.parametrize(
    ("name", "body"),
    [
        ("50,000 brackets", nested(50_000)),
        ("a prompt of 4.2 MB", b'{"max_tokens": 1, "text_input": "' + b"a dog " * 700_000 + b'"}'),
    ],
)
def test_a_body_that_needs_more_stack_than_is_usual(server: Server, name: str, body: bytes) -> None:
    """Each ended Triton 2.51 while its threads had 8 MiB."""
    old = server.triton_pid
    for endpoint in ("ensemble", "text_generation"):
        url = f"{server.settings.triton_http_url}/v2/models/{endpoint}/generate"
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=PATIENCE_S)
        assert refused.value.code == 400
    assert server.triton_pid == old and ask(server, "text_generation", "the dog").text


def test_nobody_else_reads_what_is_on_its_way(server: Server) -> None:
    """Neither prompts in shared memory, nor a key on a command line."""
    files = list(Path("/dev/shm").glob(server._belongings.shm_prefix + "*"))
    assert files
    ask(server, "text_generation", "the dog " * 1000)
    assert {stat.S_IMODE(file.stat().st_mode) for file in files} == {0o600}
    assert stat.S_IMODE(server._belongings.folder.stat().st_mode) == 0o700
    words = psutil.Process(server.triton_pid).cmdline()
    restricted = [word.split(":", 1)[1] for word in words if "restricted" in word]
    assert len(restricted) == 2
    for header in restricted:
        name, value = header.split("=")
        status = shared_memory_over_http(server, name.encode(), value.encode())
        assert b"200 OK" not in status
        assert not shared_memory_over_grpc(server, name.encode(), value.encode())


def shared_memory_over_http(server: Server, name: bytes, value: bytes) -> bytes:
    """What the server says to a request for a closed endpoint with this header, byte by byte as it is."""
    request = b"GET /v2/systemsharedmemory/status HTTP/1.1\r\nHost: a\r\nConnection: close\r\n"
    with socket.create_connection(("127.0.0.1", server.settings.triton_http_port), PATIENCE_S) as connection:
        connection.sendall(request + name + b": " + value + b"\r\n\r\n")
        answer = b""
        while part := connection.recv(4096):
            answer += part
    return answer


def shared_memory_over_grpc(server: Server, name: bytes, value: bytes) -> bool:
    """Whether a closed endpoint opens to this header; HTTP/2 frames written by hand, since no client sends it."""

    def field(key: bytes, text: bytes) -> bytes:
        return b"\0" + bytes([len(key)]) + key + bytes([len(text)]) + text

    def frame(kind: int, flags: int, stream: int, body: bytes) -> bytes:
        return len(body).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + body

    fields = {
        b":method": b"POST",
        b":scheme": b"http",
        b":path": b"/inference.GRPCInferenceService/SystemSharedMemoryStatus",
        b":authority": b"a",
        b"te": b"trailers",
        b"content-type": b"application/grpc",
        b"triton-grpc-protocol-" + name: value,
    }
    headers = b"".join(field(key, text) for key, text in fields.items())
    with socket.create_connection(
        (server.settings.host, server.settings.grpc_port), PATIENCE_S
    ) as connection:
        connection.sendall(
            b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(4, 0, 0, b"") + frame(1, 4, 1, headers)
        )
        connection.sendall(frame(0, 1, 1, bytes(5)))
        answer = b""
        while b"grpc-status" not in answer and (part := connection.recv(4096)):
            answer += part
    assert b"grpc-status" in answer
    return b"grpc-status\x010" in answer


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


def test_stop_lets_running_requests_end_and_refuses_new_ones(server: Server) -> None:
    """Of both endpoints, on streams that stay open. It stops the server of the tests above."""
    recovered(server)
    inputs = LONG | {"max_tokens": 1000, "return_num_output_tokens": True}
    endpoints = ["ensemble", "text_generation"] * 4
    calls = [Call(server, endpoint, inputs) for endpoint in endpoints]
    firsts = [call.next() for call in calls]
    engine = psutil.Process(server.engine_pids[0])
    engine.suspend()  # else a busy machine could end them all before new requests are refused
    gate, stopping = server._gate, threading.Thread(target=server.stop)
    stopping.start()
    wait_until(lambda: gate.closed)
    for endpoint in ("ensemble", "text_generation"):
        with pytest.raises(GrpcError, match="the server is stopping and takes no new requests"):
            ask(server, endpoint)
    engine.resume()
    for endpoint, call, first in zip(endpoints, calls, firsts, strict=True):
        answer = call.read()
        answer.responses.insert(0, first)
        assert answer.num_output_tokens(endpoint) == inputs["max_tokens"]
    stopping.join()


def test_a_start_that_is_given_up_lets_requests_end(
    tiny_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ports are open before its last endpoint, the baseline perhaps, has answered."""
    server = Server(settings_for(private_copy(tiny_build, tmp_path), baseline=False, drain_s=600.0))
    monkeypatch.setattr(
        server, "_await_endpoints", lambda: server._await(server.triton_process, lambda: False)
    )
    ends: list[Exception] = []

    def start() -> None:
        try:
            server.start()
        except ServeError as error:
            ends.append(error)

    thread = threading.Thread(target=start)
    thread.start()

    def serves() -> bool:
        with contextlib.suppress(GrpcError):
            return bool(ask(server, "text_generation").text)
        return False

    wait_until(server._port.ready)
    wait_until(serves)
    inputs = LONG | {"max_tokens": 3000, "return_num_output_tokens": True}
    call = Call(server, "text_generation", inputs)
    first = call.next()
    (pid,) = server.engine_pids
    engine = psutil.Process(pid)
    engine.suspend()  # else a busy machine could end it before the server stops
    gate = server._gate
    server.abandon_start()
    wait_until(lambda: gate.closed)
    with pytest.raises(GrpcError, match="the server is stopping and takes no new requests"):
        ask(server, "ensemble")
    engine.resume()
    answer = call.read()
    answer.responses.insert(0, first)
    assert answer.num_output_tokens("text_generation") == inputs["max_tokens"]
    thread.join(PATIENCE_S)
    assert [str(error) for error in ends] == ["stopped while starting"]
    assert not engine.is_running()


def test_stop_leaves_nothing_even_with_an_open_stream(
    tiny_build: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a server without HTTP, which asks itself over gRPC."""
    monkeypatch.setattr(triton, "EXIT_S", 3)  # the open stream makes it wait all of that
    settings = replace(
        settings_for(private_copy(tiny_build, tmp_path), baseline=False, drain_s=1.0), http_port=0
    )
    server = Server(settings)
    server.start()
    assert "HTTP     off" in ready_message(server)
    call = Call(server, "text_generation", LONG)
    call.next()
    processes = [psutil.Process(server.engine_pids[0]), psutil.Process(server.triton_pid)]
    processes += [child for process in processes for child in process.children(recursive=True)]
    assert len(processes) >= 6
    socket_dir, prefix = server._belongings.folder, server._belongings.shm_prefix
    assert list(Path("/dev/shm").glob(prefix + "*"))
    checks = server._checks()
    assert all(check.ask().served for check in checks.values())
    server.stop()
    wait_until(
        lambda: not any(process.is_running() for process in processes)
    )  # zombies until they are collected
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
    assert not (tmp_path / "run" / "serve.lock").read_text()


def _command(settings: object) -> list[str]:
    ports = [f"--{name}-port={getattr(settings, f'{name}_port')}" for name in ("http", "grpc", "metrics")]
    return [
        sys.executable,
        "-m",
        "flightline.supervisor.serve",
        f"--build-dir={settings.build_dir}",
        "--no-baseline",
        *ports,
    ]


def test_command_line(tiny_build: Path, tmp_path: Path) -> None:
    """Ready message, SIGTERM under load, Ctrl-C; and what a killed supervisor leaves, the next one ends."""
    settings = settings_for(private_copy(tiny_build, tmp_path))
    command = _command(settings)
    # A folder of its own, or any other server that starts now would end it.
    env = os.environ | {"TMPDIR": str(tmp_path), "DRAIN_S": "600"}
    first = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert any(line.startswith("ready: ") for line in first.stdout)
    orphans = psutil.Process(first.pid).children(recursive=True)
    first.kill()
    first.wait()
    assert any(orphan.is_running() for orphan in orphans)

    second = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    output, answers = "", []
    for line in second.stdout:
        output += line
        if "make bench" in line:
            inputs = LONG | {"max_tokens": 1000, "return_num_output_tokens": True}
            endpoints = ["ensemble", "text_generation"] * 4
            calls = [Call(SimpleNamespace(settings=settings), endpoint, inputs) for endpoint in endpoints]
            firsts = [call.next() for call in calls]
            second.send_signal(signal.SIGTERM)
            answers = [
                (endpoint, Answer([first, *call.read().responses]))
                for endpoint, call, first in zip(endpoints, calls, firsts, strict=True)
            ]
    assert second.wait() == 0
    assert [answer.num_output_tokens(endpoint) for endpoint, answer in answers] == [1000] * 8
    assert "left by a server that was killed" in output
    assert "/v2/models/text_generation/generate" in output
    assert output.endswith(" INFO serve: stopped\n")
    wait_until(lambda: not any(orphan.is_running() for orphan in orphans))

    third = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env)
    assert " INFO serve: starting " in third.stdout.readline()
    third.send_signal(signal.SIGINT)
    assert third.stdout.read().endswith(" INFO serve: stopped\n")
    assert third.wait() == 130
