"""Moments between Triton and the engine that a real server meets too rarely."""

from __future__ import annotations

import threading
from types import SimpleNamespace

from model_repository.shared.emitter import Emitter, Generation, Reply
from torch_engine.request import GenerationRequest


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
