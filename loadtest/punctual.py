"""Waiting that is not late by design: event loops wait for whole milliseconds."""

from __future__ import annotations

import asyncio
import ctypes
import os
import selectors
import struct
import time

_TFD_TIMER_ABSTIME = 1
_libc = ctypes.CDLL(None, use_errno=True)


def punctual_event_loop() -> asyncio.AbstractEventLoop:
    """For few sockets and many timers: it waits with ``select``, to the microsecond."""
    return asyncio.SelectorEventLoop(selectors.SelectSelector())


class Alarm:
    """One timer of the kernel's, timerfd_create(2): a file that any event loop sees become readable.

    Create, use and close it on the running loop; one coroutine may wait at a time.
    """

    def __init__(self) -> None:
        self._file = _libc.timerfd_create(time.CLOCK_MONOTONIC, os.O_NONBLOCK | os.O_CLOEXEC)
        if self._file < 0:
            raise OSError(ctypes.get_errno(), "timerfd_create")
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._file, self._ring)
        self._rung: asyncio.Future[None] = self._loop.create_future()

    async def wait_until(self, at_ns: int) -> None:
        """Returns at this time of ``time.monotonic_ns()``, at once if it has passed."""
        if at_ns <= time.monotonic_ns():
            return
        self._rung = self._loop.create_future()
        once = struct.pack("@4q", 0, 0, *divmod(at_ns, 1_000_000_000))  # struct itimerspec
        _libc.timerfd_settime(self._file, _TFD_TIMER_ABSTIME, once, None)
        await self._rung

    def close(self) -> None:
        self._loop.remove_reader(self._file)
        os.close(self._file)

    def _ring(self) -> None:
        try:
            os.read(self._file, 8)
        except BlockingIOError:  # it was set anew since
            return
        if not self._rung.done():
            self._rung.set_result(None)
