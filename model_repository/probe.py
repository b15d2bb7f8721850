"""Is the server really serving? Only an answer to a real request proves it: with a dead Python stub
Triton goes on saying that it is healthy."""

from __future__ import annotations

import json
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from enum import Enum

from torch_engine.client import EngineClient
from torch_engine.request import GenerationRequest, RequestError, RequestOutput

DEAD_STUB = "is not healthy"
_PATIENCE = 10
"""Times the time of an answer that a question stays open."""


class Verdict(Enum):
    ANSWERED = "answered"
    """With text, or with an error of the model's own, such as a full queue."""
    DEAD = "dead"
    """Triton says that the model's process is gone."""
    SILENT = "silent"
    """No answer in time."""


@dataclass(frozen=True)
class Probe:
    verdict: Verdict
    detail: str = ""
    served: bool = False
    """There was text in the answer."""


def ready(http_url: str) -> bool:
    """Triton has loaded every model."""
    try:
        with urllib.request.urlopen(f"{http_url}/v2/health/ready", timeout=2) as response:
            return response.status == 200
    except OSError:
        return False


def generate(http_url: str, model: str, timeout_s: float) -> Probe:
    """One token from one model over HTTP."""
    body = json.dumps({"text_input": "a", "max_tokens": 1, "stop_words": "", "bad_words": ""}).encode()
    request = urllib.request.Request(f"{http_url}/v2/models/{model}/generate", data=body)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            answer = json.load(response)
    except urllib.error.HTTPError as error:
        answer = {"error": error.read().decode("utf-8", errors="replace")}
    except (OSError, ValueError) as error:
        return Probe(Verdict.SILENT, str(error))
    problem = answer.get("error", "")
    if DEAD_STUB in problem:
        return Probe(Verdict.DEAD, problem)
    return Probe(Verdict.ANSWERED, problem, served="text_output" in answer)


class Doorbell:
    """Asks one model for a token, again and again, and remembers what was not answered in time.

    Of several instances of a model one may be stuck while the others answer. Requests are served in the order in which
    they came, so an answer to a question that was asked long after one that is still open gives it away.
    """

    def __init__(self, http_url: str, model: str, timeout_s: float) -> None:
        self._url = http_url
        self._model = model
        self._timeout_s = timeout_s
        self._open: list[_Question] = []
        self._answered = 0.0
        """When the youngest question that was answered had been asked."""

    def ring(self) -> Probe:
        """Waits up to ``timeout_s`` for the answer; a question without one stays open."""
        question = _Question(self._url, self._model, _PATIENCE * self._timeout_s)
        answer = question.answer(self._timeout_s)
        if answer is None:
            self._open.append(question)
            return Probe(Verdict.SILENT, f"no answer within {self._timeout_s:.0f} s")
        if answer.verdict is Verdict.ANSWERED:
            self._answered = question.asked
        return answer

    def overtaken(self) -> bool:
        """Whether a question is open though one was answered that was asked at least ``timeout_s`` later."""
        self._open = [question for question in self._open if question.answer(0.0) is None]
        return any(question.asked + self._timeout_s <= self._answered for question in self._open)


class _Question:
    """One request to a model, on a thread of its own."""

    def __init__(self, http_url: str, model: str, timeout_s: float) -> None:
        self.asked = time.monotonic()
        self._done = threading.Event()
        self._answer: Probe | None = None

        def ask() -> None:
            self._answer = generate(http_url, model, timeout_s)
            self._done.set()

        threading.Thread(target=ask, name=f"probe-{model}", daemon=True).start()

    def answer(self, timeout_s: float) -> Probe | None:
        """None if there is none in that time."""
        self._done.wait(timeout_s)
        return self._answer


def engine_answers(engine: EngineClient, timeout_s: float) -> bool:
    """One token from the engine itself, past Triton."""
    done = threading.Event()

    def on_output(output: RequestOutput) -> None:
        if output.finish_reason is not None:
            done.set()

    try:
        engine.submit(GenerationRequest(prompt_ids=[0], max_tokens=1), on_output)
    except RequestError:
        return False
    return done.wait(timeout_s)
