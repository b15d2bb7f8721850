"""Typed client for the text-generation endpoints: ``Client``, ``AsyncClient`` and ``python -m flightline.client``."""

from flightline.client.aio import AsyncClient
from flightline.client.chat_template import ChatTemplate, ChatTemplateError
from flightline.client.errors import (
    ClientError,
    DeadlineExceeded,
    GenerationError,
    InvalidRequest,
    RequestCancelled,
    ServerUnavailable,
)
from flightline.client.params import GenerateParams
from flightline.client.results import Chunk, Generation, PerfMetrics
from flightline.client.sync import Client

__all__ = [
    "AsyncClient",
    "ChatTemplate",
    "ChatTemplateError",
    "Chunk",
    "Client",
    "ClientError",
    "DeadlineExceeded",
    "GenerateParams",
    "Generation",
    "GenerationError",
    "InvalidRequest",
    "PerfMetrics",
    "RequestCancelled",
    "ServerUnavailable",
]
