"""Is the server really serving? Only an answer to a real request proves it: with a dead Python stub
Triton goes on saying that it is healthy."""

from __future__ import annotations

import json
import socket
import threading
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import grpc
from tritonclient.grpc import service_pb2, service_pb2_grpc

from flightline.torch_engine.core.request import GenerationRequest, RequestError, RequestOutput
from flightline.torch_engine.process.client import EngineClient

DEAD_STUB = "is not healthy"
_PATIENCE = 10
"""Times the time of an answer that a question stays open."""


class Verdict(Enum):
    ANSWERED = "answered"
    """With text, or with an error of the model's own, such as a full queue."""
    DEAD = "dead"
    """Nobody listens, or Triton says that the model's process is gone."""
    SILENT = "silent"
    """No answer in time."""


@dataclass(frozen=True)
class Probe:
    verdict: Verdict
    detail: str = ""
    served: bool = False
    """There was text in the answer."""

    @property
    def works(self) -> bool:
        """The model is there: it answers, or says that it has too much to do."""
        return self.served or "queue is full" in self.detail

    @property
    def no_engine(self) -> bool:
        """The model's process has not found the engine (again) yet."""
        return "the engine process" in self.detail


class Port(Protocol):
    """One of Triton's ports."""

    def ready(self) -> bool:
        """Triton has loaded every model."""

    def generate(self, model: str, timeout_s: float) -> Probe:
        """One token from one model."""


class HttpPort:
    def __init__(self, url: str) -> None:
        self._url = url

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self._url}/v2/health/ready", timeout=2) as response:
                return bool(response.status == 200)
        except OSError:
            return False

    def generate(self, model: str, timeout_s: float) -> Probe:
        body = json.dumps({"text_input": "a", "max_tokens": 1, "stop_words": "", "bad_words": ""}).encode()
        request = urllib.request.Request(f"{self._url}/v2/models/{model}/generate", data=body)
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as response:
                answer = json.load(response)
        except urllib.error.HTTPError as error:
            answer = {"error": error.read().decode("utf-8", errors="replace")}
        except TimeoutError as error:
            return Probe(Verdict.SILENT, str(error))
        except (OSError, ValueError) as error:
            return Probe(Verdict.DEAD, str(error))
        return _judge(answer.get("error", ""), served="text_output" in answer)


class GrpcPort:
    """For a server whose HTTP port is off."""

    def __init__(self, url: str) -> None:
        self._url = url

    def ready(self) -> bool:
        with grpc.insecure_channel(self._url) as channel:
            try:
                service = service_pb2_grpc.GRPCInferenceServiceStub(channel)
                return bool(service.ServerReady(service_pb2.ServerReadyRequest(), timeout=2).ready)
            except grpc.RpcError:
                return False

    def generate(self, model: str, timeout_s: float) -> Probe:
        with grpc.insecure_channel(self._url) as channel:
            service = service_pb2_grpc.GRPCInferenceServiceStub(channel)
            try:
                answers = list(service.ModelStreamInfer(iter([_one_token(model)]), timeout=timeout_s))
            except grpc.RpcError as error:
                late = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                return Probe(Verdict.SILENT if late else Verdict.DEAD, error.details() or error.code().name)
        problem = next((answer.error_message for answer in answers if answer.error_message), "")
        names = {output.name for answer in answers for output in answer.infer_response.outputs}
        return _judge(problem, served="text_output" in names)


def _one_token(model: str) -> service_pb2.ModelInferRequest:
    request = service_pb2.ModelInferRequest(model_name=model)
    text = request.inputs.add(name="text_input", datatype="BYTES", shape=[1, 1])
    text.contents.bytes_contents.append(b"a")
    request.inputs.add(name="max_tokens", datatype="INT32", shape=[1, 1]).contents.int_contents.append(1)
    return request


def _judge(problem: str, served: bool) -> Probe:
    return Probe(Verdict.DEAD if DEAD_STUB in problem else Verdict.ANSWERED, problem, served)


def listens(host: str, port: int) -> bool:
    """Whether a connection is not refused."""
    try:
        socket.create_connection((host, port), timeout=1).close()
    except TimeoutError:
        return True  # too busy to say
    except OSError:
        return False
    return True


class EndpointCheck:
    """Asks one model for a token, again and again, and remembers what was not answered in time.

    Of several instances of a model one may be stuck while the others answer. Requests are served in the order in which
    they came, so an answer to a question that was asked long after one that is still open gives it away.
    """

    def __init__(self, port: Port, model: str, timeout_s: float) -> None:
        self._port = port
        self._model = model
        self._timeout_s = timeout_s
        self._open: list[Question] = []
        self._answered = 0.0
        """When the youngest question that was answered had been asked."""

    def ask(self) -> Probe:
        """Waits up to ``timeout_s`` for the answer; a question without one stays open."""
        question = Question(self._port, self._model, _PATIENCE * self._timeout_s)
        answer = question.answer(self._timeout_s)
        if answer is None:
            self._open.append(question)
            return Probe(Verdict.SILENT, f"no answer within {self._timeout_s:.0f} s")
        if answer.verdict is Verdict.ANSWERED:
            self._answered = question.asked
        return answer

    def waits(self) -> bool:
        """Whether a question is open."""
        self._open = [question for question in self._open if question.answer(0.0) is None]
        return bool(self._open)

    def overtaken(self) -> bool:
        """Whether a question is open though one was answered that was asked at least ``timeout_s`` later."""
        return self.waits() and any(
            question.asked + self._timeout_s <= self._answered for question in self._open
        )


class Question:
    """One request to a model, on a thread of its own."""

    def __init__(self, port: Port, model: str, timeout_s: float) -> None:
        self.asked = time.monotonic()
        self._done = threading.Event()
        self._answer: Probe | None = None

        def ask() -> None:
            self._answer = port.generate(model, timeout_s)
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
