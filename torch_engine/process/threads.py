"""Threads that a process cannot do without."""

from __future__ import annotations

import os
import threading
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from flightline.torch_engine.process.log import logger

STATUS = 70
"""Exit status of a process that has ended itself: EX_SOFTWARE of sysexits.h."""


def vital(target: Callable[..., None], name: str, *arguments: Any) -> threading.Thread:
    """Starts a daemon thread. Should it fail, the process ends loudly, so that whoever watches it starts another.

    A process that lives on without the thread would answer nobody, and nobody would know.
    """

    def run() -> None:
        try:
            target(*arguments)
        except BaseException:
            traceback.print_exc()
            end_process(f"thread {name!r} has failed, and nothing works without it")

    thread = threading.Thread(target=run, name=name, daemon=True)
    thread.start()
    return thread


def end_process(why: str) -> NoReturn:
    """Ends this process now, whatever its other threads do."""
    logger("process").critical("pid %d ends itself: %s", os.getpid(), why)
    os._exit(STATUS)
