"""What the sync and the asyncio client have in common: everything but the waiting."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

from tritonclient.grpc import service_pb2, service_pb2_grpc

from flightline.client import wire
from flightline.client.chat_template import ChatTemplate, Message, deployed_model_dir
from flightline.client.errors import InvalidRequest
from flightline.client.params import GenerateParams

Stream = TypeVar("Stream")


class BaseClient(Generic[Stream]):
    """Settings of a client, its channel, and the requests that it makes of its arguments."""

    _open: Callable[..., Any]
    """Makes a channel of an address."""

    def __init__(
        self,
        url: str | None = None,
        model: str = wire.TEXT_GENERATION,
        *,
        timeout_s: float | None = None,
        model_dir: str | Path | None = None,
    ) -> None:
        """
        Args:
            url: ``host:port`` of the server's gRPC port; None = this machine, port ``FLIGHTLINE_GRPC_PORT`` or 8001.
            model: Endpoint: ``text_generation``, ``ensemble`` or ``hf_baseline``.
            timeout_s: Deadline of every call, unless the call gives its own; None = no limit.
            model_dir: Checkpoint folder whose chat template ``chat`` applies; None = the deployed one's.
        """
        self.url = url or wire.default_url()
        self.model = model
        self.timeout_s = timeout_s
        self._model_dir = model_dir
        self._template: ChatTemplate | None = None
        self._channel = self._open(self.url, options=wire.CHANNEL_OPTIONS)
        self._service = service_pb2_grpc.GRPCInferenceServiceStub(self._channel)
        self._call = self._channel.unary_stream(
            wire.STREAM_INFER,
            request_serializer=service_pb2.ModelInferRequest.SerializeToString,
            response_deserializer=service_pb2.ModelStreamInferResponse.FromString,
        )

    def generate_stream(
        self,
        prompt: str,
        params: GenerateParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Stream:
        """The answer as it is generated; ``options`` are fields of :class:`GenerateParams`.

        The request is sent when the iteration starts.
        """
        request, reader = self._request(prompt, params, options, stream=True)
        return self._chunks(request, reader, self._deadline(timeout_s))

    def chat_stream(
        self,
        messages: Sequence[Message],
        params: GenerateParams | None = None,
        *,
        timeout_s: float | None = None,
        **options: Any,
    ) -> Stream:
        """The assistant's answer to the messages, as it is generated."""
        return self.generate_stream(self.render_chat(messages), params, timeout_s=timeout_s, **options)

    def render_chat(self, messages: Sequence[Message]) -> str:
        """The prompt that the model's chat template makes of the messages.

        Raises:
            ChatTemplateError: no template, or one that does not accept these messages.
        """
        if self._template is None:
            self._template = ChatTemplate.from_dir(self._model_dir or deployed_model_dir())
        return self._template.render(messages)

    def _chunks(
        self, request: service_pb2.ModelInferRequest, reader: wire.Reader, timeout_s: float | None
    ) -> Stream:
        raise NotImplementedError

    def _request(
        self, prompt: str, params: GenerateParams | None, options: dict[str, Any], *, stream: bool
    ) -> tuple[service_pb2.ModelInferRequest, wire.Reader]:
        """A request and the reader of its answer; ``options`` override fields of ``params``."""
        params = dataclasses.replace(params or GenerateParams(), **options)
        request = wire.infer_request(self.model, uuid.uuid4().hex, prompt, params, stream=stream)
        return request, wire.Reader(self.model, params, stream)

    @staticmethod
    def _require_one(params: GenerateParams) -> None:
        if (params.num_return_sequences or 1) > 1:
            raise InvalidRequest(
                f"num_return_sequences is {params.num_return_sequences}: it must be 1 for a method that returns one "
                "answer; call generate_all"
            )

    def _deadline(self, timeout_s: float | None) -> float | None:
        return self.timeout_s if timeout_s is None else timeout_s
