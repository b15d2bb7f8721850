"""A server that speaks the endpoints' protocol and generates nothing, at times that are set exactly.

``python -m flightline.loadtest.null_server --ttft-ms 50 --tpot-ms 10``

What a load generator measures against it must equal what was set; the difference is the generator's own
delay. It answers ``text_generation``, ``ensemble`` and ``hf_baseline`` alike, keeps a log of what it did
when, and with ``serial`` works on one request at a time, like a batch-1 baseline.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import struct
import threading
import time
from collections.abc import AsyncIterator, Collection, Iterable
from dataclasses import dataclass, field

import grpc
import numpy as np
from tritonclient.grpc import service_pb2
from tritonclient.utils import triton_to_np_dtype

from flightline.client import wire
from flightline.loadtest.punctual import punctual_event_loop

Responses = AsyncIterator[bytes]


@dataclass(frozen=True)
class Timing:
    """When tokens come: ``ttft_s`` after the start of the work, then one every ``tpot_s``."""

    ttft_s: float = 0.050
    tpot_s: float = 0.010
    first_chunk_tokens: int = 1
    """Tokens in the first response; every later response has one."""
    serial: bool = False
    """One request at a time; the others wait in the order of their arrival."""
    missing_tokens: int = 0
    """How much shorter an answer is than it should be."""
    outside_s: float = 0.0
    """Before the server's own clock knows of a request: as if it had been on the way for so long."""
    pause_s: float = 0.0
    """The text stands still for so long, once, after half of the tokens."""
    step: bool = False
    """All requests get their tokens at the same moments, ``tpot_s`` apart, as in-flight batching gives them."""


@dataclass
class Served:
    """The log of one request; times are ``time.time_ns()``, as Triton's are, where nothing else is said."""

    id: str
    model: str
    inputs: dict
    arrival_ns: int
    first_scheduled_ns: int = 0
    token_times_ns: list[int] = field(default_factory=list)
    token_monotonic_ns: list[int] = field(default_factory=list)
    """The same by the clock of a load generator's records, which nobody sets."""
    outcome: str = "running"
    """``running``, ``complete``, ``cancelled`` or ``stopped`` (by a stop request)."""

    def note_token(self) -> None:
        self.token_times_ns.append(time.time_ns())
        self.token_monotonic_ns.append(time.monotonic_ns())


class NullService:
    """The methods of ``inference.GRPCInferenceService`` that a load generator calls."""

    def __init__(self, timing: Timing, models: Collection[str]) -> None:
        self.timing = timing
        self.models = models
        self.log: list[Served] = []
        self._turn = asyncio.Lock()
        self.stop_requests: list[str] = []

    async def ServerLive(self, request, context):
        return service_pb2.ServerLiveResponse(live=True)

    async def ServerReady(self, request, context):
        return service_pb2.ServerReadyResponse(ready=True)

    async def ModelReady(self, request, context):
        return service_pb2.ModelReadyResponse(ready=request.name in self.models)

    async def ModelStreamInfer(self, requests, context) -> Responses:
        async for request in requests:
            inputs = read_inputs(request)
            if request.model_name == "tensorrt_llm" and inputs.get("stop"):
                self.stop_requests.append(request.id)
                yield _response(request, final=True).SerializeToString()
            elif error := _refusal(request, inputs):
                yield service_pb2.ModelStreamInferResponse(error_message=error).SerializeToString()
            else:
                if self.timing.outside_s:
                    await asyncio.sleep(self.timing.outside_s)
                async for response in self._generate(request, inputs):
                    yield response

    async def _generate(self, request, inputs) -> Responses:
        served = Served(request.id, request.model_name, inputs, time.time_ns())
        self.log.append(served)
        try:
            if self.timing.serial:
                async with self._turn:
                    async for response in self._tokens(request, served):
                        yield response
            else:
                async for response in self._tokens(request, served):
                    yield response
        finally:
            if served.outcome == "running":
                served.outcome = "cancelled"

    async def _tokens(self, request, served: Served) -> Responses:
        """Emits on an absolute schedule, so that no delay adds up."""
        start, total = time.perf_counter(), served.inputs["max_tokens"] - self.timing.missing_tokens
        served.first_scheduled_ns = time.time_ns()
        first = min(self.timing.first_chunk_tokens, total)
        writer, words = ResponseWriter(request, served), []
        for count in range(first, total + 1):
            due = start + self.timing.ttft_s + (count - first) * self.timing.tpot_s
            if count > (first + total) // 2:
                due += self.timing.pause_s
            if self.timing.step:
                due = math.ceil(due / self.timing.tpot_s) * self.timing.tpot_s
            await asyncio.sleep(max(0.0, due - time.perf_counter()))
            if request.id in self.stop_requests:
                served.outcome = "stopped"
                return
            served.note_token()
            words.append(" word" * (first if count == first else 1))
            if served.inputs.get("stream"):
                yield writer.write(words.pop(), count, final=count == total)
        if words:
            yield writer.write("".join(words), total, final=True)
        served.outcome = "complete"


def read_inputs(request: service_pb2.ModelInferRequest) -> dict:
    """Tensor name -> value; a list for words and token ids."""
    values: dict = {}
    for tensor, raw in zip(request.inputs, request.raw_input_contents, strict=True):
        if tensor.datatype == "BYTES":
            words = [word.decode() for word in wire.strings(raw)]
            values[tensor.name] = words if tensor.name.endswith("_words") else words[0]
        elif tensor.datatype == "INT32" and tensor.name.endswith("_ids"):
            values[tensor.name] = np.frombuffer(raw, np.int32).tolist()
        else:
            values[tensor.name] = np.frombuffer(raw, triton_to_np_dtype(tensor.datatype))[0].item()
    return values


def _refusal(request: service_pb2.ModelInferRequest, inputs: dict) -> str | None:
    if request.model_name not in wire.ENDPOINTS:
        return f"Request for unknown model: '{request.model_name}' is not found"
    if inputs.get("max_tokens", 0) < 1:
        return f"max_tokens is {inputs.get('max_tokens')}: it must be at least 1"
    return None


def _handlers(service: NullService) -> grpc.GenericRpcHandler:
    def unary(name: str) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(
            getattr(service, name),
            request_deserializer=getattr(service_pb2, f"{name}Request").FromString,
            response_serializer=getattr(service_pb2, f"{name}Response").SerializeToString,
        )

    methods = {name: unary(name) for name in ("ServerLive", "ServerReady", "ModelReady")}
    methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(
        service.ModelStreamInfer, request_deserializer=service_pb2.ModelInferRequest.FromString
    )
    return grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods)


def _response(request, *, final: bool) -> service_pb2.ModelStreamInferResponse:
    message = service_pb2.ModelStreamInferResponse()
    response = message.infer_response
    response.model_name, response.id = request.model_name, request.id
    response.parameters["triton_final_response"].bool_param = final
    return message


REASON = b"length"
OUTPUTS = (("text_output", "BYTES"), ("num_input_tokens", "INT32"), ("num_output_tokens", "INT32"))


class ResponseWriter:
    """Responses of one request as bytes, its times in the last one; all of its messages but the values are made once.

    A null server that is busy making messages would measure itself.
    """

    def __init__(self, request, served: Served) -> None:
        self._served = served
        self._message = _response(request, final=False)
        self._name(OUTPUTS)
        inputs = served.inputs
        prompt = inputs["input_ids"] if "input_ids" in inputs else inputs["text_input"].split()
        self._input_tokens = struct.pack("<i", len(prompt))
        self._each = request.model_name in wire.COUNTS_EACH_RESPONSE
        self._before = 0

    def write(self, text: str, count: int, *, final: bool) -> bytes:
        """``count``: tokens so far."""
        word = text.encode()
        if self._each:
            self._before, count = count, count - self._before
        values = [struct.pack("<I", len(word)) + word, self._input_tokens, struct.pack("<i", count)]
        response = self._message.infer_response
        if final:
            served = self._served
            values += [
                struct.pack("<q", at)
                for at in (
                    served.arrival_ns,
                    served.first_scheduled_ns,
                    served.token_times_ns[0],
                    served.token_times_ns[-1],
                )
            ]
            self._name((name, "INT64") for name in wire.REQUIRED_PERF_FIELDS)
            if served.inputs.get("return_finish_reason"):
                values.append(struct.pack("<I", len(REASON)) + REASON)
                self._name([("finish_reason", "BYTES")])
            response.parameters["triton_final_response"].bool_param = True
        del response.raw_output_contents[:]
        response.raw_output_contents.extend(values)
        return self._message.SerializeToString()

    def _name(self, outputs: Iterable[tuple[str, str]]) -> None:
        for name, datatype in outputs:
            self._message.infer_response.outputs.add(name=name, datatype=datatype).shape.extend([1, 1])


class NullServer:
    """The service on its own thread: ``with NullServer(Timing()) as server: Client(server.url)``."""

    def __init__(
        self, timing: Timing | None = None, port: int = 0, models: Collection[str] = wire.ENDPOINTS
    ) -> None:
        self._timing = timing or Timing()
        self._port = port
        self._models = models
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> NullServer:
        """Raises OSError if the port is taken."""
        self._thread.start()
        self._ready.wait()
        if not self._port:
            raise OSError("the null server's port is taken: choose another with --port")
        return self

    __enter__ = start

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Ends the server, if it still runs; calls in flight are cut off."""
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._done.set)
        self._thread.join()

    @property
    def url(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def stop_requests(self) -> list[str]:
        """Ids of the requests that a stop request named."""
        return self._service.stop_requests

    @property
    def log(self) -> list[Served]:
        return self._service.log

    def _run(self) -> None:
        with asyncio.Runner(loop_factory=punctual_event_loop) as runner:
            runner.run(self._serve())

    async def _serve(self) -> None:
        self._loop, self._done = asyncio.get_running_loop(), asyncio.Event()
        self._service = NullService(self._timing, self._models)
        server = grpc.aio.server(options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers([_handlers(self._service)])
        try:
            self._port = server.add_insecure_port(f"127.0.0.1:{self._port}")
        except RuntimeError:
            self._port = 0
        else:
            await server.start()
        self._ready.set()
        if self._port:
            await self._done.wait()
            await server.stop(grace=None)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m flightline.loadtest.null_server", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--port", type=int, default=8001, help="0: any that is free")
    parser.add_argument("--ttft-ms", type=float, default=50.0)
    parser.add_argument("--tpot-ms", type=float, default=10.0)
    parser.add_argument(
        "--outside-ms", type=float, default=0.0, help="before a request has arrived, by its clock"
    )
    parser.add_argument("--pause-ms", type=float, default=0.0, help="a stall in the middle of every answer")
    parser.add_argument(
        "--serial", action="store_true", help="one request at a time, like a batch-1 baseline"
    )
    parser.add_argument("--step", action="store_true", help="all requests at once, like in-flight batching")
    args = parser.parse_args()
    named = ("ttft", "tpot", "outside", "pause")
    seconds = {f"{name}_s": getattr(args, f"{name}_ms") / 1e3 for name in named}
    timing = Timing(**seconds, serial=args.serial, step=args.step)
    try:
        server = NullServer(timing, args.port).start()
    except OSError as error:
        raise SystemExit(f"error: {error}") from None
    print(f"null server ready: {server.url}", flush=True)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        server.stop()


if __name__ == "__main__":
    main()
