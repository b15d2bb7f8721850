"""What can go wrong, as exceptions that carry the server's own text."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:  # params.py, which the server reads too, shall not load it
    import grpc


class ClientError(Exception):
    """Any failure of a call; ``str(error)`` is the server's text where there is one."""


class ServerUnavailable(ClientError):
    """Nobody answers, the model is not loaded, or the server's queue is full; trying again later may help."""


class InvalidRequest(ClientError):
    """The request can never succeed: a value out of range, an unknown model, a wrong shape."""


class RequestCancelled(ClientError):
    """The call was cancelled before it was complete."""


class DeadlineExceeded(ClientError):
    """``timeout_s`` passed before the answer was complete."""


class GenerationError(ClientError):
    """The server failed while it worked on the request, or reported an error without a code."""


BY_STATUS: dict[str, type[ClientError]] = {
    "UNAVAILABLE": ServerUnavailable,
    "INVALID_ARGUMENT": InvalidRequest,
    "NOT_FOUND": InvalidRequest,
    "UNIMPLEMENTED": InvalidRequest,
    "ALREADY_EXISTS": InvalidRequest,
    "CANCELLED": RequestCancelled,
    "DEADLINE_EXCEEDED": DeadlineExceeded,
}
"""By the name of gRPC's status code."""

UNAVAILABLE_SIGNS = (
    "not healthy", "is not ready", "queue is full", "maximum queue size", "timeout expired", "overloaded",
    "is stopping", "engine process",
)  # fmt: skip
INVALID_SIGNS = (
    "unknown model", "it must ", "not an input", "unexpected", "expected", "is empty", "is missing", "utf-8",
    "malformed", "not supported", "must be", "holds", "cannot be enforced",
    "grammar cannot go on",
)  # fmt: skip


def from_stream_error(text: str) -> ClientError:
    """The exception for an error on a stream, where Triton sends a text and no code.

    Its mode that sends codes (header ``triton_grpc_error``) is no way out: with it, clients that cancel
    crash Triton 2.51 (segmentation fault, measured). So the class is told from the text.
    """
    lowered = text.lower()
    if any(sign in lowered for sign in UNAVAILABLE_SIGNS):
        return ServerUnavailable(text)
    if any(sign in lowered for sign in INVALID_SIGNS):
        return InvalidRequest(text)
    return RequestCancelled(text) if "cancel" in lowered else GenerationError(text)


def from_rpc_error(error: grpc.RpcError, url: str, timeout_s: float | None) -> ClientError:
    """The exception for a failed RPC (``grpc.RpcError`` of the sync or of the asyncio API)."""
    status, text = error.code().name, error.details() or ""
    if status == "UNAVAILABLE" and "connect" in text.lower():
        return ServerUnavailable(f"no server at {url}: start it with 'make serve' or give another url")
    if status == "DEADLINE_EXCEEDED":
        limit = "the deadline" if timeout_s is None else f"timeout_s={timeout_s:g}"
        return DeadlineExceeded(f"no complete answer from {url} within {limit}")
    return BY_STATUS.get(status, GenerationError)(text or status)
