"""The one error of this package."""

from __future__ import annotations

from flightline.torch_engine.core.request import Code, RequestError


def invalid(message: str) -> RequestError:
    """A request that can never succeed: HTTP status 400. ``message`` names the field, what it holds and what it may."""
    return RequestError(Code.INVALID_ARG, message)


def shown(value: object) -> str:
    """A client's value as an error may repeat it: short, and on one line."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
