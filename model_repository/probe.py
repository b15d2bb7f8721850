"""Is the server really serving? Only an answer to a real request proves it: with a dead Python stub
Triton goes on saying that it is healthy."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request
from dataclasses import dataclass
from enum import Enum

from torch_engine.client import EngineClient
from torch_engine.request import GenerationRequest, RequestError, RequestOutput

DEAD_STUB = "is not healthy"


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
