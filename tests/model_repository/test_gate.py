"""How models and supervisor agree that no new request runs and that none is left."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flightline.model_repository.shared.gate import VARIABLE, Gate
from flightline.torch_engine.core.request import Code, RequestError


def test_closed_for_new_ones_until_the_last_has_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor = Gate(tmp_path / "gate")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "gate"))
    model, other = Gate.of_server(), Gate.of_server()
    model.check()
    model.enter()
    model.enter()
    other.enter()
    supervisor.close()
    with pytest.raises(RequestError, match="the server is stopping") as caught:
        other.check()
    assert caught.value.code is Code.UNAVAILABLE
    model.leave()
    other.leave()
    assert not supervisor.empty
    model.leave()
    assert supervisor.empty


def test_a_process_that_dies_is_not_waited_for(tmp_path: Path) -> None:
    gate = Gate(tmp_path / "gate")
    program = f"""
from pathlib import Path
from flightline.model_repository.shared.gate import Gate
gate = Gate(Path({str(tmp_path / "gate")!r}))
gate.enter()
print("in", flush=True)
input()
"""
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as model:
        assert model.stdout.readline() == "in\n"
        assert not gate.empty
        model.kill()
        model.wait()
        assert gate.empty


def test_a_model_without_a_server_is_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    gate = Gate.of_server()
    gate.check()
    gate.enter()
    gate.leave()
