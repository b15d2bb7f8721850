"""Clients that go away give their KV blocks back long before their answer would have ended."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from flightline.supervisor.serve import Server
from tests.model_repository.endpoints import Call, idle, stop, wait_until
from tests.serving import CONTEXT

pytestmark = pytest.mark.slow

STREAMS, LENGTH = 8, CONTEXT - 100
BASELINE_LENGTH = 500


def _tokens_spent(server: Server, endpoint: str, leave: Callable[[Call, str], None]) -> int:
    """Starts long streams, leaves each after its first token, waits until the engine is idle."""
    wait_until(lambda: idle(server))
    before = server.engine.stats.generated_tokens
    inputs = {"text_input": "the dog", "max_tokens": LENGTH, "end_id": -1, "stream": True}
    calls = {str(index): Call(server, endpoint, inputs, request_id=str(index)) for index in range(STREAMS)}
    for call in calls.values():
        call.next()
    wait_until(lambda: server.engine.stats.kv_blocks_used > 0)
    for request_id, call in calls.items():
        leave(call, request_id)
    wait_until(lambda: idle(server))
    return server.engine.stats.generated_tokens - before


def test_closing_a_stream_of_the_single_model(served: Server) -> None:
    spent = _tokens_spent(served, "text_generation", lambda call, _: call.close())
    assert 0 < spent < STREAMS * LENGTH


def test_stop_request_beside_the_ensemble(served: Server) -> None:
    def leave(call: Call, request_id: str) -> None:
        assert stop(served, request_id).responses == []
        call.read()  # the stream itself ends, with what there was and without an error

    spent = _tokens_spent(served, "ensemble", leave)
    assert 0 < spent < STREAMS * LENGTH


def test_closing_an_http_stream(served: Server) -> None:
    import http.client
    import json

    def post() -> http.client.HTTPConnection:
        connection = http.client.HTTPConnection(served.settings.host, served.settings.http_port)
        body = {"text_input": "the dog", "max_tokens": LENGTH, "end_id": -1, "stream": True}
        connection.request("POST", "/v2/models/text_generation/generate_stream", json.dumps(body))
        return connection

    wait_until(lambda: idle(served))
    before = served.engine.stats.generated_tokens
    connections = [post() for _ in range(STREAMS)]
    for connection in connections:
        connection.getresponse().fp.readline()
        connection.close()
    wait_until(lambda: served.engine.stats.generated_tokens > before)
    wait_until(lambda: idle(served))
    assert 0 < served.engine.stats.generated_tokens - before < STREAMS * LENGTH


def test_stopping_an_unknown_request_is_harmless(served: Server) -> None:
    assert stop(served, "nobody").responses == []


def test_a_cancelled_baseline_request_makes_way(served: Server) -> None:
    inputs = {"text_input": "the dog", "max_tokens": BASELINE_LENGTH, "end_id": -1, "stream": True}
    first, second = (Call(served, "hf_baseline", inputs) for _ in range(2))
    first.next()
    first.close()
    lengths = [array.size for array in second.read().column("text_output")]
    assert np.sum(lengths) > 1
