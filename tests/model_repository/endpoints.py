"""Asks the server the way NVIDIA's clients do: [1, 1] tensors over gRPC, JSON over HTTP."""

from __future__ import annotations

import json
import queue
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tritonclient.grpc as grpcclient
from tritonclient.utils import np_to_triton_dtype

from flightline.supervisor.serve import Server

INT32 = {"max_tokens", "top_k", "end_id", "pad_id", "min_tokens", "beam_width", "num_return_sequences"}
INT32 |= {
    "top_logprobs",
    "stop_token_ids",
    "logit_bias_ids",
    "prompt_vocab_size",
    "input_ids",
    "input_lengths",
    "request_output_len",
    "runtime_top_k",
}
UINT64 = {"seed", "lora_task_id", "prompt_table_extra_id"}
PATIENCE_S = 300.0
"""Only a hang takes longer, on however busy a machine."""


@dataclass(frozen=True)
class Raw:
    """The content of a BYTES tensor [1, 1] as it shall travel, right or wrong."""

    content: bytes


def tensor(name: str, value: Any) -> grpcclient.InferInput:
    """A NumPy array as it is; anything else as [1, n] of the type that the contract gives the name."""
    if isinstance(value, Raw):
        made = grpcclient.InferInput(name, [1, 1], "BYTES")
        made._raw_content = value.content
        return made
    if not isinstance(value, np.ndarray):
        value = array(name, value)
    made = grpcclient.InferInput(name, list(value.shape), np_to_triton_dtype(value.dtype))
    made.set_data_from_numpy(value)
    return made


def array(name: str, value: Any) -> np.ndarray:
    """[1, n] of the type that the contract gives the name."""
    values = value if isinstance(value, list) else [value]
    first = values[0]
    if isinstance(first, str | bytes):
        values = [item.encode() if isinstance(item, str) else item for item in values]
        dtype: type = np.object_
    elif isinstance(first, bool):
        dtype = np.bool_
    elif isinstance(first, float):
        dtype = np.float32
    else:
        dtype = np.uint64 if name in UINT64 else np.int32
    return np.array([values], dtype=dtype)


class GrpcError(Exception):
    """The server's error text."""


@dataclass
class Answer:
    """All responses to one request."""

    responses: list[grpcclient.InferResult] = field(default_factory=list)

    def column(self, name: str) -> list[np.ndarray]:
        arrays = [response.as_numpy(name) for response in self.responses]
        return [array for array in arrays if array is not None]

    @property
    def texts(self) -> list[str]:
        return [array.ravel()[0].decode("utf-8") for array in self.column("text_output")]

    @property
    def text(self) -> str:
        return "".join(self.texts)

    def num_output_tokens(self, model: str) -> int:
        """Of the whole answer: the last count is, but for NVIDIA's models, which count the tokens of a response."""
        counts = [array.item() for array in self.column("num_output_tokens")]
        return counts[-1] if model in ("text_generation", "hf_baseline") else sum(counts)

    def last(self, name: str) -> Any:
        return self.column(name)[-1].ravel()[0].item()


class Call:
    """One gRPC stream with one request on it."""

    def __init__(
        self,
        server: Server,
        model: str,
        inputs: dict[str, Any],
        request_id: str = "",
        outputs: list[str] = (),
    ) -> None:
        self._results: queue.Queue = queue.Queue()
        self._ended = False
        self._client = grpcclient.InferenceServerClient(server.settings.grpc_url)
        self._client.start_stream(lambda result, error: self._results.put(error or result))
        self._client.async_stream_infer(
            model,
            [tensor(name, value) for name, value in inputs.items()],
            request_id=request_id,
            outputs=[grpcclient.InferRequestedOutput(name) for name in outputs] or None,
            enable_empty_final_response=True,
        )

    def next(self) -> grpcclient.InferResult:
        """Raises GrpcError for an error response, AssertionError if nothing comes."""
        try:
            result = self._results.get(timeout=PATIENCE_S)
        except queue.Empty:
            raise AssertionError("the server neither answers nor refuses") from None
        if isinstance(result, Exception):
            self._ended = True
            raise GrpcError(str(result))
        self._ended = result.get_response().parameters["triton_final_response"].bool_param
        return result

    def skip(self) -> None:
        """Drops what has arrived by now. Raises as :meth:`next`."""
        while not self._results.empty():
            self.next()

    def read(self) -> Answer:
        """Reads what is left, up to the final response, and closes."""
        answer = Answer()
        try:
            while not self._ended:
                result = self.next()
                if result.get_response().outputs:
                    answer.responses.append(result)
            return answer
        finally:
            self.close(cancel=False)

    def close(self, cancel: bool = True) -> None:
        """Goes away; ``cancel`` before the end.

        Triton 2.51 never lets go of an ensemble request that was cancelled, not even when all its steps have
        ended: the server then needs its whole exit timeout. ``stop`` and read to the end instead.
        """
        self._client.stop_stream(cancel_requests=cancel)
        self._client.close()


def stop(server: Server, request_id: str) -> Answer:
    """NVIDIA's convention: the same id, ``stop``, and whatever else is required."""
    inputs = {"input_ids": 0, "input_lengths": 1, "request_output_len": 1, "stop": True}
    return Call(server, "tensorrt_llm", inputs, request_id).read()


def ask(server: Server, model: str, prompt: str = "the dog", max_tokens: int = 8, **inputs: Any) -> Answer:
    """One request over gRPC, for what is generated alone: NVIDIA's endpoints would put the prompt before it."""
    asked = {"text_input": prompt, "max_tokens": max_tokens, "exclude_input_in_output": True}
    return Call(server, model, asked | inputs).read()


def in_pieces(server: Server, model: str, pieces: int, **inputs: Any) -> Answer:
    """A streamed answer in at least so many: where the machine is busy, tokens wait and travel together."""
    for _ in range(20):
        answer = ask(server, model, stream=True, **inputs)
        if len(answer.responses) >= pieces:
            return answer
    raise AssertionError(f"{len(answer.responses)} responses and never {pieces}")


@dataclass
class HttpAnswer:
    status: int
    bodies: list[dict]

    @property
    def text(self) -> str:
        return "".join(body["text_output"] for body in self.bodies)

    @property
    def error(self) -> str:
        return self.bodies[-1].get("error", "")


def post(server: Server, model: str, body: dict, stream: bool = False) -> HttpAnswer:
    """``generate`` or ``generate_stream``."""
    verb = "generate_stream" if stream else "generate"
    request = urllib.request.Request(
        f"{server.settings.http_url}/v2/models/{model}/{verb}", data=json.dumps(body).encode()
    )
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
            status, text = response.status, response.read().decode("utf-8")
    except urllib.error.HTTPError as error:
        status, text = error.code, error.read().decode("utf-8")
    lines = [line.removeprefix("data: ") for line in text.splitlines() if line.strip()]
    return HttpAnswer(status, [json.loads(line) for line in lines])


def wait_until(condition: Callable[[], bool], patience_s: float = PATIENCE_S) -> None:
    """Polls; AssertionError if it never becomes true."""
    deadline = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def idle(server: Server) -> bool:
    """The engine holds no request and no KV block."""
    stats = server.engine.stats
    return stats.active_requests == 0 and stats.kv_blocks_used == 0
