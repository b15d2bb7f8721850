"""The kernel's timer on event loops that know whole milliseconds only."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Callable

import pytest
import uvloop

from flightline.loadtest.punctual import Alarm, punctual_event_loop

LOOPS = (asyncio.new_event_loop, uvloop.new_event_loop, punctual_event_loop)


def run(make_loop: Callable[[], asyncio.AbstractEventLoop], coroutine) -> None:
    with asyncio.Runner(loop_factory=make_loop) as runner:
        runner.run(coroutine)


@pytest.mark.parametrize("make_loop", LOOPS)
def test_it_never_rings_early_and_not_at_all_for_the_past(make_loop) -> None:
    async def check() -> None:
        alarm = Alarm()
        for microseconds in (50, 300, 1_700, 20_300):
            at_ns = time.monotonic_ns() + 1_000 * microseconds
            await alarm.wait_until(at_ns)
            assert time.monotonic_ns() >= at_ns
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(count())
        await alarm.wait_until(time.monotonic_ns() - 1)
        assert turns == 0, "the loop had no turn"
        await alarm.wait_until(time.monotonic_ns() + 2_000_000)
        assert turns > 0, "others go on meanwhile"
        other.cancel()
        alarm.close()

    run(make_loop, check())


@pytest.mark.parametrize("make_loop", LOOPS)
def test_it_can_be_given_up_and_set_again(make_loop) -> None:
    async def check() -> None:
        before = timers()
        alarm = Alarm()
        assert timers() - before
        late = asyncio.create_task(alarm.wait_until(time.monotonic_ns() + 3_600_000_000_000))
        await asyncio.sleep(0)
        late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        at_ns = time.monotonic_ns() + 5_000_000
        soon = asyncio.create_task(alarm.wait_until(at_ns))
        await asyncio.sleep(0)
        soon.cancel()
        await asyncio.sleep(0.02)  # rings for nobody
        await alarm.wait_until(time.monotonic_ns() + 1_000_000)
        alarm.close()
        assert timers() <= before

    run(make_loop, check())


def timers() -> set[str]:
    """Open files of this process that are timers; threads of other tests' libraries open others at any time."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # closed meanwhile
            if "timerfd" in os.readlink(f"/proc/self/fd/{name}"):
                found.add(name)
    return found
