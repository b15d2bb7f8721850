"""The asyncio client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from flightline.client import wire
from flightline.client.base import BaseClient
from flightline.client.chat_template import Message
from flightline.client.errors import RequestCancelled, ServerUnavailable, from_rpc_error
from flightline.client.leaving import leave_async
from flightline.client.params import GenerateParams
from flightline.client.results import Chunk, Generation


class AsyncClient(BaseClient[AsyncGenerator[Chunk, None]]):
    """:class:`Client` for asyncio; create and use it inside one running event loop.

    >>> async with AsyncClient() as llm:
    ...     async for chunk in llm.generate_stream("The capital of France is", max_tokens=32):
    ...         print(chunk, end="", flush=True)

    Cancelling the task or closing the iterator (``contextlib.aclosing`` does it at once on ``break``) cancels the
    request on the server.
    """

    _open = staticmethod(grpc.aio.insecure_channel)

    async def __aenter__(self) -> AsyncClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the channel; calls in flight are cancelled."""
        await self._channel.close()

    async def check_ready(self, timeout_s: float = 5.0) -> None:
        """Returns if the server is up and has the model loaded; see :meth:`Client.check_ready`."""
        try:
            request = service_pb2.ModelReadyRequest(name=self.model)
            ready = (await self._service.ModelReady(request, timeout=timeout_s)).ready
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.url, timeout_s) from None
        if not ready:
            raise ServerUnavailable(f"the server at {self.url} has no model {self.model!r} that is ready")

    async def generate(
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
        chunks = [chunk async for chunk in self._chunks(request, reader, self._deadline(timeout_s))]
        return Generation.from_chunks(chunks, reader.params.max_tokens)

    async def generate_all(
        self,
        prompt: str,
        params: GenerateParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Any,
    ) -> list[Generation]:
        """As many complete answers as ``num_return_sequences`` asks for; one that has failed has an ``error``."""
        request, reader = self._request(prompt, params, options, stream=False)
        chunks = [chunk async for chunk in self._chunks(request, reader, self._deadline(timeout_s))]
        return Generation.all_from_chunks(chunks, reader.params)

    async def chat(
        self,
        messages: Sequence[Message],
        params: GenerateParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Generation:
        """The assistant's answer to ``[{"role": "user", "content": ...}, ...]``."""
        return await self.generate(self.render_chat(messages), params, timeout_s=timeout_s, **options)

    async def _chunks(
        self, request: service_pb2.ModelInferRequest, reader: wire.Reader, timeout_s: float | None
    ) -> AsyncGenerator[Chunk, None]:
        call = self._call(request, timeout=timeout_s)
        messages: asyncio.Queue[Any] = asyncio.Queue()

        async def read() -> None:
            try:
                async for message in call:
                    messages.put_nowait(message)
            finally:
                messages.put_nowait(None)

        reading = asyncio.create_task(read())
        try:
            while (message := await messages.get()) is not None:
                chunk = reader.chunk(message)
                if chunk is not None:
                    yield chunk
            await reading
        except grpc.RpcError as error:
            raise from_rpc_error(error, self.url, timeout_s) from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise RequestCancelled("the call was cancelled: its channel was closed") from None
        finally:
            if not reading.done():
                await leave_async(call, request, self._call, reading)
