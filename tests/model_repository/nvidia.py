"""Clients of our own that send the bytes of NVIDIA's two, and read answers as strictly.

``Tokens`` is ``inflight_batcher_llm_client.py``, ``Texts`` is ``end_to_end_grpc_client.py`` (TensorRT-LLM
``triton_backend/inflight_batcher_llm/client``): the same tensors with the same ranks, the same left out, the same
request parameters, the same indices into an answer. Where theirs would crash, these do.
"""

from __future__ import annotations

import queue
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

PERF_METRICS = (
    *("kv_cache_alloc_new_blocks", "kv_cache_reused_blocks", "kv_cache_alloc_total_blocks"),
    *("arrival_time_ns", "first_scheduled_time_ns", "first_token_time_ns", "last_token_time_ns"),
    *("acceptance_rate", "total_accepted_draft_tokens", "total_draft_tokens"),
)
PATIENCE_S = 300.0


def tensors(values: dict[str, np.ndarray]) -> list[grpcclient.InferInput]:
    made = []
    for name, value in values.items():
        made.append(grpcclient.InferInput(name, value.shape, np_to_triton_dtype(value.dtype)))
        made[-1].set_data_from_numpy(value)
    return made


def outputs(names: tuple[str, ...]) -> list[grpcclient.InferRequestedOutput] | None:
    return [grpcclient.InferRequestedOutput(name) for name in names] or None


STOP = {
    "input_ids": np.array([[-77]], np.int32),  # theirs is memory as it comes
    "input_lengths": np.zeros([1, 1], np.int32),
    "request_output_len": np.zeros([1, 1], np.int32),
    "stop": np.ones([1, 1], np.bool_),
}


@dataclass
class Wire:
    """One request, on a stream or as ModelInfer, and all that comes back."""

    url: str
    model: str
    values: dict[str, np.ndarray]
    names: tuple[str, ...] = ()
    request_id: str = ""

    def __post_init__(self) -> None:
        self._heard: queue.Queue = queue.Queue()

    def _hear(self, result: Any, error: Exception | None) -> None:
        self._heard.put(error or result)

    def stream(self, stop_after_s: float | None = None) -> list[grpcclient.InferResult]:
        """Over ModelStreamInfer, without asking for an empty final response. Raises the server's error."""
        with grpcclient.InferenceServerClient(self.url) as client:
            client.start_stream(self._hear)
            client.async_stream_infer(
                self.model, tensors(self.values), outputs=outputs(self.names), request_id=self.request_id
            )
            if stop_after_s is not None:
                time.sleep(stop_after_s)
                client.async_stream_infer(
                    self.model,
                    tensors(STOP),
                    request_id=self.request_id,
                    parameters={"Streaming": True},
                )
            client.stop_stream()  # waits for the server to end it
        return self._results(self._heard.qsize())

    def infer(self, stop_after_s: float | None = None) -> list[grpcclient.InferResult]:
        """Over ModelInfer. Raises the server's error."""
        parameters, count = {"Streaming": False}, 1
        with grpcclient.InferenceServerClient(self.url) as client:
            client.async_infer(
                self.model,
                tensors(self.values),
                self._hear,
                outputs=outputs(self.names),
                request_id=self.request_id,
                parameters=parameters,
            )
            if stop_after_s is not None:
                time.sleep(stop_after_s)
                client.async_infer(
                    self.model, tensors(STOP), self._hear, request_id=self.request_id, parameters=parameters
                )
                count += 1
            return self._results(count)

    def _results(self, count: int) -> list[grpcclient.InferResult]:
        results = [self._heard.get(timeout=PATIENCE_S) for _ in range(count)]
        for result in results:
            if isinstance(result, InferenceServerException):
                raise result
        return results


@dataclass
class Tokens:
    """``inflight_batcher_llm_client.py``."""

    ids: list[int] = field(default_factory=list)
    """Generated, without the prompt."""
    cum_log_probs: Any = None
    output_log_probs: Any = None
    perf_metrics: dict[str, np.ndarray] = field(default_factory=dict)
    counts: list[tuple[int, int]] = field(default_factory=list)
    """Of each response, if asked for: ``num_output_tokens``, and the tokens that it holds."""

    @classmethod
    def ask(
        cls,
        url: str,
        prompt: list[int],
        *,
        decoupled: bool,
        streaming: bool,
        length: int = 16,
        end_id: int = -1,
        exclude: bool = False,
        log_probs: bool = False,
        perf_metrics: bool = False,
        stop_after_s: float | None = None,
        request_id: str = "",
        names: tuple[str, ...] = (),
        **more: np.ndarray,
    ) -> Tokens:
        """``decoupled`` is the server's; theirs speaks ModelStreamInfer to such a one if told to stream."""
        number, flag = np.int32, np.bool_
        values = {
            "input_ids": np.array([prompt], number),
            "input_lengths": np.array([[len(prompt)]], number),
            "request_output_len": np.array([[length]], number),
            "beam_width": np.array([[1]], number),
            "temperature": np.array([[1.0]], np.float32),
            "streaming": np.array([[streaming]], flag),
            "end_id": np.array([[end_id]], number),
            "pad_id": np.array([[2]], number),
            "runtime_top_k": np.array([[1]], number),
            "runtime_top_p": np.array([[0.0]], np.float32),
        }
        asked = {"return_log_probs": log_probs, "return_perf_metrics": perf_metrics}
        asked["exclude_input_in_output"] = exclude
        values |= {name: np.array([[True]], flag) for name, wanted in asked.items() if wanted}
        wire = Wire(url, "tensorrt_llm", values | more, names, request_id)
        results = wire.stream(stop_after_s) if decoupled else wire.infer(stop_after_s)
        read = cls()
        found, length_told = list(prompt) if streaming and not exclude else [], 0
        for result in results:
            if names:
                assert {output.name for output in result.get_response().outputs} == set(names)
            output_ids = result.as_numpy("output_ids")
            if output_ids is None:
                continue  # the answer to a stop request
            if log_probs:
                read.cum_log_probs = result.as_numpy("cum_log_probs")[0]
                read.output_log_probs = result.as_numpy("output_log_probs")[0]
            read.perf_metrics = {name: result.as_numpy(name) for name in PERF_METRICS if perf_metrics}
            if "return_num_output_tokens" in more:
                read.counts.append((result.as_numpy("num_output_tokens")[0][0], len(output_ids[0][0])))
            length_told = result.as_numpy("sequence_length")[0][0]
            if length_told > 0 or not streaming:
                found += list(output_ids[0][0])
        found = found if streaming else found[:length_told]
        read.ids = [int(token) for token in (found if exclude else found[len(prompt) :])]
        return read


@dataclass
class Texts:
    """``end_to_end_grpc_client.py``."""

    texts: list[str]
    """One for each prompt, as it would be printed."""
    perf_metrics: dict[str, Any] = field(default_factory=dict)
    log_probs: list[np.ndarray] = field(default_factory=list)
    responses: int = 0

    @classmethod
    def ask(
        cls,
        url: str,
        model: str,
        prompts: list[str],
        *,
        streaming: bool,
        length: int = 16,
        exclude: bool = False,
        overwrite: bool = False,
        batch: bool = False,
        end_id: int | None = None,
        stop_words: list[str] = (),
        bad_words: list[str] = (),
        log_probs: bool = False,
        perf_metrics: bool = False,
    ) -> Texts:
        rows = [
            {
                "text_input": np.array([[prompt.encode()]], np.object_),
                "max_tokens": np.array([[length]], np.int32),
                "stream": np.array([[streaming]], np.bool_),
                "beam_width": np.array([[1]], np.int32),
                "temperature": np.array([[1.0]], np.float32),
            }
            for prompt in prompts
        ]
        more: dict[str, np.ndarray] = {"exclude_input_in_output": np.array([[exclude]], np.bool_)}
        for name, words in (("stop_words", stop_words), ("bad_words", bad_words)):
            if words:
                more[name] = np.array([words], np.object_)
        if end_id is not None:
            more["end_id"] = np.array([[end_id]], np.int32)
        names: tuple[str, ...] = ("text_output",)
        if log_probs:
            more["return_log_probs"] = np.array([[True]], np.bool_)
            names += ("cum_log_probs", "output_log_probs")
        if batch:
            names += ("batch_index",)
        if perf_metrics:
            more["return_perf_metrics"] = np.array([[True]], np.bool_)
            names += PERF_METRICS
        requests = [row | more for row in rows]
        if batch:
            requests = [{name: np.concatenate([row[name] for row in requests]) for name in requests[0]}]
        read = cls([])
        for request in requests:
            read._add(Wire(url, model, request, names).stream(), len(request["text_input"]), overwrite)
        return read

    def _add(self, results: list[grpcclient.InferResult], rows: int, overwrite: bool) -> None:
        texts = [""] * rows
        for result in results:
            self.responses += 1
            index = result.as_numpy("batch_index")
            row = 0 if index is None else index[0][0]
            text = result.as_numpy("text_output")[0].decode("utf-8")
            texts[row] = text if overwrite else texts[row] + text
            log_probs = result.as_numpy("output_log_probs")
            if log_probs is not None:
                self.log_probs.append(log_probs.ravel())
            if result.as_numpy(PERF_METRICS[0]) is not None:
                self.perf_metrics = {name: result.as_numpy(name)[0][0] for name in PERF_METRICS}
        self.texts += texts
