"""An event loop whose timers are not late by design."""

from __future__ import annotations

import asyncio
import selectors


def punctual_event_loop() -> asyncio.AbstractEventLoop:
    """For few sockets, as ``grpc.aio`` needs them: it waits with ``select``, to the microsecond.

    The default loop's ``epoll`` waits for whole milliseconds, and asyncio rounds up.
    """
    return asyncio.SelectorEventLoop(selectors.SelectSelector())
