"""What one request may cost the others at an endpoint that all share."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from flightline.model_repository.shared import stub
from flightline.model_repository.shared.contract import OURS
from flightline.model_repository.shared.emitter import Emitter
from flightline.model_repository.shared.front import LONG_PROMPT, Front
from flightline.model_repository.shared.responses import details
from flightline.model_repository.shared.tensors import Inputs, Options
from flightline.torch_engine.core.request import (
    Code,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    PerfMetrics,
    RequestError,
    RequestOutput,
)
from tests.model_repository.test_emitter import Answering, Sender, triton

CONFIG = json.dumps({"name": "text_generation", "max_batch_size": 1, "output": []})


class Request:
    """Like Triton's, of which the arrays must not be used when ``execute`` has returned."""

    def __init__(self, sender: Sender, **inputs: np.ndarray) -> None:
        self._sender, self._inputs = sender, inputs

    def get_response_sender(self) -> Sender:
        return self._sender

    def inputs(self) -> list[SimpleNamespace]:
        return [
            SimpleNamespace(name=lambda name=name: name, as_numpy=lambda value=value: value)
            for name, value in self._inputs.items()
        ]

    def parameters(self) -> str:
        return ""

    def request_id(self) -> str:
        return "one"

    def requested_output_names(self) -> list[str]:
        return []

    def spoil(self) -> None:
        for value in self._inputs.values():
            value[:] = 0


class Endpoint:
    """Tokenises as long as it is told to, and counts what it has read."""

    contract = OURS

    def inputs(self, request, lane) -> Inputs:
        return Inputs.of(request, lane, self.contract)

    def __init__(self) -> None:
        self.go_on = threading.Event()

    def read(self, inputs, row, info) -> GenerationRequest:
        if inputs.num_text_bytes > LONG_PROMPT:
            assert self.go_on.wait(30)
        if inputs.max_tokens(row) == 13:
            raise ZeroDivisionError("a fault of ours")
        return GenerationRequest([1], inputs.max_tokens(row))

    def show(self, prompt_ids, output, options, row) -> dict:
        return {}


@pytest.fixture
def front():
    pb_utils = triton()
    pb_utils.InferenceResponse = lambda tensors=None, error=None: error or "text"
    emitter = Emitter(pb_utils, Answering())
    made = Front(pb_utils, Endpoint(), emitter, lambda: ModelInfo(10, 10, (), ""), CONFIG, lane="torch")
    yield made
    made.close()
    emitter.close()


def request(text: bytes, max_tokens: int = 4) -> tuple[Request, Sender]:
    sender = Sender()
    arrays = {"text_input": np.array([[text]], np.object_), "max_tokens": np.array([[max_tokens]], np.int32)}
    return Request(sender, **arrays), sender


def test_a_long_prompt_is_tokenised_aside(front: Front) -> None:
    """The call returns at once, the short request behind it starts, and its arrays may go."""
    engine = front._emitter._engine
    (long, _), (short, _) = request(b"x" * (LONG_PROMPT + 1), 5), request(b"x")
    front.execute([long, short])
    assert len(engine.callbacks) == 1
    long.spoil()
    engine.submit, started = (
        lambda request, on_output: done.append(request) or started.set(),
        threading.Event(),
    )
    done: list[GenerationRequest] = []
    front._endpoint.go_on.set()
    assert started.wait(30)
    assert done[0].max_tokens == 5 and done[0].request_id == "text_generation/one"


@pytest.mark.parametrize("text", [b"x", b"x" * (LONG_PROMPT + 1)])
def test_whatever_fails_is_that_requests_answer(front: Front, text: bytes) -> None:
    front._endpoint.go_on.set()
    bad, answer = request(text, max_tokens=13)
    front.execute([bad])
    assert answer.ended.wait(30)
    assert answer.sent[0][0].code == Code.INTERNAL.value
    front._info = lambda: (_ for _ in ()).throw(RequestError(Code.UNAVAILABLE, "no engine"))
    late, answer = request(text)
    front.execute([late])
    assert answer.ended.wait(30)
    assert answer.sent[0][0].code == Code.UNAVAILABLE.value


def test_details_of_an_answer() -> None:
    """Guesses as they were counted; fewer likely tokens than asked for leave places empty."""
    answer = RequestOutput(
        token_ids=[5, 6],
        top_log_probs=[[(5, -0.5), (7, -1.5)], []],
        finish_reason=FinishReason.STOP,
        sequence_index=2,
        metrics=PerfMetrics(total_draft_tokens=4, total_accepted_draft_tokens=3),
    )
    wanted = Options(perf_metrics=True, token_ids=True, top_log_probs=2, finish_reason=True, num_sequences=3)
    made = {name: make().tolist() for name, make in details(answer, wanted, 0, 2).items()}
    assert made["total_draft_tokens"] == [[4]] and made["total_accepted_draft_tokens"] == [[3]]
    assert made["acceptance_rate"] == [[0.75]] and made["sequence_index"] == [[2]]
    assert made["token_ids"] == [[5, 6]] and made["finish_reason"] == [[b"stop_words"]]
    assert made["top_token_ids"] == [[[5, 7], [-1, -1]]]
    assert made["top_log_probs"] == [[[-0.5, -1.5], [0.0, 0.0]]]
    unasked = details(answer, Options(), 0, 2)
    assert unasked == {}


def test_long_prompts_that_wait_at_the_end_are_answered(front: Front) -> None:
    """More than are tokenised at once, so that some have not begun when the model is closed."""
    requests, answers = zip(*(request(b"x" * (LONG_PROMPT + 1)) for _ in range(5)), strict=True)
    front.execute(list(requests))
    threading.Timer(0.1, front._endpoint.go_on.set).start()
    front.close()
    front._emitter.close()
    assert all(answer.ended.wait(5) for answer in answers)
    assert {answer.sent[-1][0].code for answer in answers} == {Code.UNAVAILABLE.value}


def test_a_model_closes_its_front_first() -> None:
    model, closed = stub.Served(), []
    for part in ("_metrics", "_engine", "_emitter", "_front"):
        setattr(model, part, SimpleNamespace(close=lambda part=part: closed.append(part)))
    model.finalize()
    assert closed == ["_front", "_emitter", "_engine", "_metrics"]
