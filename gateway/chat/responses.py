"""OpenAI's Responses API, stateless, told in terms of a chat request.

Fields, items and events are those of https://platform.openai.com/docs/api-reference/responses.
"""

from __future__ import annotations

import copy
import secrets
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from flightline.gateway.chat.errors import invalid, shown
from flightline.gateway.chat.parsers import Delta

Event = tuple[str, dict[str, Any]]
"""The ``event:`` name and the object of its ``data:`` line."""

MEMORY = ("previous_response_id", "conversation", "prompt")
"""Fields that name something which a server would have to remember."""
NO_PLACE = ("messages", "logprobs", "top_logprobs", "return_token_ids", "return_tokens_as_token_ids")
"""Fields of chat that would have no effect, or whose answer has no place in a response."""
HARMLESS_INCLUDES = frozenset({"reasoning.encrypted_content"})
"""Thoughts stand in the open in the answer's items."""
TRANSLATED = frozenset(
    {"input", "instructions", "max_output_tokens", "text", "tools", "tool_choice", "reasoning"}
    | {
        "truncation",
        "include",
        "store",
        "background",
        "top_logprobs",
        "max_tool_calls",
        "stream_options",
        *MEMORY,
    }
)
"""Fields of a Responses request that chat spells differently or does not have; all others are chat's own."""


def to_chat(body: Any) -> dict[str, Any]:
    """The chat request that a Responses request means.

    Raises:
        RequestError: names a field that a server without memory or a single answer cannot honour, or a malformed one.
    """
    if not isinstance(body, Mapping):
        raise invalid("the body must be a JSON object")
    _refuse_what_needs_more(body)
    chat = {name: value for name, value in body.items() if name not in TRANSLATED}
    chat["messages"] = list(_messages(body))
    if (limit := body.get("max_output_tokens")) is not None:
        chat["max_completion_tokens"] = limit
    if (tools := body.get("tools")) not in (None, []):  # the SDKs of agents send an empty list
        chat["tools"] = _tools(tools)
    if (choice := body.get("tool_choice")) is not None and (
        "tools" in chat or choice not in ("auto", "none")
    ):
        chat["tool_choice"] = _tool_choice(choice)
    if (layout := _object(body, "text").get("format")) is not None:
        chat["response_format"] = _response_format(layout)
    if (effort := _object(body, "reasoning").get("effort")) is not None:
        chat["reasoning_effort"] = effort
    return chat


def _refuse_what_needs_more(body: Mapping[str, Any]) -> None:
    for field in MEMORY:
        if body.get(field) is not None:
            raise invalid(
                f"{field} is not supported: this server keeps nothing, so send all items in input each time"
            )
    if body.get("background"):
        raise invalid("background is not supported: the answer comes in the response, or as a stream")
    if body.get("truncation") not in (None, "disabled"):
        raise invalid(
            f"truncation is {shown(body['truncation'])}: it must be disabled, nothing is left out of input"
        )
    include = body.get("include") or []
    if not isinstance(include, list):
        raise invalid(f"include is {shown(include)}: it must be a list")
    for name in include:
        if name not in HARMLESS_INCLUDES:
            raise invalid(f"include holds {shown(name)}, which is not supported")
    if body.get("n") not in (None, 1):
        raise invalid(f"n is {shown(body['n'])}: a response is one answer, /v1/chat/completions has several")
    for field in NO_PLACE:
        if body.get(field):
            raise invalid(f"{field} is not supported here: /v1/chat/completions has it")
    if body.get("max_tool_calls") is not None:
        raise invalid("max_tool_calls is not supported: it limits built-in tools, and this server has none")


def _object(body: Mapping[str, Any], field: str) -> Mapping[str, Any]:
    value = body.get(field)
    if value is not None and not isinstance(value, Mapping):
        raise invalid(f"{field} is {shown(value)}: it must be an object")
    return value or {}


def _messages(body: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    if (instructions := body.get("instructions")) is not None:
        if not isinstance(instructions, str):
            raise invalid(f"instructions is {shown(instructions)}: it must be text")
        yield {"role": "system", "content": instructions}
    given = body.get("input")
    if isinstance(given, str):
        yield {"role": "user", "content": given}
        return
    if not isinstance(given, list) or not given:
        raise invalid(f"input is {shown(given)}: it must be text or a list of items")
    turn: dict[str, Any] = {}
    """The assistant's message that thoughts, text and calls, which are items of their own here, are put together in."""
    for index, item in enumerate(given):
        said = _item(item, f"input[{index}]")
        follows = said["role"] == "assistant" and (
            "tool_calls" in said or not turn.keys() & {"content", "tool_calls"}
        )
        if not follows:
            yield from _whole(turn)
            turn = {}
        if said["role"] != "assistant":
            yield said
            continue
        turn = _joined(turn, said)
    yield from _whole(turn)


def _joined(turn: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """The assistant's message with one more item of it: of thoughts and calls there may be several."""
    made = {**turn, **said}
    if calls := [*turn.get("tool_calls", ()), *said.get("tool_calls", ())]:
        made["tool_calls"] = calls
    thoughts = [part["reasoning_content"] for part in (turn, said) if part.get("reasoning_content")]
    if thoughts:
        made["reasoning_content"] = "\n".join(thoughts)
    return made


def _whole(turn: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The message, if there is one; thoughts alone are one without text."""
    if turn:
        yield turn if turn.keys() & {"content", "tool_calls"} else {**turn, "content": ""}


def _item(item: Any, where: str) -> dict[str, Any]:
    """The message, or the part of the assistant's message, that an input item is."""
    if not isinstance(item, Mapping):
        raise invalid(f"{where} is {shown(item)}: it must be an object")
    kind = item.get("type", "message")
    if kind == "message":
        return {"role": item.get("role"), "content": item.get("content")}
    if kind == "function_call":
        function = {"name": item.get("name"), "arguments": item.get("arguments")}
        call = {"id": item.get("call_id"), "type": "function", "function": function}
        return {"role": "assistant", "tool_calls": [call]}
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": item.get("output")}
    if kind == "reasoning":
        parts = item.get("content") or item.get("summary") or []
        if not isinstance(parts, list) or not all(isinstance(part, Mapping) for part in parts):
            raise invalid(f"{where}.content is {shown(parts)}: it must be a list of parts")
        texts = [part.get("text", "") for part in parts]
        if odd := [text for text in texts if not isinstance(text, str)]:
            raise invalid(f"{where}.content has the text {shown(odd[0])}: it must be text")
        return {"role": "assistant", "reasoning_content": "\n".join(texts)}
    raise invalid(
        f"{where}.type is {shown(kind)}: it must be one of message, function_call, function_call_output, reasoning"
    )


def _tools(tools: Any) -> list[dict[str, Any]]:
    if not isinstance(tools, list):
        raise invalid(f"tools is {shown(tools)}: it must be a list")
    found = []
    for index, tool in enumerate(tools):
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            kind = tool.get("type") if isinstance(tool, Mapping) else tool
            raise invalid(f"tools[{index}].type is {shown(kind)}: only function is supported")
        function = {key: value for key, value in tool.items() if key != "type"}
        found.append({"type": "function", "function": function})
    return found


def _tool_choice(choice: Any) -> Any:
    """As chat has it."""
    if not isinstance(choice, Mapping):
        return choice
    kind = choice.get("type")
    if kind == "allowed_tools":
        tools = choice.get("tools")
        named = [_named(tool) for tool in tools] if isinstance(tools, list) else tools
        return {"type": kind, "allowed_tools": {"mode": choice.get("mode"), "tools": named}}
    if kind != "function":
        raise invalid(f"tool_choice.type is {shown(kind)}: only function and allowed_tools are supported")
    return _named(choice)


def _named(tool: Any) -> Any:
    if not isinstance(tool, Mapping) or tool.get("type") != "function":
        return tool
    return {"type": "function", "function": {"name": tool.get("name")}}


def _response_format(layout: Any) -> Any:
    if not isinstance(layout, Mapping) or layout.get("type") != "json_schema":
        return layout
    return {
        "type": "json_schema",
        "json_schema": {key: value for key, value in layout.items() if key != "type"},
    }


class ResponseStream:
    """The events of one response, and the whole object for a client that does not stream."""

    def __init__(self, request_body: Mapping[str, Any], response_id: str, created: float, model: str) -> None:
        """
        Args:
            request_body: the Responses request, parts of which are echoed.
            response_id: ``resp_...``.
            created: Unix time in seconds.
            model: name that is echoed.
        """

        def echoed(field: str, default: Any) -> Any:
            value = request_body.get(field)
            return default if value is None else value

        self._response: dict[str, Any] = {
            "id": response_id,
            "object": "response",
            "created_at": created,
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": request_body.get("instructions"),
            "max_output_tokens": request_body.get("max_output_tokens"),
            "metadata": echoed("metadata", {}),
            "model": model,
            "output": [],
            "parallel_tool_calls": echoed("parallel_tool_calls", True),
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None, **echoed("reasoning", {})},
            "service_tier": "default",
            "store": False,
            "temperature": echoed("temperature", 1.0),
            "text": {"format": {"type": "text"}, **echoed("text", {})},
            "tool_choice": echoed("tool_choice", "auto"),
            "tools": echoed("tools", []),
            "top_p": echoed("top_p", 1.0),
            "truncation": "disabled",
            "usage": None,
            "user": request_body.get("user"),
        }
        self._events = 0
        self._item: dict[str, Any] | None = None
        """The open output item: the last of the response's."""
        self._text: list[str] = []
        """What the open item's deltas have said."""

    def start(self) -> list[Event]:
        """``response.created`` and ``response.in_progress``."""
        return [self._whole("response.created"), self._whole("response.in_progress")]

    def feed(self, deltas: Sequence[Delta]) -> list[Event]:
        """The events of what ``OutputParser`` returned."""
        return [event for delta in deltas for event in self._of(delta)]

    def finish(self, finish_reason: str, usage: Mapping[str, Any]) -> list[Event]:
        """Closes the open item; ``response.completed``, or ``response.incomplete`` for ``length``.

        Args:
            finish_reason: of chat: ``stop``, ``length``, ``tool_calls``.
            usage: of chat: ``prompt_tokens``, ``completion_tokens``, ...
        """
        status = "incomplete" if finish_reason == "length" else "completed"
        events = [] if self._response["output"] else list(self._open("message"))
        events += self._close(status)
        self._response |= {"status": status, "usage": _usage(usage)}
        if status == "incomplete":
            self._response["incomplete_details"] = {"reason": "max_output_tokens"}
        return [*events, self._whole(f"response.{status}")]

    def fail(self, error: Mapping[str, Any]) -> list[Event]:
        """``error``, then ``response.failed``; ``error`` is the inner object of OpenAI's envelope."""
        closing = list(self._close("incomplete"))
        message, code = error.get("message"), error.get("code")
        told = self._event(
            "error", code=None if code is None else str(code), message=message, param=error.get("param")
        )
        self._response |= {"status": "failed", "error": {"code": "server_error", "message": message}}
        return [*closing, told, self._whole("response.failed")]

    def response(self) -> dict[str, Any]:
        """The response object as it stands; whole after ``finish`` or ``fail``."""
        return copy.deepcopy(self._response)

    def _of(self, delta: Delta) -> Iterator[Event]:
        kind = {"text": "message", "reasoning": "reasoning"}.get(delta.kind, "function_call")
        if delta.kind == "tool_start":
            yield from self._close("completed")
            yield from self._open(kind, call_id=delta.call_id, name=delta.name, arguments="")
            return
        if self._item is None or self._item["type"] != kind:
            yield from self._close("completed")
            yield from self._open(kind)
        self._text.append(delta.text)
        if kind == "message":
            yield self._in_part("response.output_text.delta", delta=delta.text, logprobs=[])
        elif kind == "reasoning":
            yield self._in_part("response.reasoning_text.delta", delta=delta.text)
        else:
            yield self._in_item("response.function_call_arguments.delta", delta=delta.text)

    def _open(self, kind: str, **fields: Any) -> Iterator[Event]:
        """Adds an item and its one part."""
        prefix = {"message": "msg_", "reasoning": "rs_", "function_call": "fc_"}[kind]
        self._item = {"id": prefix + secrets.token_hex(16), "type": kind, "status": "in_progress", **fields}
        if kind == "message":
            self._item |= {"role": "assistant", "content": []}
        elif kind == "reasoning":
            self._item |= {"summary": [], "content": []}
        self._text = []
        self._response["output"].append(self._item)
        yield self._event(
            "response.output_item.added", output_index=self._index, item=copy.deepcopy(self._item)
        )
        if kind != "function_call":
            yield self._in_part("response.content_part.added", part=_part(kind, ""))

    def _close(self, status: str) -> Iterator[Event]:
        """Completes the open item, if there is one."""
        item, text = self._item, "".join(self._text)
        if item is None:
            return
        kind = item["type"]
        item["status"] = status
        if kind == "function_call":
            item["arguments"] = text
            yield self._in_item("response.function_call_arguments.done", name=item["name"], arguments=text)
        else:
            part = _part(kind, text)
            item["content"] = [part]
            if kind == "message":
                yield self._in_part("response.output_text.done", text=text, logprobs=[])
            else:
                yield self._in_part("response.reasoning_text.done", text=text)
            yield self._in_part("response.content_part.done", part=copy.deepcopy(part))
        yield self._event("response.output_item.done", output_index=self._index, item=copy.deepcopy(item))
        self._item = None

    @property
    def _index(self) -> int:
        return len(self._response["output"]) - 1

    def _whole(self, kind: str) -> Event:
        return self._event(kind, response=self.response())

    def _in_item(self, kind: str, **fields: Any) -> Event:
        assert self._item is not None
        return self._event(kind, item_id=self._item["id"], output_index=self._index, **fields)

    def _in_part(self, kind: str, **fields: Any) -> Event:
        return self._in_item(kind, content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> Event:
        event = {"type": kind, "sequence_number": self._events, **fields}
        self._events += 1
        return kind, event


def _part(kind: str, text: str) -> dict[str, Any]:
    if kind == "reasoning":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def _usage(usage: Mapping[str, Any]) -> dict[str, Any]:
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    thought = (usage.get("completion_tokens_details") or {}).get("reasoning_tokens") or 0
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": thought},
        "total_tokens": usage["prompt_tokens"] + usage["completion_tokens"],
    }
