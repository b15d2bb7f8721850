"""``tools``, ``tool_choice`` and ``parallel_tool_calls``: what is offered, and how the answer is guided and read."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flightline.gateway.chat import grammars
from flightline.gateway.chat.errors import invalid, shown
from flightline.gateway.chat.guides import FIELDS, Guide, Reasoning, response_format
from flightline.gateway.chat.parsers import FORMATS, OutputParser
from flightline.gateway.chat.template import ChatTemplate
from flightline.torch_engine.core.grammar import MOST_BYTES

Choice = Literal["none", "auto", "required", "named"]
MOST_TOOLS = 128
"""As many as OpenAI takes."""
ROOM = 256
"""Bytes that ``Guide.beside`` may add."""
ANYTHING = {"type": "object"}
"""Parameters that are free."""
MARKED_BY_SPECIAL_TOKENS = frozenset({"mistral", "mistral_v11", "harmony"})


@dataclass(frozen=True)
class ToolPlan:
    """What a request's tools mean for the prompt, for sampling and for reading the answer."""

    tools: list[dict[str, Any]] | None = None
    """For the template; None if it is not to show any."""
    choice: Choice = "none"
    name: str | None = None
    """The tool of ``choice == "named"``."""
    parallel: bool = True
    """More than one call in an answer is allowed."""
    format: str | None = None
    """How the model writes calls; None if no call is to be looked for."""
    guide: Guide | None = None
    optional: bool = False
    """The guide only prevents malformed calls (``auto``): where it cannot be enforced it may be left out."""
    keep_special_tokens: bool = False
    """The calls are marked by special tokens, so the text must spell them (``skip_special_tokens`` false)."""
    calls: grammars.Calls | None = dataclasses.field(default=None, compare=False)
    """What ``guide`` was made of."""

    def loosened(self, can_enforce: Callable[[Guide], bool]) -> Guide | None:
        """The guide with the arguments of those tools left free whose parameters cannot be enforced."""
        if self.calls is None:
            return None
        functions = [
            function if can_enforce(_parameters(function)) else {**function, "parameters": ANYTHING}
            for function in self.calls.functions
        ]
        return dataclasses.replace(self.calls, functions=functions).allowed()

    def refuse_by_name(self, why_not: Callable[[Guide], str]) -> None:
        """Raises RequestError: names the first tool that may be called and whose parameters cannot be enforced."""
        functions = self.calls.functions if self.calls is not None else []
        names = [tool["function"]["name"] for tool in self.tools or []]
        for function in functions:
            if problem := why_not(_parameters(function)):
                raise invalid(f"tools[{names.index(function['name'])}].function.parameters {problem}")

    def parser(self, reasoning: Reasoning = Reasoning.NONE) -> OutputParser:
        """A parser for one answer."""
        return OutputParser(
            self.format,
            self.tools,
            reasoning,
            named=self.choice == "named",
            demanded=self.choice in ("named", "required"),
            parallel=self.parallel,
        )


def parse_tools(body: Mapping[str, Any], template: ChatTemplate) -> ToolPlan:
    """The plan of a chat request.

    A guide of ``response_format`` and tools that may be called are put together: the answer is calls or that. Where a
    call is demanded there is no other answer.

    Raises:
        RequestError: names the field; also where the template has no place for tools or writes calls in an
            unknown form.
    """
    for field in ("functions", "function_call"):
        if body.get(field) is not None:
            raise invalid(f"{field} is not supported: use tools and tool_choice")
    parallel = body.get("parallel_tool_calls")
    if not isinstance(parallel, bool | None):
        raise invalid(f"parallel_tool_calls is {shown(parallel)}: it must be true or false")
    if body.get("tools") is None:
        if body.get("tool_choice") not in (None, "none"):
            raise invalid(f"tool_choice is {shown(body['tool_choice'])}, but there are no tools")
        return ToolPlan()
    tools = [_tool(tool, f"tools[{index}]") for index, tool in enumerate(_list(body["tools"]))]
    names = [tool["function"]["name"] for tool in tools]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise invalid(f"tools has two functions named {twice}: names must differ")
    choice, callable_names = _choice(body.get("tool_choice"), names)
    if choice == "none":
        return ToolPlan()
    tool_format = _format(template)
    calls = grammars.calls(
        tool_format,
        [tool["function"] for tool in tools if tool["function"]["name"] in callable_names],
        many=parallel is not False and choice != "named",
        special_ids=template.special_ids,
    )
    answer = response_format(body)
    guide: Guide | None
    if choice != "auto":
        if answer is not None and not _is_of_content(body):
            raise invalid(
                f"tool_choice {shown(body['tool_choice'])} asks for a call: "
                "leave out what says that the answer looks otherwise (structured_outputs and the like)"
            )
        guide = calls.required()
    else:
        guide = calls.allowed() if answer is None else calls.instead_of(answer)
    every_one = len(callable_names) == len(names)
    optional = choice == "auto" and answer is None and every_one and not any(_strict(tool) for tool in tools)
    if guide is not None and not optional and (size := len(guide.text.encode()) + ROOM) > MOST_BYTES:
        raise invalid(
            f"tools: their parameters make a grammar of {size} bytes, and {MOST_BYTES} is the most that can be "
            "enforced; offer fewer or smaller ones, or leave the choice to the model (tool_choice auto, no strict)"
        )
    return ToolPlan(
        tools=tools,
        choice=choice,
        name=callable_names[0] if choice == "named" else None,
        parallel=parallel is not False,
        format=tool_format,
        guide=guide,
        optional=optional,
        keep_special_tokens=tool_format in MARKED_BY_SPECIAL_TOKENS,
        calls=calls,
    )


def _is_of_content(body: Mapping[str, Any]) -> bool:
    """Whether only OpenAI's ``response_format`` says what the answer is to look like: it means the content, which a
    message of calls has not. Libraries send it along with the tool that they demand."""
    others = [field for field in FIELDS if field != "response_format" and body.get(field) is not None]
    return not others and body["response_format"]["type"] != "structural_tag"


def _parameters(function: Mapping[str, Any]) -> Guide:
    return Guide("json_schema", json.dumps(function["parameters"]))


def _list(tools: Any) -> list[Any]:
    if not isinstance(tools, list) or not 1 <= len(tools) <= MOST_TOOLS:
        raise invalid(f"tools is {shown(tools)}: it must be a list of 1 to {MOST_TOOLS} tools")
    return tools


def _tool(tool: Any, where: str) -> dict[str, Any]:
    """The tool as the client wrote it, with the parameters that templates count on."""
    kind = tool.get("type") if isinstance(tool, dict) else None
    if kind != "function":
        raise invalid(f"{where}.type is {shown(kind)}: it must be function")
    function = tool.get("function")
    if not isinstance(function, dict):
        raise invalid(f"{where}.function is {shown(function)}: it must be an object with name and parameters")
    name = function.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_-]{1,64}", name):
        raise invalid(f"{where}.function.name is {shown(name)}: it must be 1 to 64 of A-Z, a-z, 0-9, _ and -")
    for field, kind in (("description", str), ("parameters", dict), ("strict", bool)):
        if not isinstance(function.get(field), kind | None):
            raise invalid(f"{where}.function.{field} is {shown(function[field])}: it must be {WORDS[kind]}")
    given = function.get("parameters") or {}
    parameters = {field: value for field, value in given.items() if value is not None}
    if parameters.get("type", "object") != "object":
        raise invalid(f"{where}.function.parameters.type is {shown(parameters['type'])}: it must be object")
    for field, kind in (("properties", dict), ("required", list)):
        if not isinstance(parameters.get(field), kind | None):
            raise invalid(
                f"{where}.function.parameters.{field} is {shown(parameters[field])}: it must be {WORDS[kind]}"
            )
    whole = {"type": "object", "properties": {}, **parameters}
    return {**tool, "function": {**function, "parameters": whole}}


WORDS = {str: "text", dict: "an object", list: "a list", bool: "true or false"}


def _strict(tool: Mapping[str, Any]) -> bool:
    return bool(tool["function"].get("strict"))


def _choice(choice: Any, names: list[str]) -> tuple[Choice, list[str]]:
    """And which of the tools may be called: the model sees all of them."""
    if choice is None:
        return "auto", names
    if choice in ("none", "auto", "required"):
        return choice, names
    kind = choice.get("type") if isinstance(choice, dict) else None
    if kind == "allowed_tools":
        return _allowed(choice.get("allowed_tools"), names)
    name = _named(choice) if kind == "function" else None
    if name is None:
        raise invalid(
            f"tool_choice is {shown(choice)}: it must be none, auto, required, "
            '{"type": "function", "function": {"name": ...}} or {"type": "allowed_tools", "allowed_tools": ...}'
        )
    return "named", [_known(name, names)]


def _allowed(allowed: Any, names: list[str]) -> tuple[Choice, list[str]]:
    """OpenAI's ``allowed_tools``: these only, as ``mode`` says."""
    mode = allowed.get("mode") if isinstance(allowed, dict) else None
    if mode not in ("auto", "required"):
        raise invalid(f"tool_choice.allowed_tools.mode is {shown(mode)}: it must be auto or required")
    tools = allowed.get("tools")
    if not isinstance(tools, list) or not tools:
        raise invalid(
            f"tool_choice.allowed_tools.tools is {shown(tools)}: it must be a list of tools that may be called"
        )
    found = [_named(tool) for tool in tools]
    if None in found:
        raise invalid(
            f"tool_choice.allowed_tools.tools[{found.index(None)}] is {shown(tools[found.index(None)])}: "
            'it must be {"type": "function", "function": {"name": ...}}'
        )
    chosen = {_known(name, names) for name in found if name is not None}
    return mode, [name for name in names if name in chosen]


def _named(tool: Any) -> str | None:
    """The function that is named in ``{"type": "function", "function": {"name": ...}}``."""
    function = tool.get("function") if isinstance(tool, dict) and tool.get("type") == "function" else None
    name = function.get("name") if isinstance(function, dict) else None
    return name if isinstance(name, str) else None


def _known(name: str, names: list[str]) -> str:
    if name not in names:
        raise invalid(f"tool_choice names {shown(name)}: it must be one of {', '.join(names)}")
    return name


def _format(template: ChatTemplate) -> str:
    if not template.supports_tools:
        raise invalid(
            "tools: the chat template of this model has no place for tools; leave them out, or set tool_choice none"
        )
    if template.tool_format is None:
        raise invalid(
            "tools: the chat template of this model writes calls in a form that is not known here; "
            f"if it is one of {', '.join(FORMATS)}, the server can be told so"
        )
    return template.tool_format
