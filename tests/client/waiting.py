from __future__ import annotations

import time
from collections.abc import Callable


def eventually(condition: Callable[[], bool], patience_s: float = 300.0) -> bool:
    """True as soon as the condition holds; only a hang takes longer, on however busy a machine."""
    deadline = time.monotonic() + patience_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True
