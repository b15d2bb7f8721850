"""Clients of the gateway in front of the session's server."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest

from flightline.supervisor.server import Server


@pytest.fixture(scope="module")
def llm(served: Server) -> Iterator[openai.OpenAI]:
    """The official SDK, which tells errors instead of trying again."""
    with openai.OpenAI(base_url=f"{served.settings.http_url}/v1", api_key="none", max_retries=0) as client:
        yield client
