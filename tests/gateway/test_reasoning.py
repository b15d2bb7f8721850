"""Thoughts in usage, through the SDK and a real Triton.

The model has random weights, so that its thoughts never end, or never begin.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import openai
import pytest

from flightline.gateway.alone import alone
from flightline.gateway.settings import GatewaySettings
from flightline.supervisor import gateway
from flightline.supervisor.server import Server

pytestmark = pytest.mark.slow

TEMPLATES = Path(__file__).parent / "chat/jinja"
TOKENS = 24


@pytest.mark.parametrize(("template", "thoughts"), [("deepseek_r1", TOKENS), ("qwen_3", 0)])
def test_thoughts_are_counted(served: Server, template: str, thoughts: int) -> None:
    """By chat and by responses, whole and streamed, of all choices."""
    chat: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": "How is the weather?"}],
        "extra_body": {"ignore_eos": True},
        "temperature": 0,
    }
    response = {name: value for name, value in chat.items() if name != "messages"} | {
        "input": "How is the weather?",
        "max_output_tokens": TOKENS,
    }
    counted: list[tuple[int, int]] = []
    settings = GatewaySettings(chat_template=str(TEMPLATES / f"{template}.jinja"), served_names=("tiny",))
    with (
        alone(gateway.upstream(served.settings, served.deployment), settings) as running,
        openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as llm,
    ):
        chat["max_tokens"] = TOKENS
        two = llm.chat.completions.create(n=2, **chat).usage
        assert two is not None and two.completion_tokens_details is not None
        assert two.completion_tokens_details.reasoning_tokens == 2 * thoughts
        options: Any = {"include_usage": True, "continuous_usage_stats": True}
        *_, before, last = llm.chat.completions.create(stream=True, stream_options=options, **chat)
        for usage in (llm.chat.completions.create(**chat).usage, before.usage, last.usage):
            assert usage is not None and usage.completion_tokens_details is not None
            counted.append((usage.completion_tokens, usage.completion_tokens_details.reasoning_tokens or 0))
        *_, end = llm.responses.create(stream=True, **response)
        for made in (llm.responses.create(**response), end.response):
            assert made.usage is not None
            details = made.usage.output_tokens_details
            counted.append((made.usage.output_tokens, details.reasoning_tokens))
    assert counted == [(TOKENS, thoughts)] * 5
