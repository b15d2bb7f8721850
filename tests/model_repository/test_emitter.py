"""Moments between Triton and the engine that a real server meets too rarely."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from flightline.model_repository.shared.emitter import Emitter, Generation, Reply
from flightline.torch_engine.core.request import (
    Code,
    FinishReason,
    GenerationRequest,
    RequestError,
    RequestOutput,
)
from flightline.torch_engine.process.threads import STATUS


class SlowEngine:
    """Takes a request only after somebody has asked whether its client is still there."""

    def __init__(self) -> None:
        self.asked = threading.Event()
        self.cancelled: list[object] = []
        self.told = threading.Event()

    def submit(self, request, on_output):
        assert self.asked.wait(30)
        return "handle"

    def cancel(self, handle) -> None:
        self.cancelled.append(handle)
        self.told.set()

    def stop(self, request_id: str) -> None: ...


def test_a_client_that_goes_while_its_request_is_handed_over() -> None:
    """It is cancelled as soon as there is something to cancel, and the emitter lives on."""
    engine = SlowEngine()

    def is_cancelled() -> bool:
        # The check that follows this one has seen the reply marked.
        threading.Timer(0.1, engine.asked.set).start()
        return True

    sender = SimpleNamespace(is_cancelled=is_cancelled, send=lambda *response, flags=0: None)
    error = type("TritonError", (), {"UNAVAILABLE": 1, "__init__": lambda self, *_: None})
    triton = SimpleNamespace(
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1, InferenceResponse=lambda error: None, TritonError=error
    )
    emitter = Emitter(triton, engine, check_period_s=0.01)
    generation = Generation(Reply(sender), GenerationRequest([1], 1), True, lambda output, first: None)
    emitter.start(generation)
    assert engine.told.wait(30) and engine.cancelled == ["handle"]
    assert emitter._thread.is_alive()
    emitter.close()


class Answering:
    """An engine that says one word at once, and the last one when asked to."""

    def __init__(self) -> None:
        self.callbacks: list = []
        self.cancelled: list[int] = []

    def submit(self, request, on_output):
        self.callbacks.append(on_output)
        on_output(RequestOutput(text="first"))
        return len(self.callbacks) - 1

    def cancel(self, handle) -> None:
        self.cancelled.append(handle)

    def stop(self, request_id: str) -> None: ...


class Sender:
    """Collects responses; fails as long as it is told to."""

    def __init__(self, failures: int = 0) -> None:
        self.failures = failures
        self.sent: list[tuple[object, int]] = []
        self.ended = threading.Event()

    def is_cancelled(self) -> bool:
        return False

    def send(self, response: object = None, flags: int = 0) -> None:
        if self.failures:
            self.failures -= 1
            raise RuntimeError("no space left in shared memory")
        self.sent.append((response, flags))
        if flags:
            self.ended.set()


def triton() -> SimpleNamespace:
    codes = {code.value: code.value for code in Code}
    error = type(
        "TritonError", (), {**codes, "__init__": lambda self, message, code: setattr(self, "code", code)}
    )
    return SimpleNamespace(
        TRITONSERVER_RESPONSE_COMPLETE_FINAL=1, InferenceResponse=lambda error: error, TritonError=error
    )


def test_a_response_that_cannot_be_sent_ends_its_own_request() -> None:
    engine, bad, good = Answering(), Sender(failures=3), Sender()
    emitter = Emitter(triton(), engine)
    for sender in (bad, good):
        emitter.start(
            Generation(Reply(sender), GenerationRequest([1], 1), True, lambda output, first: output.text)
        )
    assert bad.ended.wait(30)
    (response, flags), *rest = bad.sent
    assert (response.code, flags, rest) == ("UNAVAILABLE", 1, [])
    assert engine.cancelled == [0]
    for callback in engine.callbacks:
        callback(RequestOutput(text="last", finish_reason=FinishReason.LENGTH))
    assert good.ended.wait(30)
    assert [response for response, _ in good.sent][-1] in ("last", "firstlast")
    assert len(bad.sent) == 1
    emitter.close()


def test_a_rest_is_for_what_is_between_alone() -> None:
    """While the thread rests, beginnings and ends are sent; afterwards what waited goes, in one response."""
    engine, one, other = Answering(), Sender(), Sender()
    ticks: list[None] = []
    emitter = Emitter(triton(), engine, check_period_s=0.01, on_tick=lambda: ticks.append(None))

    def began(sender: Sender) -> None:
        emitter.start(
            Generation(Reply(sender), GenerationRequest([1], 1), True, lambda output, first: output.text)
        )
        wait_for(lambda: sender.sent)

    began(one)
    emitter._rests_until = time.monotonic() + 3600
    for text in ("a", "b"):
        engine.callbacks[0](RequestOutput(text=text))
    began(other)
    engine.callbacks[1](RequestOutput(text="c"))
    engine.callbacks[1](RequestOutput(text="d", finish_reason=FinishReason.LENGTH))
    assert other.ended.wait(30)
    ticks.clear()
    wait_for(lambda: len(ticks) == 3)  # the thread has gone round
    assert [text for text, _ in other.sent] == ["first", "cd"] and [text for text, _ in one.sent] == ["first"]
    with emitter._changed:
        emitter._rests_until = 0.0
        emitter._changed.notify()
    wait_for(lambda: len(one.sent) == 2)
    assert one.sent[1] == ("ab", 0)
    wait_for(lambda: emitter._rests_until > 0.0)
    engine.callbacks[0](RequestOutput(text="e"))  # nobody ends the rest that this one waits for but the clock
    wait_for(lambda: len(one.sent) == 3)
    emitter.close()


def wait_for(holds: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def test_one_of_several_answers_fails_and_the_others_go_on() -> None:
    """Its error says which it was; the final flag comes once, with the last one's end."""
    engine, sender = Answering(), Sender()
    emitter = Emitter(told := triton(), engine)
    told.TritonError.__init__ = lambda self, message, code: setattr(self, "message", message)
    reply = Reply(sender, open_answers=3)
    for request in GenerationRequest([1], 1).siblings(3):
        emitter.start(Generation(reply, request, False, lambda output, first: output.text))
    fault = RequestError(Code.INTERNAL, "no")
    engine.callbacks[1](RequestOutput(finish_reason=FinishReason.ERROR, error=fault))
    engine.callbacks[2](RequestOutput(text=" two", finish_reason=FinishReason.LENGTH))
    engine.callbacks[0](RequestOutput(text=" zero", finish_reason=FinishReason.LENGTH))
    assert sender.ended.wait(30)
    (error, flags), *answers = sender.sent
    assert (error.message, flags) == ("sequence_index 1: no", 0)
    assert answers == [("first two", 0), ("first zero", 1)]
    emitter.close()


HANGS = """
import threading, time
from flightline.model_repository.shared.emitter import Emitter, Generation, Reply
from tests.model_repository.test_emitter import Answering, Sender, triton
from flightline.torch_engine.core.request import GenerationRequest
emitter = Emitter(triton(), Answering())
emitter.start(Generation(Reply(Sender(failures=10**9)), GenerationRequest([1], 1), True, lambda output, first: ""))
time.sleep(60)
"""


def test_where_nothing_can_be_sent_the_process_ends_and_triton_answers() -> None:
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", HANGS],
        capture_output=True,
        text=True,
        check=False,
        cwd=root,
        env={**os.environ, "PYTHONPATH": str(root)},
    )
    assert run.returncode == STATUS
    assert "a response cannot be sent (no space left in shared memory)" in run.stderr


def test_checks_that_fail_do_not_end_the_emitter(capsys: pytest.CaptureFixture[str]) -> None:
    ticks = threading.Semaphore(0)

    def tick() -> None:
        ticks.release()
        raise RuntimeError("metrics")

    emitter = Emitter(triton(), Answering(), check_period_s=0.01, on_tick=tick)
    assert all(ticks.acquire(timeout=30) for _ in range(3))
    sender = Sender()
    emitter.refuse(Reply(sender), RequestError(Code.INVALID_ARG, "no"))
    assert sender.ended.is_set()
    emitter.close()


def test_a_check_that_took_long_delays_the_next_by_half_a_second_at_most() -> None:
    """It may only have been kept from running: a client that goes away is to be noticed within a second."""
    emitter = Emitter(triton(), Answering(), check_period_s=0.1)
    assert emitter._unasked(0.0001) == 0.1
    assert emitter._unasked(0.004) == pytest.approx(0.2)
    assert emitter._unasked(3.0) == 0.5
    emitter.close()


class Held(Sender):
    """Its first send waits, and all senders write down the order in one list."""

    def __init__(self, order: list[str], go: threading.Event | None = None) -> None:
        super().__init__()
        self.order, self.go, self.holds = order, go, threading.Event()

    def send(self, response: object = None, flags: int = 0) -> None:
        if self.go is not None:
            self.holds.set()
            assert self.go.wait(30)
        self.order.append(str(response))
        super().send(response, flags)


def test_beginnings_and_ends_go_before_what_is_between() -> None:
    engine, order, go = Answering(), [], threading.Event()
    engine.submit = lambda request, on_output: engine.callbacks.append(on_output)  # type: ignore[method-assign]
    emitter = Emitter(triton(), engine)

    def start(name: str, sender: Sender) -> Callable[[str, bool], None]:
        def write(output: RequestOutput, first: bool) -> str:
            return f"{name}:{output.text}"

        emitter.start(Generation(Reply(sender), GenerationRequest([1], 1), True, write))
        say = engine.callbacks[-1]
        return lambda text, ends=False: say(
            RequestOutput(text=text, finish_reason=FinishReason.LENGTH if ends else None)
        )

    def wait_for(count: int) -> None:
        deadline = time.monotonic() + 30
        while len(order) < count:
            assert time.monotonic() < deadline, order
            time.sleep(0.001)

    senders = [Held(order) for _ in range(4)]
    early, late, new, both = (start(name, sender) for name, sender in zip("elnb", senders, strict=True))
    for number, say in enumerate((early, late, both)):
        say("1")
        wait_for(number + 1)
    plug = Held(order, go)
    start("p", plug)("1")
    assert plug.holds.wait(30)
    for say in (early, late, both):
        say("2")
    new("1")
    late("3", True)
    both("3", True)
    go.set()
    for sender in (senders[1], senders[3]):
        assert sender.ended.wait(30)
    wait_for(8)
    assert order[3:] == ["p:1", "n:1", "l:23", "b:23", "e:2"], "each ending took what waited for it along"
    emitter.close()
