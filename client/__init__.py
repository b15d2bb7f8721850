"""Typed client for the text-generation endpoints: ``Client``, ``AsyncClient`` and ``python -m client``."""

from client.aio import AsyncClient
from client.chat_template import ChatTemplate, ChatTemplateError
from client.errors import (
    ClientError,
    DeadlineExceeded,
    GenerationError,
    InvalidRequest,
    RequestCancelled,
    ServerUnavailable,
)
from client.params import GenerateParams
from client.results import Chunk, Generation, PerfMetrics
from client.sync import Client

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
