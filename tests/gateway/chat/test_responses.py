"""The Responses API: what a request means for chat, and events as the official SDK puts them together."""

from __future__ import annotations

import pytest

from flightline.gateway.chat.messages import parse_messages
from flightline.gateway.chat.parsers import Delta
from flightline.gateway.chat.responses import ResponseStream, to_chat
from flightline.torch_engine.core.request import Code, RequestError

USAGE = {
    "prompt_tokens": 7,
    "completion_tokens": 5,
    "total_tokens": 12,
    "prompt_tokens_details": {"cached_tokens": 3},
}
FLAT = {"type": "function", "name": "f", "description": "d", "parameters": {"type": "object"}, "strict": True}


def test_a_request_in_chats_words():
    schema = {"type": "object"}
    assert to_chat(
        {
            "model": "m",
            "input": "Hi",
            "instructions": "Be brief.",
            "max_output_tokens": 9,
            "temperature": 0.5,
            "stream": True,
            "store": True,
            "metadata": {"a": "b"},
            "include": ["reasoning.encrypted_content"],
            "reasoning": {"effort": "low", "summary": "auto"},
            "text": {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
            "tools": [FLAT],
            "tool_choice": {"type": "function", "name": "f"},
            "parallel_tool_calls": False,
            "top_k": 3,
        }
    ) == {
        "model": "m",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}],
        "max_completion_tokens": 9,
        "temperature": 0.5,
        "stream": True,
        "metadata": {"a": "b"},
        "reasoning_effort": "low",
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "n", "schema": schema, "strict": True},
        },
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "description": "d",
                    "parameters": {"type": "object"},
                    "strict": True,
                },
            }
        ],
        "tool_choice": {"type": "function", "function": {"name": "f"}},
        "parallel_tool_calls": False,
        "top_k": 3,
    }
    assert to_chat(
        {"input": "Hi", "tools": [], "tool_choice": "auto", "text": {"format": {"type": "text"}}}
    ) == {
        "messages": [{"role": "user", "content": "Hi"}],
        "response_format": {"type": "text"},
    }
    only = {"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "f"}]}
    assert to_chat({"input": "Hi", "tools": [FLAT], "tool_choice": only})["tool_choice"] == {
        "type": "allowed_tools",
        "allowed_tools": {"mode": "required", "tools": [{"type": "function", "function": {"name": "f"}}]},
    }


def test_items_become_messages():
    chat = to_chat(
        {
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Weather?"}]},
                {
                    "type": "reasoning",
                    "id": "rs_1",
                    "summary": [],
                    "content": [{"type": "reasoning_text", "text": "hm"}],
                },
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": "I look."}],
                },
                {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
                {"type": "function_call", "call_id": "c2", "name": "g", "arguments": '{"a": 1}'},
                {"type": "function_call_output", "call_id": "c1", "output": "20"},
                {
                    "type": "function_call_output",
                    "call_id": "c2",
                    "output": [{"type": "input_text", "text": "30"}],
                },
                {"type": "reasoning", "id": "rs_2", "summary": [{"type": "summary_text", "text": "so"}]},
                {"type": "reasoning", "id": "rs_3", "summary": []},
                {"type": "reasoning", "id": "rs_4", "content": [{"type": "reasoning_text", "text": "it is"}]},
                {"role": "assistant", "content": "Warm."},
                {"role": "assistant", "content": "Very."},
                {"type": "reasoning", "id": "rs_5", "summary": []},
                {"role": "user", "content": "Thanks"},
            ]
        }
    )
    assert parse_messages(chat["messages"]) == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": {}}},
                {"id": "c2", "type": "function", "function": {"name": "g", "arguments": {"a": 1}}},
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "20"},
        {"role": "tool", "tool_call_id": "c2", "content": "30"},
        {"role": "assistant", "content": "Warm.", "reasoning_content": "so\nit is"},
        {"role": "assistant", "content": "Very."},
        {"role": "assistant", "content": "", "reasoning_content": ""},
        {"role": "user", "content": "Thanks"},
    ]


@pytest.mark.parametrize(
    ("body", "told"),
    [
        ({"input": None}, "input is None"),
        ({"input": []}, "input is []"),
        ({"input": ["Hi"]}, "input[0] is 'Hi'"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "input[0].type is 'item_reference'"),
        ({"input": [{"type": "reasoning", "content": "x"}]}, "input[0].content is 'x'"),
        (
            {"input": [{"type": "reasoning", "content": [{"text": None}]}]},
            "input[0].content has the text None",
        ),
        ({"previous_response_id": "resp_1"}, "previous_response_id is not supported"),
        ({"conversation": "c"}, "conversation is not supported"),
        ({"prompt": {"id": "p"}}, "prompt is not supported"),
        ({"background": True}, "background is not supported"),
        ({"truncation": "auto"}, "truncation is 'auto'"),
        ({"include": ["file_search_call.results"]}, "include holds 'file_search_call.results'"),
        ({"include": 5}, "include is 5"),
        ({"top_logprobs": 3}, "top_logprobs is not supported"),
        ({"logprobs": True}, "logprobs is not supported here"),
        ({"return_token_ids": True}, "return_token_ids is not supported here"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "messages is not supported here"),
        ({"n": 2}, "n is 2: a response is one answer"),
        ({"instructions": ["Hi"]}, "instructions is ['Hi']: it must be text"),
        ({"max_tool_calls": 3}, "max_tool_calls is not supported"),
        ({"text": "json"}, "text is 'json'"),
        ({"reasoning": 5}, "reasoning is 5"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type is 'web_search'"),
        ({"tools": "f"}, "tools is 'f'"),
        ({"tools": [FLAT], "tool_choice": {"type": "file_search"}}, "tool_choice.type is 'file_search'"),
    ],
)
def test_what_needs_a_memory_or_is_malformed_is_refused_by_name(body, told):
    with pytest.raises(RequestError) as caught:
        to_chat({"input": "Hi", **body})
    assert caught.value.code is Code.INVALID_ARG and told in caught.value.message


@pytest.mark.parametrize("body", [[], None, 5, "Hi"])
def test_a_body_that_is_no_object_is_the_clients_mistake(body):
    with pytest.raises(RequestError, match="the body must be a JSON object"):
        to_chat(body)


DELTAS = [
    Delta("reasoning", "h"),
    Delta("reasoning", "m"),
    Delta("text", "I "),
    Delta("text", "look."),
    Delta("tool_start", index=0, call_id="call_a", name="f"),
    Delta("tool_arguments", '{"a"', index=0),
    Delta("tool_arguments", ": 1}", index=0),
    Delta("tool_start", index=1, call_id="call_b", name="g"),
    Delta("tool_arguments", "{}", index=1),
]


def stream() -> ResponseStream:
    return ResponseStream({"input": "Hi", "tools": [FLAT], "temperature": 0.5}, "resp_1", 5.0, "m")


def test_the_events_of_an_answer():
    made = stream()
    events = made.start()
    for delta in DELTAS:
        events += made.feed([delta])
    events += made.finish("tool_calls", USAGE)
    assert [data["sequence_number"] for _, data in events] == list(range(len(events)))
    assert all(name == data["type"] for name, data in events)
    opened = ["response.output_item.added", "response.content_part.added"]
    closed = ["response.content_part.done", "response.output_item.done"]
    call = ["response.function_call_arguments.delta", "response.function_call_arguments.done"]
    assert [name for name, _ in events] == [
        "response.created", "response.in_progress",
        *opened, *2 * ["response.reasoning_text.delta"], "response.reasoning_text.done", *closed,
        *opened, *2 * ["response.output_text.delta"], "response.output_text.done", *closed,
        opened[0], call[0], *call, closed[1], opened[0], *call, closed[1],
        "response.completed",
    ]  # fmt: skip
    whole = events[-1][1]["response"]
    assert whole == made.response() and whole["status"] == "completed"
    assert [item["type"] for item in whole["output"]] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert whole["output"][1]["content"][0]["text"] == "I look."
    assert whole["output"][2] | {"id": ""} == {
        "id": "", "type": "function_call", "status": "completed",
        "call_id": "call_a", "name": "f", "arguments": '{"a": 1}',
    }  # fmt: skip
    assert whole["usage"] == {
        "input_tokens": 7, "input_tokens_details": {"cached_tokens": 3, "cache_write_tokens": 0}, "output_tokens": 5,
        "output_tokens_details": {"reasoning_tokens": 0}, "total_tokens": 12,
    }  # fmt: skip
    assert (whole["temperature"], whole["top_p"], whole["store"], whole["tools"]) == (0.5, 1.0, False, [FLAT])
    assert events[0][1]["response"]["output"] == []  # what was sent does not change later


def test_an_answer_that_was_cut_and_one_that_is_empty():
    cut, empty = stream(), stream()
    cut.start()
    events = cut.feed([Delta("text", "I")]) + cut.finish("length", USAGE)
    assert events[-1][0] == "response.incomplete"
    assert cut.response()["incomplete_details"] == {"reason": "max_output_tokens"}
    assert cut.response()["output"][0]["status"] == "incomplete"
    empty.finish("stop", USAGE)
    assert empty.response()["output"][0]["content"] == [
        {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    ]


def test_a_failure_in_the_middle():
    made = stream()
    made.start()
    made.feed([Delta("text", "I")])
    events = made.fail({"message": "the engine stopped", "type": "server_error", "param": None, "code": 503})
    assert [name for name, _ in events][-2:] == ["error", "response.failed"]
    assert events[-2][1]["message"] == "the engine stopped" and events[-2][1]["code"] == "503"
    assert made.response()["error"] == {"code": "server_error", "message": "the engine stopped"}
    assert made.response()["status"] == "failed"


def test_the_official_sdk_understands_the_events():
    """Through the SDK's own accumulator, which refuses events that come out of order."""
    from openai import omit
    from openai.lib.streaming.responses._responses import ResponseStreamState
    from openai.types.responses import ResponseStreamEvent
    from pydantic import TypeAdapter

    state = ResponseStreamState(input_tools=[], text_format=omit)
    made = stream()
    events = [*made.start(), *made.feed(DELTAS), *made.finish("tool_calls", USAGE)]
    adapter = TypeAdapter(ResponseStreamEvent)
    seen = [event for _, data in events for event in state.handle_event(adapter.validate_python(data))]
    assert len(seen) >= len(events)
    final = state._completed_response
    assert final is not None and final.output_text == "I look."
    assert [item.arguments for item in final.output if item.type == "function_call"] == ['{"a": 1}', "{}"]
