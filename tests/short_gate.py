"""An accuracy gate that takes a second: for tests whose subject is not what it measures."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

PROMPTS = 2


@contextmanager
def short_gate() -> Iterator[None]:
    """One window of text and two prompts, through the same code."""
    from flightline.engine_build import build, gate

    whole = build.read_prompts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "MAX_WINDOWS", 1)
        patch.setattr(
            build, "read_prompts", lambda path: whole(path)[: PROMPTS if path == build.GATE_PROMPTS else None]
        )
        yield
