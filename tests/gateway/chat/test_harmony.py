"""OpenAI's harmony format, which gpt-oss writes: told from the template, read, and kept to by grammars."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tritonclient.grpc import service_pb2

from flightline.gateway.chat.grammars import in_final_channel
from flightline.gateway.chat.guides import Guide, Reasoning
from flightline.gateway.chat.messages import parse_messages
from flightline.gateway.chat.parsers import OutputParser
from flightline.gateway.chat.template import ChatTemplate
from flightline.gateway.chat.tools import ToolPlan, parse_tools
from flightline.gateway.forms import ChatStream, ChatWhole
from flightline.gateway.job import Job, of_chat
from flightline.gateway.responses import WholeResponse
from flightline.gateway.served import ServedModel
from flightline.gateway.settings import GatewaySettings, Upstream
from flightline.gateway.upstream import Piece
from flightline.torch_engine.core import grammar, request
from flightline.torch_engine.core.request import RequestError
from tests.gateway.chat import templates
from tests.gateway.chat.matching import accepts, words
from tests.gateway.chat.test_parsers import read, told
from tests.gateway.chat.test_tools import CITY, TOOLS

USER = {"role": "user", "content": "Weather?"}
THOUGHTS = "<|channel|>analysis<|message|>The user wants\nthe weather.<|end|><|start|>assistant"
FINAL = "<|channel|>final<|message|>"
CALL = f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{CITY}"
PREAMBLE = "<|channel|>commentary<|message|>I look it up.<|end|><|start|>assistant"
WHOLE = {
    # text: thoughts, what is said, what is called
    "answer": (THOUGHTS + FINAL + "It is *warm*.", "The user wants\nthe weather.", "It is *warm*.", []),
    "no thoughts": (FINAL + "Hi <|there|> <", "", "Hi <|there|> <", []),
    "its own end": (FINAL + "Hi<|return|>", "", "Hi", []),
    "call": (THOUGHTS + CALL, "The user wants\nthe weather.", "", [("get_weather", CITY)]),
    "its call's end": (CALL + "<|call|>", "", "", [("get_weather", CITY)]),
    "addressee first": (
        THOUGHTS + ' to=functions.ping<|channel|>commentary json<|message|>{"a": 1}<|call|>',
        "The user wants\nthe weather.", "", [("ping", '{"a": 1}')],
    ),
    "addressee alone": (' to=functions.ping<|channel|>commentary<|message|>{}', "", "", [("ping", "{}")]),
    "preamble": (PREAMBLE + CALL, "", "I look it up.", [("get_weather", CITY)]),
    "thoughts twice": (THOUGHTS + THOUGHTS + FINAL + "Yes", "\n".join(["The user wants\nthe weather."] * 2), "Yes", []),
    "another tool": (
        "<|channel|>analysis to=python<|message|>print(1)<|call|>", "print(1)", "", [],
    ),
    "no channel": (THOUGHTS + "<|message|>Yes", "The user wants\nthe weather.", "Yes", []),
    "no format": ("Hello", "", "Hello", []),
    "nothing": ("", "", "", []),
}  # fmt: skip


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> ChatTemplate:
    folder = tmp_path_factory.mktemp("harmony")
    templates.save(folder, templates.ALL["harmony"], templates.HARMONY_TOKENS)
    loaded = ChatTemplate.load(folder)
    assert loaded is not None
    return loaded


def plan(template: ChatTemplate, **body: object) -> ToolPlan:
    return parse_tools({"tools": TOOLS, **body}, template)


def test_it_is_told_from_the_template(template: ChatTemplate, tmp_path: Path) -> None:
    assert (template.supports_tools, template.tool_format, template.has_channels) == (True, "harmony", True)
    prompt = template.render([USER])
    assert prompt.endswith("<|start|>assistant") and template.reasoning(prompt) is Reasoning.CHANNELS
    begun = template.render(
        [USER, {"role": "assistant", "content": "It is"}],
        add_generation_prompt=False,
        continue_final_message=True,
    )
    assert begun.endswith("It is") and template.reasoning(begun) is Reasoning.NONE
    assert template.ends == [template.special_ids["<|return|>"], template.special_ids["<|call|>"]]
    templates.save(tmp_path, templates.ALL["qwen_3"])
    other = ChatTemplate.load(tmp_path)
    assert other is not None and not other.has_channels and not other.ends


@pytest.mark.parametrize("name", WHOLE)
def test_any_cutting_gives_the_same(name: str) -> None:
    whole, *wanted = WHOLE[name]
    reason = "tool_calls" if wanted[2] else "stop"
    for pieces in ([whole], list(whole), *([whole[:at], whole[at:]] for at in range(len(whole)))):
        deltas, ended = read(pieces, "harmony", TOOLS, Reasoning.CHANNELS)
        assert (told(deltas), ended) == (tuple(wanted), reason)


@pytest.mark.parametrize("name", WHOLE)
def test_every_beginning_of_an_answer_is_one(name: str) -> None:
    """Cut by a limit behind any token; a marker is one."""
    whole, thoughts, text, calls = WHOLE[name]
    within = {
        at for found in re.finditer(r"<\|\w+\|>", whole) for at in range(found.start() + 1, found.end())
    }
    for end in set(range(len(whole))) - within:
        deltas, reason = read([whole[:end]], "harmony", TOOLS, Reasoning.CHANNELS, end="length")
        thought, said, begun = told(deltas)
        assert reason == "length" and thoughts.startswith(thought) and text.startswith(said)
        for (called, arguments), (known, complete) in zip(begun, calls, strict=False):
            assert called == known and complete.startswith(arguments)


@pytest.mark.parametrize(
    ("cut", "reason"),
    [
        (CALL[:-1], "length"),
        (CALL.removesuffix(CITY), "tool_calls"),
        (CALL.partition("<|constrain|>")[0], "length"),
    ],
)
def test_a_call_that_a_stop_word_cuts_is_not_to_be_made(cut: str, reason: str) -> None:
    """One without arguments is whole."""
    deltas, ended = read([THOUGHTS + cut], "harmony", TOOLS, Reasoning.CHANNELS)
    assert (told(deltas)[1], ended) == ("", reason)


def test_a_call_without_tools_is_a_thought() -> None:
    for form, tools in ((None, None), (None, [])):
        deltas, reason = read([THOUGHTS + CALL], form, tools, Reasoning.CHANNELS)
        thought, said, calls = told(deltas)
        assert (said, calls, reason) == ("", [], "stop") and thought.endswith(CITY)


def test_text_is_not_held_back_without_need() -> None:
    parser = OutputParser("harmony", TOOLS, Reasoning.CHANNELS)
    assert parser.feed("<|channel|>analysis<|message|>") == []
    assert [(d.kind, d.text) for d in parser.feed("hm <")] == [("reasoning", "hm ")]
    assert [(d.kind, d.text) for d in parser.feed("b")] == [("reasoning", "<b")]
    assert parser.feed("<|end|><|start|>assistant<|channel|>final<|message|>") == []
    assert [(d.kind, d.text) for d in parser.feed("Yes")] == [("text", "Yes")]
    start, arguments = parser.feed(
        '<|end|><|start|>assistant to=functions.f<|channel|>commentary<|message|>{"a"'
    )
    assert (start.kind, start.name, arguments.text) == ("tool_start", "f", '{"a"')


def let_through(guide: Guide, text: str) -> bool:
    return accepts(guide, text, templates.HARMONY_TOKENS)


def test_required_and_named_calls(template: ChatTemplate) -> None:
    assert template.special_ids.items() >= words(templates.HARMONY_TOKENS)[1].items()
    named = {"type": "function", "function": {"name": "ping"}}
    ping = CALL.replace("get_weather", "ping").replace(CITY, "{}")
    required, chosen = plan(template, tool_choice="required").guide, plan(template, tool_choice=named).guide
    assert required is not None and chosen is not None
    for call in (CALL, ping, THOUGHTS + CALL, PREAMBLE + ping, THOUGHTS + PREAMBLE + CALL):
        assert let_through(required, call), call
        assert let_through(chosen, call) == ("ping" in call)
    for bad in (
        FINAL + "Hi",
        THOUGHTS + FINAL + "Hi",
        CALL + " ",
        CALL.replace('"city"', '"town"'),
        CALL[:-1],
        "Hi",
    ):
        assert not let_through(required, bad), bad
    assert plan(template, tool_choice="required").keep_special_tokens


def test_auto_leaves_text_free(template: ChatTemplate) -> None:
    made = plan(template)
    assert made.optional and made.guide is not None
    for good in (FINAL + "Hi {", THOUGHTS + FINAL, THOUGHTS + CALL, PREAMBLE + CALL):
        assert let_through(made.guide, good), good
    for bad in (CALL.replace("get_weather", "other"), THOUGHTS + CALL.replace("2", "20")):
        assert not let_through(made.guide, bad), bad


def test_a_form_is_for_what_the_user_sees(template: ChatTemplate) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    alone = in_final_channel(Guide("json_schema", json.dumps(schema)), template.special_ids)
    beside = plan(template, guided_json=schema).guide
    assert beside is not None and beside.beside(Reasoning.CHANNELS) is beside
    for guide in (alone, beside):
        assert let_through(guide, THOUGHTS + FINAL + '{"a": 1}')
        assert not let_through(guide, THOUGHTS + FINAL + '{"a": "x"}') and not let_through(guide, '{"a": 1}')
        grammar.check(request.Guide(guide.type, guide.text))
    assert let_through(beside, CALL) and not let_through(alone, CALL)


def test_what_was_said_comes_back_in_its_channels(template: ChatTemplate) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "ping", "arguments": '{"a": 1}'}}
    turns = [
        USER,
        {"role": "assistant", "content": None, "reasoning_content": "I ping.", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "pong"},
    ]
    prompt = template.render(parse_messages(turns), tools=TOOLS)
    assert prompt.endswith(
        "<|start|>assistant<|channel|>analysis<|message|>I ping.<|end|>"
        '<|start|>assistant to=functions.ping<|channel|>commentary json<|message|>{"a": 1}<|call|>'
        '<|start|>functions.ping to=assistant<|channel|>commentary<|message|>"pong"<|end|><|start|>assistant'
    )
    turns[1]["content"] = "One moment."
    prompt = template.render(parse_messages(turns), tools=TOOLS)
    assert (
        "<|channel|>analysis<|message|>I ping.\nOne moment.<|end|><|start|>assistant to=functions.ping"
        in prompt
    )


def test_several_calls_are_said_one_after_the_other(template: ChatTemplate) -> None:
    """Each with its own result, in whichever order those stand; thoughts come once."""
    calls = [
        {"id": name, "type": "function", "function": {"name": name, "arguments": {}}}
        for name in ("ping", "get_weather")
    ]
    turns = [
        USER,
        {"role": "assistant", "content": None, "reasoning_content": "Two.", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "get_weather", "content": "warm"},
        {"role": "tool", "tool_call_id": "ping", "content": "pong"},
        {"role": "user", "content": "And?"},
    ]
    prompt = template.render(parse_messages(turns), tools=TOOLS)
    said = "".join(
        f"<|start|>assistant to=functions.{name}<|channel|>commentary json<|message|>{{}}<|call|>"
        f'<|start|>functions.{name} to=assistant<|channel|>commentary<|message|>"{result}"<|end|>'
        for name, result in (("ping", "pong"), ("get_weather", "warm"))
    )
    thought = "<|start|>assistant<|channel|>analysis<|message|>Two.<|end|>"
    assert prompt.endswith(f"{thought}{said}<|start|>user<|message|>And?<|end|><|start|>assistant")
    turns[2]["tool_call_id"] = "other"
    with pytest.raises(
        RequestError, match=r"messages\[2\].tool_call_id is 'other': it must be the id of one"
    ):
        template.render(parse_messages(turns), tools=TOOLS)


def test_no_instruction_is_left_out(template: ChatTemplate) -> None:
    """The template shows one, before all other messages."""
    told = [{"role": role, "content": f"I am {role}."} for role in ("system", "developer")]
    prompt = template.render(parse_messages([*told, USER]))
    assert "<|start|>developer<|message|>I am system.\n\nI am developer.<|end|><|start|>user" in prompt
    with pytest.raises(RequestError, match=r"messages\[1\].role is system.*put it at the beginning"):
        template.render(parse_messages([USER, *told]))


@pytest.mark.parametrize("effort", ["low", "medium", "high", "none", "low<|end|>", None])
def test_efforts_are_those_that_the_model_knows(model: ServedModel, effort: str | None) -> None:
    body = {"messages": [USER], "reasoning_effort": effort}
    if effort in ("low", "medium", "high", None):
        assert of_chat(body, model, "1").requests
    else:
        with pytest.raises(
            RequestError, match=r"reasoning_effort is .*: it must be one of low, medium, high"
        ):
            of_chat(body, model, "1")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> ServedModel:
    folder = tmp_path_factory.mktemp("served")
    templates.save(folder, templates.ALL["harmony"], templates.HARMONY_TOKENS)
    upstream = Upstream("", tokenizer_dir=str(folder), model="tiny", max_seq_len=4096)
    return ServedModel(GatewaySettings(), upstream)


def test_thoughts_are_counted_without_their_markers(model: ServedModel) -> None:
    """Of all that a model writes, whole and streamed, however many tokens travel together; a call is none."""
    tokens = model.vocabulary.encode_prompt(THOUGHTS + PREAMBLE + THOUGHTS + CALL, False)
    thoughts = 2 * len(model.vocabulary.encode_prompt("The user wants\nthe weather.", False))
    asked: dict[str, Any] = {"messages": [USER], "tools": TOOLS}
    spelled = model.vocabulary.bytes.with_special
    for size in (1, 3, len(tokens)):
        parts = [tokens[at : at + size] for at in range(0, len(tokens), size)]
        pieces = [Piece(0, spelled.decode(part), token_ids=part) for part in parts]
        pieces[-1].finish_reason, pieces[-1].num_output_tokens = "stop", len(tokens)
        whole = ChatWhole(of_chat(asked, model, "1"), model)
        whole.feed(pieces)
        usage = json.loads(whole.body())["usage"]
        assert usage["completion_tokens"] == len(tokens)
        assert usage["completion_tokens_details"] == {"reasoning_tokens": thoughts}
        told = WholeResponse(of_chat(asked, model, "1"), model, {})
        told.feed(pieces)
        usage = json.loads(told.body())["usage"]
        assert usage["output_tokens_details"] == {"reasoning_tokens": thoughts}


def asked(job: Job) -> dict[str, bytes]:
    """What Triton is asked, by tensor."""
    message = service_pb2.ModelInferRequest.FromString(job.requests[0])
    return dict(zip((tensor.name for tensor in message.inputs), message.raw_input_contents, strict=True))


def test_markers_are_spelled_and_ends_end(model: ServedModel) -> None:
    body = {"messages": [USER], "response_format": {"type": "json_object"}, "stop_token_ids": [5]}
    tensors = asked(of_chat(body, model, "1"))
    assert tensors["skip_special_tokens"] == b"\0"
    assert list(memoryview(tensors["stop_token_ids"]).cast("i")) == [5, *model.template.ends]
    assert b'"final"' in tensors["guided_decoding_guide"]
    required = asked(of_chat({"messages": [USER], "tools": TOOLS, "tool_choice": "required"}, model, "1"))
    assert b"functions.ping" in required["guided_decoding_guide"]


@pytest.mark.parametrize("shown", [True, False])
def test_an_answer_as_the_sdk_sees_it(model: ServedModel, shown: bool) -> None:
    """Whole, and put together from events; thoughts may be left out."""
    body = {"messages": [USER], "tools": TOOLS, "include_reasoning": shown}
    text = THOUGHTS + PREAMBLE + CALL
    pieces = [Piece(0, text[at : at + 7], at) for at in range(0, len(text), 7)]
    pieces[-1] = replace(pieces[-1], finish_reason="stop")
    whole = ChatWhole(of_chat(body, model, "1"), model)
    whole.feed(pieces)
    (choice,) = json.loads(whole.body())["choices"]
    message = choice["message"]
    assert choice["finish_reason"] == "tool_calls" and message["content"] == "I look it up."
    assert message.get("reasoning_content") == ("The user wants\nthe weather." if shown else None)
    (call,) = message["tool_calls"]
    assert call["function"] == {"name": "get_weather", "arguments": CITY}

    stream = ChatStream(of_chat({**body, "stream": True}, model, "1"), model)
    sent = stream.open() + b"".join(stream.feed([piece]) for piece in pieces) + stream.close()
    events = [json.loads(line[6:]) for line in sent.decode().split("\n\n") if line.startswith("data: {")]
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert "".join(delta.get("content") or "" for delta in deltas) == "I look it up."
    thoughts = "".join(delta.get("reasoning_content") or "" for delta in deltas)
    assert thoughts == ("The user wants\nthe weather." if shown else "")
    functions = [call["function"] for delta in deltas for call in delta.get("tool_calls") or ()]
    assert [function["name"] for function in functions if "name" in function] == ["get_weather"]
    assert "".join(function.get("arguments", "") for function in functions) == CITY
