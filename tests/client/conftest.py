from __future__ import annotations

from collections.abc import Iterator

import pytest

from flightline.loadtest.null_server import NullServer, Timing


@pytest.fixture
def server() -> Iterator[NullServer]:
    """A real gRPC server that speaks the endpoints' protocol, fast."""
    with NullServer(Timing(ttft_s=0.010, tpot_s=0.002)) as running:
        yield running


@pytest.fixture
def slow_server() -> Iterator[NullServer]:
    """One that would need a minute for the answers that the tests ask for."""
    with NullServer(Timing(ttft_s=0.010, tpot_s=0.050)) as running:
        yield running
