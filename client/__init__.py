"""Typed client for the text-generation endpoints: ``Client``, ``AsyncClient`` and ``python -m flightline.client``.

Each name is imported when it is first asked for: the server reads ``params.py`` and shall not load gRPC.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
_MODULES = ("errors", "params", "results", "chat_template", "sync", "aio")


def __getattr__(name: str) -> Any:
    if name in __all__:
        for module in _MODULES:
            found = getattr(importlib.import_module(f"{__name__}.{module}"), name, None)
            if found is not None:
                return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
