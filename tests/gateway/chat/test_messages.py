from __future__ import annotations

import pytest

from flightline.gateway.chat.messages import parse_messages
from flightline.torch_engine.core.request import Code, RequestError

CALL = {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
USER = {"role": "user", "content": "Hi"}


def test_what_applications_send_becomes_what_templates_take():
    assert parse_messages(
        [
            {"role": "developer", "content": "Be brief."},
            {
                "role": "user",
                "name": "ann",
                "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}],
            },
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "audio": None,
                "function_call": None,
                "tool_calls": [CALL],
            },
            {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "20"}]},
            {"role": "assistant", "content": "ok", "reasoning": "hm", "tool_calls": []},
            {"role": "assistant", "refusal": "no"},
        ]
    ) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "name": "ann", "content": "a\nb"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [
                {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": {"a": 1}}}
            ],
        },
        {"role": "tool", "tool_call_id": "call_1", "content": "20"},
        {"role": "assistant", "content": "ok", "reasoning_content": "hm"},
        {"role": "assistant", "content": "no"},
    ]


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_message_may_have_been_cut_in_its_thoughts(field):
    """As SDKs give it back: with null for whatever it does not have."""
    other = {"reasoning_content": "reasoning", "reasoning": "reasoning_content"}[field]
    (message,) = parse_messages(
        [
            {
                "role": "assistant",
                "content": None,
                "refusal": None,
                "tool_calls": None,
                field: "hm",
                other: None,
            }
        ]
    )
    assert message == {"role": "assistant", "content": "", "reasoning_content": "hm"}


@pytest.mark.parametrize(
    ("text", "parsed"),
    [("", {}), ("{}", {}), ("[1]", "[1]"), ("{bad", "{bad"), ('{"a"', '{"a"'), ({"a": 1}, {"a": 1})],
)
def test_arguments_are_objects_where_they_can_be(text, parsed):
    call = {**CALL, "function": {"name": "f", "arguments": text}}
    (message,) = parse_messages([{"role": "assistant", "tool_calls": [call]}])
    assert message["tool_calls"][0]["function"]["arguments"] == parsed


@pytest.mark.parametrize(
    ("messages", "told"),
    [
        (None, "messages is None"),
        ([], "messages is []"),
        ({"role": "user"}, "messages is {'role'"),
        (["Hi"], "messages[0] is 'Hi'"),
        ([USER, {"content": "Hi"}], "messages[1].role is None: it must be one of system, developer, user"),
        ([{"role": "function", "content": "Hi"}], "messages[0].role is 'function'"),
        ([{"role": ["user"], "content": "Hi"}], "messages[0].role is ['user']"),
        ([{"role": "user"}], "messages[0].content is missing"),
        ([{"role": "assistant"}], "messages[0].content is missing"),
        ([{"role": "user", "content": 1}], "messages[0].content is 1"),
        ([{"role": "user", "content": ["Hi"]}], "messages[0].content[0] is 'Hi'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0].text is None"),
        (
            [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}],
            "content[0].type is image_url: this",
        ),
        ([{"role": "user", "content": [{"type": {}}]}], "messages[0].content[0] is {'type'"),
        ([{"role": "user", "content": "\ud800"}], "messages[0].content holds half of a surrogate pair"),
        ([{"role": "user", "content": "Hi", "name": 1}], "messages[0].name is 1"),
        ([{"role": "user", "content": "Hi", "tool_calls": [CALL]}], "tool_calls belongs to role assistant"),
        ([{"role": "assistant", "tool_calls": {"a": 1}}], "messages[0].tool_calls is {'a': 1}"),
        ([{"role": "assistant", "tool_calls": [{"function": "f"}]}], "messages[0].tool_calls[0] is"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "tool_calls[0].function.name is None"),
        ([{"role": "assistant", "tool_calls": [{"type": "custom", "function": {}}]}], "tool_calls[0] is"),
        (
            [{"role": "assistant", "content": "a", "function_call": {}}],
            "messages[0].function_call is not supported",
        ),
        ([{"role": "tool", "content": "20"}], "messages[0].tool_call_id is None"),
        ([{"role": "user", "content": "x" * 500 and 5 * [0]}], "messages[0].content[0] is 0"),
    ],
)
def test_bad_messages_are_refused_by_name(messages, told):
    with pytest.raises(RequestError) as caught:
        parse_messages(messages)
    assert caught.value.code is Code.INVALID_ARG and told in caught.value.message
    assert len(caught.value.message) < 250
