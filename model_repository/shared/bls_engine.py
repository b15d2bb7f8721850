"""NVIDIA's backend as an engine: requests to the model ``tensorrt_llm`` of the same server.

For ``text_generation`` in backend trtllm-engine. The ensemble decodes each response by itself and so breaks characters
of several tokens; here the tokens go through ``TextStream``, and streamed text is exact.
"""

from __future__ import annotations

import itertools
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

import numpy as np

from flightline.model_repository.shared import words
from flightline.model_repository.shared.generation import Progress
from flightline.torch_engine.core.output import end_ids_of
from flightline.torch_engine.core.request import (
    Code,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    PerfMetrics,
    RequestError,
    RequestOutput,
)
from flightline.torch_engine.text.stream import TokenBytes

_TIMES = ("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns")
_COUNTS = (
    *("kv_cache_alloc_new_blocks", "kv_cache_reused_blocks", "kv_cache_alloc_total_blocks"),
    *("total_draft_tokens", "total_accepted_draft_tokens"),
)


class BlsEngine:
    """As ``EngineClient``; a thread for each request, because Triton's calls block."""

    def __init__(
        self,
        pb_utils: Any,
        info: ModelInfo,
        tokens: TokenBytes,
        model: str = "tensorrt_llm",
        decoupled: bool = True,
    ) -> None:
        """
        Args:
            model: with NVIDIA's backend.
            decoupled: whether it streams; one that does not gives all tokens of an answer at its end.
        """
        self.info = info
        self._model = model
        self._decoupled = decoupled
        self._pb = pb_utils
        self._tokens = tokens
        self._handles = itertools.count(1)
        self._lock = threading.Lock()
        self._running: dict[int, tuple[str, Progress]] = {}

    def submit(self, request: GenerationRequest, on_output: Callable[[RequestOutput], None]) -> int:
        progress = Progress(
            request,
            on_output,
            self._tokens,
            end_ids_of(request, self.info.end_ids),
            PerfMetrics(arrival_time_ns=time.monotonic_ns()),
        )
        handle, request_id = next(self._handles), uuid.uuid4().hex
        with self._lock:
            self._running[handle] = request_id, progress
        threading.Thread(target=self._run, args=(handle, request_id, progress), daemon=True).start()
        return handle

    def cancel(self, handle: int) -> None:
        with self._lock:
            running = self._running.get(handle)
        if running is not None:
            running[1].cancelled = True
            self._stop(running[0])

    def stop(self, request_id: str) -> None:
        """As ``EngineClient.stop``."""
        with self._lock:
            running = list(self._running.items())
        for handle, (_, progress) in running:
            if progress.request.request_id == request_id:
                self.cancel(handle)

    def close(self) -> None:
        with self._lock:
            handles = list(self._running)
        for handle in handles:
            self.cancel(handle)

    def _run(self, handle: int, request_id: str, progress: Progress) -> None:
        try:
            self._read(request_id, progress)
        except Exception as error:  # every request ends in an answer
            progress.fail(RequestError(Code.INTERNAL, f"{self._model}: {error}"))
        finally:
            with self._lock:
                self._running.pop(handle, None)

    def _read(self, request_id: str, progress: Progress) -> None:
        log_probs = progress.request.return_log_probs
        names = ["output_ids", "sequence_length", *_TIMES, *_COUNTS]
        names += ["output_log_probs"] if log_probs else []
        stopped = False
        for response in self._call(request_id, self._inputs(progress.request), names):
            if response.has_error():
                code = Code.CANCELLED if progress.cancelled else Code.UNAVAILABLE
                progress.fail(RequestError(code, response.error().message()))
                continue
            found = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
            if "output_ids" not in found:
                continue  # the empty final response
            self._take(progress, found)
            if progress.finished and not stopped:
                stopped = True
                self._stop(request_id)  # reading on, to the end that follows
        progress.finish(FinishReason.CANCELLED if progress.cancelled else FinishReason.END_ID)

    def _take(self, progress: Progress, found: dict[str, np.ndarray]) -> None:
        """One response: its new tokens, and with the last one the request's times."""
        length = int(found["sequence_length"].ravel()[0])
        ids = found["output_ids"].ravel()[:length].tolist()
        values = found.get("output_log_probs", np.zeros(0)).ravel().tolist()
        # Of the new tokens, or of all so far: the last ones are the new ones' either way.
        values = values[-len(ids) :] if len(values) >= len(ids) else [0.0] * len(ids)
        times = {name: int(found[name].ravel()[0]) for name in (*_TIMES, *_COUNTS) if name in found}
        if times.get("last_token_time_ns"):
            progress.metrics, progress.told_metrics = PerfMetrics(**times), True
        for token, value in zip(ids, values, strict=True):
            progress.take(token, value)

    def _inputs(self, request: GenerationRequest) -> dict[str, np.ndarray]:
        """NVIDIA's tensors; what the request leaves open is left out."""
        sampling = request.sampling
        inputs = {
            "input_ids": np.array([request.prompt_ids], np.int32),
            "input_lengths": _one(len(request.prompt_ids), np.int32),
            "request_output_len": _one(request.max_tokens, np.int32),
            "streaming": _one(self._decoupled, np.bool_),
            "exclude_input_in_output": _one(True, np.bool_),
            "return_perf_metrics": _one(True, np.bool_),
            "temperature": _one(sampling.temperature or 1.0, np.float32),
            "runtime_top_k": _one(1 if sampling.greedy else sampling.top_k or 0, np.int32),
            "repetition_penalty": _one(sampling.repetition_penalty, np.float32),
            "presence_penalty": _one(sampling.presence_penalty, np.float32),
            "frequency_penalty": _one(sampling.frequency_penalty, np.float32),
        }
        if not sampling.greedy and sampling.top_p:
            inputs["runtime_top_p"] = _one(sampling.top_p, np.float32)
        if sampling.seed is not None:
            inputs["seed"] = _one(sampling.seed, np.uint64)
        if request.min_tokens:
            inputs["min_tokens"] = _one(request.min_tokens, np.int32)
        if request.return_log_probs:
            inputs["return_log_probs"] = _one(True, np.bool_)
        if request.bad_ids:
            inputs["bad_words_list"] = words.pack([request.bad_ids])
        if sampling.logit_bias:
            bias = np.zeros((1, self.info.vocab_size), np.float32)
            for token, value in sampling.logit_bias:
                bias[0, token] += value
            inputs["embedding_bias"] = bias
        if request.guide is not None:
            inputs["guided_decoding_guide_type"] = _one(request.guide.type.encode(), np.object_)
            inputs["guided_decoding_guide"] = _one(request.guide.text.encode(), np.object_)
        return inputs | self._ends(request) | dict(request.lane_inputs)

    def _ends(self, request: GenerationRequest) -> dict[str, np.ndarray]:
        """The contract has one end token; a model's others go in as stop words."""
        ends = list(self.info.end_ids) if request.end_id is None else [request.end_id]
        inputs = {"end_id": _one(ends[0] if ends else -1, np.int32)}
        if others := [*ends[1:], *request.stop_ids]:
            inputs["stop_words_list"] = words.pack([[[token] for token in others]])
        return inputs

    def _stop(self, request_id: str) -> None:
        """NVIDIA's convention: the same id with ``stop``."""
        inputs = {"input_lengths": _one(1, np.int32), "request_output_len": _one(1, np.int32)}
        inputs |= {"input_ids": _one(0, np.int32), "stop": _one(True, np.bool_)}
        threading.Thread(
            target=lambda: list(self._call(request_id, inputs, ["output_ids"])), daemon=True
        ).start()

    def _call(self, request_id: str, inputs: dict[str, np.ndarray], names: list[str]) -> Any:
        request = self._pb.InferenceRequest(
            model_name=self._model,
            request_id=request_id,
            requested_output_names=names,
            inputs=[self._pb.Tensor(name, value) for name, value in inputs.items()],
        )
        return request.exec(decoupled=True) if self._decoupled else [request.exec()]


def _one(value: Any, dtype: type) -> np.ndarray:
    return np.array([[value]], dtype=dtype)
