"""Requests and responses as protobuf messages of Triton's gRPC service (KServe v2).

One ``ModelStreamInfer`` call carries one request: the service is bidirectional, but a client that writes
once and reads to the end may call it as unary-stream; the bytes are the same and any number of calls
share a channel.
"""

from __future__ import annotations

import os
import re
import struct
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

from flightline.client.errors import InvalidRequest, from_stream_error
from flightline.client.params import DECLARED, GenerateParams
from flightline.client.results import Chunk, PerfMetrics, TopLogProbs

TEXT_GENERATION = "text_generation"
ENSEMBLE = "ensemble"
HF_BASELINE = "hf_baseline"
ENDPOINTS = (TEXT_GENERATION, ENSEMBLE, HF_BASELINE)
COUNTS_EACH_RESPONSE = (ENSEMBLE,)
"""Endpoints whose ``num_output_tokens`` is of one response, as NVIDIA's is; that of the others is of all so far."""

STREAM_INFER = "/inference.GRPCInferenceService/ModelStreamInfer"
CHANNEL_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
PERF_FIELDS = tuple(PerfMetrics.__dataclass_fields__)
REQUIRED_PERF_FIELDS = PERF_FIELDS[:4]
OUTPUTS_OF = {
    "return_log_probs": ("output_log_probs", "cum_log_probs"),
    "return_num_input_tokens": ("num_input_tokens",),
    "return_num_output_tokens": ("num_output_tokens",),
    "return_perf_metrics": PERF_FIELDS,
}
_SEQUENCE_ERROR = re.compile(r"sequence_index (\d+): ")


def default_url() -> str:
    """The gRPC port of the server on this machine: ``FLIGHTLINE_GRPC_PORT``, ``GRPC_PORT`` or 8001."""
    return f"127.0.0.1:{variable('GRPC_PORT') or 8001}"


def variable(name: str) -> str:
    """A setting from the environment, with or without its prefix, as :mod:`flightline.settings` reads it."""
    return os.environ.get(f"FLIGHTLINE_{name}") or os.environ.get(name) or ""


def infer_request(
    model: str, request_id: str, prompt: str, params: GenerateParams, *, stream: bool
) -> service_pb2.ModelInferRequest:
    """The request message; every tensor has a batch dimension of 1 in front.

    Raises:
        InvalidRequest: the prompt is not a string that UTF-8 can encode.
    """
    request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
    _add_tensor(request, "text_input", "BYTES", [prompt])
    for name, value in params.tensors().items():
        values = list(value) if isinstance(value, list | tuple) else [value]
        _add_tensor(request, name, DECLARED[name].wire_type, values)
    _add_tensor(request, "stream", "BOOL", [stream])
    return request


def stop_request(request_id: str) -> service_pb2.ModelInferRequest:
    """Tells the ``tensorrt_llm`` behind an ensemble to stop a request: NVIDIA's own convention.

    An ensemble never hears that its client has gone, but forwards the request id.
    """
    request = service_pb2.ModelInferRequest(model_name="tensorrt_llm", id=request_id)
    _add_tensor(request, "input_ids", "INT32", [0])
    _add_tensor(request, "input_lengths", "INT32", [1])
    _add_tensor(request, "request_output_len", "INT32", [1])
    _add_tensor(request, "stop", "BOOL", [True])
    return request


def _add_tensor(request: service_pb2.ModelInferRequest, name: str, datatype: str, values: list[Any]) -> None:
    tensor = request.inputs.add(name=name, datatype=datatype)
    tensor.shape.extend([1, len(values)])
    if datatype == "BYTES":
        try:
            encoded = [value.encode() for value in values]
        except (AttributeError, UnicodeEncodeError) as error:
            raise InvalidRequest(f"{name} is not text: {error}") from None
        raw = serialize_byte_tensor(np.array(encoded, dtype=np.object_)).item()
    else:
        raw = np.array(values, dtype=triton_to_np_dtype(datatype)).tobytes()
    request.raw_input_contents.append(raw)


def parse_response(
    message: service_pb2.ModelStreamInferResponse, params: GenerateParams | None = None
) -> Chunk | None:
    """The chunk in a stream's message, or None for the empty message that only ends the stream.

    An ensemble fills outputs that nobody asked for with zeros: what ``params`` does not ask for is left out.

    Raises:
        ClientError: the message is an error, of more than one of several answers.
    """
    if message.error_message:
        return _failure(message.error_message)
    response = message.infer_response
    if not response.outputs:
        return None
    outputs = _outputs(response)
    for option, names in OUTPUTS_OF.items():
        if params is not None and not getattr(params, option):
            for name in names:
                outputs.pop(name, None)
    return Chunk(
        text="".join(word.decode("utf-8", errors="replace") for word in outputs.get("text_output", ())),
        num_input_tokens=_scalar(outputs, "num_input_tokens", int),
        num_output_tokens=_scalar(outputs, "num_output_tokens", int),
        log_probs=[float(value) for value in outputs.get("output_log_probs", ())],
        cum_log_prob=_scalar(outputs, "cum_log_probs", float),
        perf_metrics=_perf_metrics(outputs),
        token_ids=[int(token) for token in outputs.get("token_ids", ())],
        top_log_probs=_top_log_probs(outputs, params),
        prompt_log_probs=[float(value) for value in outputs.get("prompt_log_probs", ())],
        prompt_top_log_probs=_top_log_probs(outputs, params, "prompt_"),
        finish_reason=_finish_reason(outputs),
        sequence_index=_scalar(outputs, "sequence_index", int) or 0,
    )


@dataclass
class Reader:
    """Reads the messages of one stream; what its chunks count, they count from the beginning, at any endpoint."""

    model: str
    params: GenerateParams
    stream: bool
    """Whether the request asked for a stream."""
    _num_output_tokens: Counter[int] = field(default_factory=Counter, init=False)
    """Of each answer."""

    def chunk(self, message: service_pb2.ModelStreamInferResponse) -> Chunk | None:
        """As ``parse_response``."""
        chunk = parse_response(message, self.params)
        if chunk is None or chunk.num_output_tokens is None or self.model not in COUNTS_EACH_RESPONSE:
            return chunk
        count = chunk.num_output_tokens
        if not self.stream and not self.params.exclude_input_in_output:  # the prompt's tokens are among them
            if chunk.num_input_tokens is None:
                return replace(chunk, num_output_tokens=None)
            count -= chunk.num_input_tokens
        self._num_output_tokens[chunk.sequence_index] += count
        return replace(chunk, num_output_tokens=self._num_output_tokens[chunk.sequence_index])


def _failure(text: str) -> Chunk:
    """One of several answers has failed; raises where the whole request has."""
    error = from_stream_error(text)
    if (found := _SEQUENCE_ERROR.match(text)) is None:
        raise error
    return Chunk("", sequence_index=int(found[1]), error=error)


def _finish_reason(outputs: dict[str, Any]) -> str | None:
    values = outputs.get("finish_reason", ())
    return values[0].decode() if len(values) else None


def _top_log_probs(outputs: dict[str, Any], params: GenerateParams | None, of: str = "") -> list[TopLogProbs]:
    count = (params and params.top_logprobs) or 0
    if not count or f"{of}top_token_ids" not in outputs:
        return []
    ids = outputs[f"{of}top_token_ids"].reshape(-1, count).tolist()
    log_probs = outputs[f"{of}top_log_probs"].reshape(-1, count).tolist()
    return [
        [(token, value) for token, value in zip(*place, strict=True) if token >= 0]
        for place in zip(ids, log_probs, strict=True)
    ]


def _outputs(response: service_pb2.ModelInferResponse) -> dict[str, Any]:
    """Tensor name -> flat sequence of its values."""
    values: dict[str, Any] = {}
    for tensor, raw in zip(response.outputs, response.raw_output_contents, strict=False):
        if tensor.datatype == "BYTES":
            values[tensor.name] = strings(raw)
        else:
            values[tensor.name] = np.frombuffer(raw, dtype=triton_to_np_dtype(tensor.datatype))
    return values


def strings(raw: bytes) -> list[bytes]:
    """The values of a BYTES tensor."""
    if len(raw) >= 4 and struct.unpack_from("<I", raw)[0] == len(raw) - 4:  # the usual case: exactly one
        return [raw[4:]]
    return list(deserialize_bytes_tensor(raw))


def _scalar(outputs: dict[str, Any], name: str, kind: type) -> Any:
    values = outputs.get(name, ())
    return kind(values[0]) if len(values) else None


def _perf_metrics(outputs: dict[str, Any]) -> PerfMetrics | None:
    values = {name: _scalar(outputs, name, int) for name in PERF_FIELDS}
    if any(not values[name] for name in REQUIRED_PERF_FIELDS):
        return None
    return PerfMetrics(**values)
