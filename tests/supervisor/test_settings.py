from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from flightline.supervisor import serve, triton
from flightline.supervisor.serve import main
from flightline.supervisor.server import BackOff
from flightline.supervisor.settings import ServeError, ServeSettings, deployed
from tests.serving import free_ports


def test_ports_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPC_PORT", "9001")
    monkeypatch.delenv("HTTP_PORT", raising=False)
    settings = ServeSettings.from_environment()
    assert (settings.http_port, settings.grpc_port) == (8000, 9001)
    assert settings.grpc_url == "127.0.0.1:9001"


@pytest.mark.parametrize("port", ["abc", "0", "70000", "-1"])
def test_impossible_port(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("GRPC_PORT", port)
    with pytest.raises(
        ServeError, match=f"GRPC_PORT='{port}' is not valid: use a whole number from 1 to 65535"
    ):
        ServeSettings.from_environment()


def test_http_can_be_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PORT", "0")
    settings = ServeSettings.from_environment()
    assert "HTTP_PORT" not in settings.ports
    command = triton.command(triton.find(), settings, Path("m"), Path("b"), "prefix")
    assert "--allow-http=false" in command and not [word for word in command if "--http-port" in word]
    with pytest.raises(ServeError, match="HTTP_PORT=0 with TLS_CERT"):
        replace(settings, tls_cert=Path("c"), tls_key=Path("k"))


def test_patience_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROBE_TIMEOUT_S", "90")
    monkeypatch.setenv("DRAIN_S", "45")
    settings = ServeSettings.from_environment()
    assert (settings.probe_timeout_s, settings.drain_s) == (90, 45)


@pytest.mark.parametrize("started", ["", " 1.0"])
def test_stop_ends_no_process_of_somebody_else(tmp_path: Path, started: str) -> None:
    """The supervisor was killed, and its process id is another's by now."""
    (tmp_path / "run").mkdir()
    other = subprocess.Popen(["sleep", "1000"])
    try:
        (tmp_path / "run" / "serve.lock").write_text(f"{other.pid}{started}")
        assert main(["--stop", "--build-dir", str(tmp_path)]) == 0
        assert other.poll() is None
        with (tmp_path / "run" / "serve.lock").open() as lock:  # a new server is just about to write its name
            fcntl.flock(lock, fcntl.LOCK_EX)
            assert main(["--stop", "--build-dir", str(tmp_path)]) == 0
        assert other.poll() is None
    finally:
        other.kill()


def test_a_server_that_has_let_go_of_its_lock_is_not_running(tmp_path: Path) -> None:
    settings = ServeSettings(build_dir=tmp_path)
    settings.run_dir.mkdir(parents=True)
    path, me = settings.run_dir / "serve.lock", psutil.Process()
    path.write_text(f"{me.pid} {me.create_time()}")
    assert serve.running(settings) is None
    with path.open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert serve.running(settings) == me


@pytest.mark.parametrize("full", ["/dev/shm", "disk"])
def test_no_room(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], full: str
) -> None:
    """One line that says where, and nothing left behind."""
    (tmp_path / "deployment.json").write_text(json.dumps(deployment(tmp_path)))
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "config.pbtxt").write_text(
        'backend: "python"\ninstance_group [ { count: 3 kind: KIND_CPU } ]'
    )
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "config.pbtxt").write_text('platform: "ensemble"')
    for variable, port in zip(("HTTP_PORT", "GRPC_PORT", "METRICS_PORT"), free_ports(3), strict=True):
        monkeypatch.setenv(variable, str(port))
    if full == "disk":

        def copy(source: Path, target: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))

        monkeypatch.setattr(shutil, "copy2", copy)
    else:
        room = shutil._ntuple_diskusage(64 << 20, 24 << 20, 40 << 20)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: room)
    assert main(["--build-dir", str(tmp_path)]) == 1
    (error,) = capsys.readouterr().err.splitlines()
    if full == "disk":
        assert "run/backends/python" in error and "No space left on device; make room" in error
    else:
        assert "/dev/shm has 40 MiB free and the 3 processes of Triton's models need 48" in error
    assert not (tmp_path / "run" / "serve.lock").read_text()


def test_nothing_built_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--build-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "run 'make build-engines' first" in error


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_damaged_deployment(tmp_path: Path, text: str) -> None:
    (tmp_path / "deployment.json").write_text(text)
    with pytest.raises(ServeError, match="is damaged"):
        deployed(tmp_path)


def deployment(folder: Path, **changes: str) -> dict[str, Any]:
    return {
        "model": "m",
        "lane": "torch",
        "precision": "bf16",
        **dict.fromkeys(("engine_dir", "model_dir", "source_dir", "manifest"), str(folder)),
        "model_repository": str(folder),
        "dp": 1,
        "hardware": {"device": "cpu"},
        **changes,
    }


def test_built_folder_gone(tmp_path: Path) -> None:
    values = deployment(tmp_path, model_repository=str(tmp_path / "gone"))
    (tmp_path / "deployment.json").write_text(json.dumps(values))
    with pytest.raises(ServeError, match=r"gone, named by .* does not exist: run 'make build-engines' again"):
        deployed(tmp_path)


def test_back_off_grows() -> None:
    back_off = BackOff()
    back_off._last = -1000.0
    delays = [back_off.next() for _ in range(9)]
    assert delays[:4] == [0.0, 0.5, 1.0, 2.0]
    assert max(delays) == 30.0


def test_the_supervisor_outlives_its_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr(sys, "stdout", full)
        serve._say("anything")
        monkeypatch.undo()
        os.dup2(os.open(os.devnull, os.O_WRONLY), full.fileno())  # where the rest goes when it is closed
