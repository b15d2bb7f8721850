"""Ends a call whose answer nobody wants any more.

Cancelling the RPC is enough for a single model. An ensemble never hears of it, and this Triton release
leaks the cancelled ensemble request, so that the server cannot stop cleanly any more (measured on 2.51).
So an ensemble is told to ``stop`` by request id and its call is read to the end, which comes at once; the
RPC is cancelled only if it does not.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import grpc
from tritonclient.grpc import service_pb2

from flightline.client import wire

GRACE_S = 2.0


def leave(call: Any, request: service_pb2.ModelInferRequest, send: Callable[..., Any]) -> None:
    """``call`` is the running RPC of ``request``, ``send`` starts another one."""
    if request.model_name == wire.ENSEMBLE:
        cancel_late = threading.Timer(GRACE_S, call.cancel)
        cancel_late.daemon = True
        cancel_late.start()
        # Either may fail: the server or the channel is gone, and nothing is left to stop.
        with suppress(grpc.RpcError, ValueError):
            for _ in send(wire.stop_request(request.id), timeout=GRACE_S):
                pass
            for _ in call:
                pass
        cancel_late.cancel()
    call.cancel()


async def leave_async(
    call: Any, request: service_pb2.ModelInferRequest, send: Callable[..., Any], reading: asyncio.Task[Any]
) -> None:
    """:func:`leave` for grpc.aio; runs to its end even if the calling task is cancelled meanwhile.

    ``reading`` is a task of its own that reads ``call``: grpc.aio cancels the RPC if the task that reads
    it is cancelled, which is what an ensemble must be spared.
    """
    await asyncio.shield(_leave_async(call, request, send, reading))


async def _leave_async(
    call: Any, request: service_pb2.ModelInferRequest, send: Callable[..., Any], reading: asyncio.Task[Any]
) -> None:
    if request.model_name == wire.ENSEMBLE:
        with suppress(grpc.RpcError, asyncio.CancelledError, asyncio.InvalidStateError):
            async for _ in send(wire.stop_request(request.id), timeout=GRACE_S):
                pass
            await asyncio.wait([reading], timeout=GRACE_S)
    call.cancel()
    await asyncio.gather(reading, return_exceptions=True)
