from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from model_repository.serve import main
from model_repository.server import BackOff
from model_repository.settings import Deployment, ServeError, ServeSettings


def test_ports_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRPC_PORT", "9001")
    monkeypatch.delenv("HTTP_PORT", raising=False)
    settings = ServeSettings.from_environment()
    assert (settings.http_port, settings.grpc_port) == (8000, 9001)
    assert settings.grpc_url == "127.0.0.1:9001"


@pytest.mark.parametrize("port", ["abc", "0", "70000", "-1"])
def test_impossible_port(monkeypatch: pytest.MonkeyPatch, port: str) -> None:
    monkeypatch.setenv("HTTP_PORT", port)
    with pytest.raises(ServeError, match=f"HTTP_PORT='{port}' is not a port"):
        ServeSettings.from_environment()


def test_nothing_built_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--build-dir", str(tmp_path)]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "run 'make build-engines' first" in error


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_damaged_deployment(tmp_path: Path, text: str) -> None:
    (tmp_path / "deployment.json").write_text(text)
    with pytest.raises(ServeError, match="is damaged"):
        Deployment.load(tmp_path)


def deployment(folder: Path, **changes: str) -> dict[str, Any]:
    return {
        "model": "m",
        "lane": "torch",
        "precision": "bf16",
        "engine_dir": str(folder),
        "model_repository": str(folder),
        "dp": 1,
        "hardware": {"device": "cpu"},
        **changes,
    }


def test_built_folder_gone(tmp_path: Path) -> None:
    values = deployment(tmp_path, model_repository=str(tmp_path / "gone"))
    (tmp_path / "deployment.json").write_text(json.dumps(values))
    with pytest.raises(ServeError, match=r"gone, named by .* does not exist: run 'make build-engines' again"):
        Deployment.load(tmp_path)


def test_back_off_grows() -> None:
    back_off = BackOff()
    back_off._last = -1000.0
    delays = [back_off.next() for _ in range(9)]
    assert delays[:4] == [0.0, 0.5, 1.0, 2.0]
    assert max(delays) == 30.0
