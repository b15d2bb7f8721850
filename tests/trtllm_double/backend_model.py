"""A stand-in for NVIDIA's C++ backend, as the Python model of ``tensorrt_llm``: its tensors, its checks, its habits.

Where it differs from our own model is on purpose: one response a token, one end token, stop words stay in the output,
and a wrong parameter refuses to load in the backend's own words.
"""

from __future__ import annotations

import json
import os
import threading
import time
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from flightline.model_repository.shared import words
from flightline.model_repository.shared.responses import ResponseWriter
from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.request import (
    FinishReason,
    GenerationRequest,
    PerfMetrics,
    RequestOutput,
    SamplingParams,
)
from flightline.torch_engine.engine import Engine

MODEL_DIR = "TRTLLM_DOUBLE_MODEL"
LOG = "TRTLLM_DOUBLE_LOG"
"""Environment: a file that gets a line of JSON for each request, its tensors by name."""
FINAL = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL
CLOCK_NS = 10**15
"""What the backend's clock is ahead of this process's: its times are right only among themselves."""
TIMES = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")


@dataclass(eq=False)
class Request:
    """One Triton request, its tensors read the way the backend reads them."""

    id: str
    inputs: dict[str, np.ndarray]
    sender: Any
    wanted: list[str]
    ids: list[int] = field(default_factory=list)

    def scalar(self, name: str, default: Any) -> Any:
        return self.inputs[name].ravel()[0].item() if name in self.inputs else default

    def words(self, name: str) -> list[list[int]]:
        return words.unpack(self.inputs[name][0]) if name in self.inputs else []

    @property
    def prompt(self) -> list[int]:
        return self.inputs["input_ids"].ravel()[: self.scalar("input_lengths", 0)].tolist()

    def stopped(self) -> bool:
        return any(self.ids[-len(word) :] == word for word in self.words("stop_words_list"))

    def generation(self) -> GenerationRequest:
        return GenerationRequest(
            prompt_ids=self.prompt,
            max_tokens=self.scalar("request_output_len", 0),
            sampling=SamplingParams(
                temperature=self.scalar("temperature", 1.0),
                top_k=self.scalar("runtime_top_k", None),
                top_p=self.scalar("runtime_top_p", None),
                seed=self.scalar("seed", None),
            ),
            end_id=self.scalar("end_id", -1),
            bad_ids=tuple(tuple(word) for word in self.words("bad_words_list")),
            min_tokens=self.scalar("min_tokens", 0),
            return_log_probs=True,
        )


class TritonPythonModel:
    def initialize(self, args: dict[str, str]) -> None:
        config = json.loads(args["model_config"])
        values = {name: each["string_value"] for name, each in config["parameters"].items()}
        for name in ("tokenizer_dir", "xgrammar_tokenizer_info_path", "guided_decoding_backend"):
            if name not in values:
                raise RuntimeError(f"Cannot find parameter with name: {name}")
        if values.get("gpt_model_type") not in ("V1", "inflight_batching", "inflight_fused_batching"):
            raise ValueError("Invalid gpt_model_type. Must be v1/inflight_batching/inflight_fused_batching.")
        if not values.get("gpt_model_path"):
            raise ValueError("Both encoder and decoder model paths are empty")
        assert os.path.isfile(os.path.join(values["gpt_model_path"], "rank0.engine"))
        self._decoupled = config["model_transaction_policy"]["decoupled"]
        self._writer = ResponseWriter(pb_utils, args["model_config"])
        model = os.environ[MODEL_DIR]
        self._engine = Engine(
            EngineConfig(model_dir=model, num_threads=1, max_seq_len=512, num_kv_blocks=512)
        )
        self._running: set[Request] = set()
        self._arrived: list[Request] = []
        self._changed = threading.Condition()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def execute(self, requests: list) -> None:
        with self._changed:
            for each in requests:
                inputs = {tensor.name(): tensor.as_numpy() for tensor in each.inputs()}
                _log(inputs)
                names, sender = each.requested_output_names(), each.get_response_sender()
                self._arrived.append(Request(each.request_id(), inputs, sender, names))
            self._changed.notify()

    def finalize(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(timeout=5)

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._arrived or self._closed or self._engine.busy)
                arrived, self._arrived = self._arrived, []
                if self._closed:
                    return
            for request in arrived:
                self._stop(request) if request.scalar("stop", False) else self._start(request)
            for request, output in self._engine.step() if self._engine.busy else []:
                self._answer(request, output)

    def _start(self, request: Request) -> None:
        self._running.add(request)
        self._engine.add(request, request.generation(), time.monotonic_ns())

    def _stop(self, order: Request) -> None:
        if not order.id:
            error = pb_utils.TritonError("Trying to stop a request but request ID is not provided")
            return order.sender.send(pb_utils.InferenceResponse(error=error), flags=FINAL)
        for request in [each for each in self._running if each.id == order.id]:
            output = self._engine.cancel(request) or RequestOutput(finish_reason=FinishReason.CANCELLED)
            self._answer(request, output)
        # One that is not decoupled owes each request a response.
        order.sender.send(*(() if self._decoupled else (pb_utils.InferenceResponse([]),)), flags=FINAL)

    def _answer(self, request: Request, output: RequestOutput) -> None:
        if request not in self._running:
            return
        ended = output.finish_reason is not None
        fresh = []
        for token, log_prob in zip(output.token_ids, output.log_probs, strict=True):
            request.ids.append(token)
            fresh.append(([token], [log_prob]))
            if request.stopped():
                ended = True
                self._engine.cancel(request)
                break
        if ended:
            self._running.discard(request)
        if not request.scalar("streaming", False):
            prompt = [] if request.scalar("exclude_input_in_output", False) else request.prompt
            fresh = [(prompt + request.ids, [0.0] * len(request.ids))] if ended else []
        elif ended and not fresh:
            fresh = [([], [])]
        for place, (ids, log_probs) in enumerate(fresh):
            last = ended and place == len(fresh) - 1
            metrics = output.metrics if last and request.scalar("return_perf_metrics", False) else None
            response = self._response(request, ids, log_probs, metrics)
            request.sender.send(response, flags=FINAL if last else 0)

    def _response(
        self, request: Request, ids: list[int], log_probs: list[float], metrics: PerfMetrics | None
    ) -> Any:
        made = {
            "output_ids": lambda: np.array(ids, np.int32).reshape(1, 1, -1),
            "sequence_length": lambda: np.array([[len(ids)]], np.int32),
            "output_log_probs": lambda: np.array(log_probs, np.float32).reshape(1, 1, -1),
        }
        if metrics:
            times = {name: np.array([[getattr(metrics, name) + CLOCK_NS]], np.int64) for name in TIMES}
            made |= {name: partial(times.get, name) for name in TIMES}
        return self._writer.write(request.wanted, made)


def _log(inputs: dict[str, np.ndarray]) -> None:
    if LOG in os.environ:
        values = {name: value.tolist() for name, value in inputs.items()}
        with open(os.environ[LOG], "a", encoding="utf-8") as file:
            file.write(json.dumps(values, default=bytes.decode) + "\n")
