"""Requests and responses as protobuf messages of Triton's gRPC service (KServe v2).

One ``ModelStreamInfer`` call carries one request: the service is bidirectional, but a client that writes
once and reads to the end may call it as unary-stream; the bytes are the same and any number of calls
share a channel.
"""

from __future__ import annotations

import os
import struct
from typing import Any

import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import deserialize_bytes_tensor, serialize_byte_tensor, triton_to_np_dtype

from client.errors import InvalidRequest, from_stream_error
from client.params import WIRE_TYPES, GenerateParams
from client.results import Chunk, PerfMetrics

TEXT_GENERATION = "text_generation"
ENSEMBLE = "ensemble"
HF_BASELINE = "hf_baseline"
ENDPOINTS = (TEXT_GENERATION, ENSEMBLE, HF_BASELINE)

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


def default_url() -> str:
    """The gRPC port of the server on this machine: ``GRPC_PORT``, or 8001."""
    return f"127.0.0.1:{os.environ.get('GRPC_PORT') or 8001}"


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
        _add_tensor(request, name, WIRE_TYPES[name], values)
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


def _add_tensor(request: service_pb2.ModelInferRequest, name: str, datatype: str, values: list) -> None:
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
        ClientError: the message is an error.
    """
    if message.error_message:
        raise from_stream_error(message.error_message)
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
    )


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
