"""Tool calls through the SDK: a real Triton, chat templates that know tools, and grammars that enforce the calls.

The model has random weights: whatever call comes, the grammar made it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Bonn", "Paris"]}, "now": {"type": "boolean"}},
    "required": ["city", "now"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "time"}},
]
ASKED: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "How is the weather?"}],
    "tools": TOOLS,
    "max_tokens": 300,
    "parallel_tool_calls": False,
    "extra_body": {"chat_template_kwargs": {"enable_thinking": False}},
}
"""Thoughts would be free, and this model's never end."""


@pytest.fixture(scope="module", params=["qwen_3", "llama_3", "pythonic"])
def llm(request: pytest.FixtureRequest, served: Server) -> Iterator[openai.OpenAI]:
    """A gateway of its own in front of the session's Triton, with another chat template."""
    template = str(TEMPLATES / f"{request.param}.jinja")
    settings = GatewaySettings(chat_template=template, served_names=("tiny",))
    with (
        alone(gateway.upstream(served.settings, served.deployment), settings) as running,
        openai.OpenAI(base_url=running.url + "/v1", api_key="none", max_retries=0) as client,
    ):
        yield client


def arguments_of(call: Any) -> dict[str, Any]:
    assert call.id and call.type == "function"
    arguments = json.loads(call.function.arguments)
    if call.function.name == "weather":
        assert arguments["city"] in ("Bonn", "Paris") and isinstance(arguments["now"], bool)
    return arguments


def test_a_named_tool(llm: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "weather"}}
    schema = {
        "name": "other",
        "schema": {"type": "object", "properties": {"a": {"const": 1}}, "required": ["a"]},
    }
    beside: Any = {
        "response_format": {"type": "json_schema", "json_schema": schema}
    }  # of a content, which it has not
    for more in ({}, beside):
        choice = llm.chat.completions.create(tool_choice=named, **ASKED, **more).choices[0]
        (call,) = choice.message.tool_calls
        assert (call.function.name, choice.finish_reason, choice.message.content) == ("weather", "stop", None)
        assert set(arguments_of(call)) == {"city", "now"}


def test_required_whole_and_streamed(llm: openai.OpenAI) -> None:
    """The same call either way, its id and name once."""
    asked = ASKED | {"tool_choice": "required", "temperature": 0}
    choice = llm.chat.completions.create(**asked).choices[0]
    (call,) = choice.message.tool_calls
    arguments_of(call)
    assert choice.finish_reason == "tool_calls"
    chunks = list(llm.chat.completions.create(stream=True, **asked))
    deltas = [each for chunk in chunks for each in chunk.choices[0].delta.tool_calls or ()]
    assert [bool(delta.id) for delta in deltas] == [True, *[False] * (len(deltas) - 1)]
    assert deltas[0].function.name == call.function.name
    assert "".join(delta.function.arguments for delta in deltas) == call.function.arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    with llm.chat.completions.stream(**asked) as stream:
        final = stream.get_final_completion().choices[0].message.tool_calls[0]
    assert (final.function.name, final.function.arguments) == (call.function.name, call.function.arguments)


def test_a_cut_call_says_length(llm: openai.OpenAI) -> None:
    """Only the longer tool is offered: a call of the other one can be whole within a few tokens."""
    asked = ASKED | {"tools": TOOLS[:1], "tool_choice": "required", "max_tokens": 4}
    cut = llm.chat.completions.create(**asked)
    assert cut.choices[0].finish_reason == "length"


def test_a_call_that_a_stop_word_cuts_says_length(llm: openai.OpenAI) -> None:
    """Whole and streamed alike; a named call's own end would be ``stop``."""
    named: Any = {"type": "function", "function": {"name": "weather"}}
    for choice in (named, "required"):
        asked = ASKED | {"tools": TOOLS[:1], "tool_choice": choice, "stop": ["ow"], "temperature": 0}
        whole = llm.chat.completions.create(**asked).choices[0]
        chunks = [chunk.choices[0] for chunk in llm.chat.completions.create(stream=True, **asked)]
        assert whole.finish_reason == chunks[-1].finish_reason == "length"
        assert not whole.message.content and not any(chunk.delta.content for chunk in chunks)
        written = [part.function.arguments for chunk in chunks for part in chunk.delta.tool_calls or ()]
        arguments = "".join(call.function.arguments for call in whole.message.tool_calls or ())
        assert "".join(filter(None, written)) == arguments
        assert "ow" not in arguments


def test_bad_tools_are_400(llm: openai.OpenAI) -> None:
    for change in (
        {"tool_choice": "sometimes"},
        {"tools": []},
        {"tool_choice": {"type": "function", "function": {"name": "x"}}},
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            llm.chat.completions.create(**ASKED | change)
        assert refused.value.param


def test_responses_call_tools(llm: openai.OpenAI) -> None:
    flat: Any = [{"type": "function", "name": "weather", "parameters": SCHEMA, "strict": True}]
    made = llm.responses.create(
        model="tiny",
        input="How is the weather?",
        tools=flat,
        tool_choice="required",
        parallel_tool_calls=False,  # this model's coin decides after each call whether another follows
        max_output_tokens=300,
        extra_body=ASKED["extra_body"],
    )
    call = made.output[-1]
    assert (call.type, call.name, made.status) == ("function_call", "weather", "completed")
    assert json.loads(call.arguments)["city"] in ("Bonn", "Paris")
