"""The blocking client."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from flightline.client import wire
from flightline.client.base import BaseClient
from flightline.client.chat_template import Message
from flightline.client.errors import ServerUnavailable, from_rpc_error
from flightline.client.leaving import leave
from flightline.client.params import GenerateParams
from flightline.client.results import Chunk, Generation


class Client(BaseClient[Generator[Chunk, None, None]]):
    """Text generation over Triton's gRPC stream; safe to share between threads.

    >>> with Client() as llm:
    ...     for chunk in llm.generate_stream("The capital of France is", max_tokens=32):
    ...         print(chunk, end="", flush=True)

    Leaving the loop or closing the iterator cancels the request on the server.

    Every call raises a :class:`ClientError`: ``ServerUnavailable``, ``InvalidRequest``,
    ``RequestCancelled``, ``DeadlineExceeded`` or ``GenerationError``.
    """

    _open = staticmethod(grpc.insecure_channel)

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the channel; calls in flight are cancelled."""
        self._channel.close()

    def check_ready(self, timeout_s: float = 5.0) -> None:
        """Returns if the server is up and has the model loaded.

        Raises:
            ServerUnavailable: it is not; the text says what to do.
        """
        try:
            request = service_pb2.ModelReadyRequest(name=self.model)
            ready = self._service.ModelReady(request, timeout=timeout_s).ready
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.url, timeout_s) from None
        if not ready:
            raise ServerUnavailable(f"the server at {self.url} has no model {self.model!r} that is ready")

    def generate(
        self,
        prompt: str,
        params: GenerateParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Generation:
        """The complete answer; ``options`` are fields of :class:`GenerateParams`."""
        request, reader = self._request(prompt, params, options, stream=False)
        self._require_one(reader.params)
        chunks = self._chunks(request, reader, self._deadline(timeout_s))
        return Generation.from_chunks(chunks, reader.params.max_tokens)

    def generate_all(
        self,
        prompt: str,
        params: GenerateParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Any,
    ) -> list[Generation]:
        """As many complete answers as ``num_return_sequences`` asks for; one that has failed has an ``error``."""
        request, reader = self._request(prompt, params, options, stream=False)
        chunks = self._chunks(request, reader, self._deadline(timeout_s))
        return Generation.all_from_chunks(chunks, reader.params)

    def chat(
        self,
        messages: Sequence[Message],
        params: GenerateParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Generation:
        """The assistant's answer to ``[{"role": "user", "content": ...}, ...]``."""
        return self.generate(self.render_chat(messages), params, timeout_s=timeout_s, **options)

    def _chunks(
        self, request: service_pb2.ModelInferRequest, reader: wire.Reader, timeout_s: float | None
    ) -> Generator[Chunk, None, None]:
        call = self._call(request, timeout=timeout_s)
        complete = False
        try:
            for message in call:
                chunk = reader.chunk(message)
                if chunk is not None:
                    yield chunk
            complete = True
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.url, timeout_s) from None
        finally:
            if not complete:
                leave(call, request, self._call)
