"""The order in which the supervisor starts again what has died."""

from __future__ import annotations

import socket
from types import SimpleNamespace

import pytest

from flightline.supervisor.serve import Server
from flightline.supervisor.server import BackOff, Died
from flightline.supervisor.settings import ServeError, ServeSettings


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
    """An endpoint that has a question open."""

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
        "_await_endpoints": "endpoints are asked",
    }.items():
        monkeypatch.setattr(server, name, lambda *_, event=event: parts.events.append(event))
    monkeypatch.setattr(BackOff, "next", lambda self: 0.0)
    return server


def test_no_endpoint_is_asked_before_there_is_an_engine_behind_it(server: Server, parts: Parts) -> None:
    server._restart(server._problems())
    assert parts.events == [
        "engine starts",
        "remains go",
        "Triton starts",
        "engine is there",
        "Triton is there",
        "endpoints are asked",
    ]
    assert server.wait_ready(0)


def test_engine_and_triton_load_at_the_same_time(
    server: Server, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "_start_engines", parts.start)
    server._start_all()
    assert parts.events == [
        "engine starts",
        "Triton starts",
        "engine is there",
        "Triton is there",
        "endpoints are asked",
    ]


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


def test_a_restart_waits_for_its_back_off_and_a_stop_ends_that(
    server: Server, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[float] = []
    said: list[str] = []

    def stopped_while_waiting(seconds: float) -> bool:
        waits.append(seconds)
        return True

    monkeypatch.setattr(BackOff, "next", lambda self: 7.5)
    monkeypatch.setattr(server._stopping, "wait", stopped_while_waiting)
    monkeypatch.setattr(server, "_say", said.append)
    server._restart(server._problems())
    assert waits == [7.5] and parts.events == []
    assert said == [
        "the engine was ended: restarting it in 7.5 s",
        "Triton was ended: restarting it in 7.5 s",
    ]


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


def test_an_engine_that_is_seen_to_have_died_a_little_later(
    server: Server, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is started beside the Triton that loads already, which starts once."""
    parts.engine_problem = ""

    def find_out() -> None:
        if "engine starts" not in parts.events:
            parts.engine_problem = "the engine was ended"
            raise Died("the engine was ended by SIGKILL at start")
        parts.events.append("Triton is there")

    monkeypatch.setattr(server, "_await_triton", find_out)
    server._restart({"Triton": "Triton was ended by SIGKILL"})
    assert parts.events == [
        "remains go",
        "Triton starts",
        "engine starts",
        "engine is there",
        "Triton is there",
        "endpoints are asked",
    ]
    assert server.wait_ready(0)


def test_what_dies_again_while_it_starts_is_a_failed_restart(
    server: Server, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*_: object) -> None:
        parts.engine_problem = "the engine was ended"
        raise Died("the engine ended with status 1 at start")

    monkeypatch.setattr(server, "_await_engine", die)
    with pytest.raises(Died):
        server._restart(server._problems())
    assert parts.events.count("engine starts") == 1


def test_an_endpoint_is_not_blamed_for_its_engine(server: Server, parts: Parts) -> None:
    """Whose steps take longer than the patience of a probe, with or without progress meanwhile."""
    server._engines = [SimpleNamespace(answers=lambda timeout_s: False)]  # type: ignore[list-item]
    parts.triton_code = None
    server._triton = parts.triton()  # type: ignore[assignment]
    for progressed in (False, True):
        server._look_into_silence("ensemble", SlowToRing(), 3, progressed)  # type: ignore[arg-type]
        assert server._triton_problem() is None


def test_an_endpoint_whose_engine_answers_later_questions_is(server: Server, parts: Parts) -> None:
    server._engines = [SimpleNamespace(answers=lambda timeout_s: True)]  # type: ignore[list-item]
    parts.triton_code = None
    server._triton = parts.triton()  # type: ignore[assignment]
    server._look_into_silence("ensemble", SlowToRing(), 1, False)  # type: ignore[arg-type]
    assert server._triton_problem() == "model ensemble has not answered 1 one-token request(s)"
