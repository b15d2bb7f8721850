"""The order in which the supervisor starts again what has died."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from model_repository.serve import Server
from model_repository.server import BackOff
from model_repository.settings import ServeError, ServeSettings


class Parts:
    """An engine, a Triton and what is left of one, that only say what happens to them."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.engine_problem, self.triton_code = "the engine was ended", -9
        self.name, self.child = "the engine", None

    def problem(self) -> str:
        return self.engine_problem

    def start(self) -> None:
        self.engine_problem = ""
        self.events.append("engine starts")

    def triton(self) -> SimpleNamespace:
        def stop(patience_s: float) -> None: ...

        return SimpleNamespace(
            name="Triton",
            exit_code=self.triton_code,
            how_it_ended=lambda: "was ended",
            stop=stop,
            zombies=list,
        )


class SlowToRing:
    """A door that has a question open."""

    def waits(self) -> bool:
        return True


@pytest.fixture
def parts() -> Parts:
    return Parts()


@pytest.fixture
def server(parts: Parts, monkeypatch: pytest.MonkeyPatch) -> Server:
    server = Server(ServeSettings())
    server._engines = [parts]  # type: ignore[list-item]
    server._triton = parts.triton()  # type: ignore[assignment]
    server._belongings = SimpleNamespace(remove_tritons=lambda: parts.events.append("remains go"))  # type: ignore
    for name, event in {
        "_launch_triton": "Triton starts",
        "_await_engine": "engine is there",
        "_await_triton": "Triton is there",
        "_await_doors": "doors are asked",
    }.items():
        monkeypatch.setattr(server, name, lambda *_, event=event: parts.events.append(event))
    monkeypatch.setattr(BackOff, "next", lambda self: 0.0)
    return server


def test_no_door_is_asked_before_there_is_an_engine_behind_it(server: Server, parts: Parts) -> None:
    server._restart(server._problems())
    assert parts.events == [
        "engine starts",
        "remains go",
        "Triton starts",
        "engine is there",
        "Triton is there",
        "doors are asked",
    ]
    assert server.wait_ready(0)


def test_what_lives_is_left_alone(server: Server, parts: Parts) -> None:
    parts.triton_code = None
    server._triton = parts.triton()  # type: ignore[assignment]
    server._restart(server._problems())
    assert parts.events == ["engine starts", "engine is there"]


def test_a_triton_that_hangs_while_it_dies(server: Server, parts: Parts) -> None:
    """Its process is there and its ports are closed."""
    parts.triton_code, parts.engine_problem = None, ""
    server._triton = parts.triton()  # type: ignore[assignment]
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        server.settings = ServeSettings(grpc_port=listener.getsockname()[1])
        server._ready.set()
        assert server._problems() == {}
    assert server._problems() == {"Triton": "Triton has closed its ports and does not end"}


def test_a_failed_restart_is_tried_again(
    server: Server, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise ServeError("port taken")

    monkeypatch.setattr(server, "_await_triton", fail)
    with pytest.raises(ServeError):
        server._restart(server._problems())
    parts.triton_code = None
    server._triton = parts.triton()  # type: ignore[assignment]
    assert server._problems() == {"Triton": "the last restart of Triton failed"}
    assert not server.wait_ready(0)


def test_a_door_is_not_blamed_for_its_engine(server: Server, parts: Parts) -> None:
    """Whose steps take longer than the patience of a probe, with or without progress meanwhile."""
    server._engines = [SimpleNamespace(answers=lambda timeout_s: False)]  # type: ignore[list-item]
    parts.triton_code = None
    server._triton = parts.triton()  # type: ignore[assignment]
    for progressed in (False, True):
        server._look_into_silence("ensemble", SlowToRing(), 3, progressed)  # type: ignore[arg-type]
        assert server._triton_problem() is None


def test_a_door_whose_engine_answers_later_questions_is(server: Server, parts: Parts) -> None:
    server._engines = [SimpleNamespace(answers=lambda timeout_s: True)]  # type: ignore[list-item]
    parts.triton_code = None
    server._triton = parts.triton()  # type: ignore[assignment]
    server._look_into_silence("ensemble", SlowToRing(), 1, False)  # type: ignore[arg-type]
    assert server._triton_problem() == "model ensemble has not answered 1 one-token request(s)"
