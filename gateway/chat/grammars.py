"""Tool calls as grammars, in llguidance's Lark dialect and in the form that the model was trained to write.

https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flightline.gateway.chat.guides import Guide, json_expression


@dataclass(frozen=True)
class Calls(ABC):
    """The calls that an answer may hold."""

    functions: Sequence[Mapping[str, Any]]
    """``{"name", "parameters"}`` each."""
    many: bool
    """Several in one answer."""
    special_ids: Mapping[str, int]
    """Token ids of markers that are special tokens."""

    def required(self) -> Guide:
        """Calls and nothing else."""
        return self._guide("start: calls")

    def allowed(self) -> Guide | None:
        """Free text in which every call is a good one; None where nothing tells calls from text as they begin."""
        return None

    def instead_of(self, answer: Guide) -> Guide:
        """Calls, or an answer that keeps to its guide.

        Raises:
            RequestError: a guide that cannot stand beside others.
        """
        return self._guide("start: calls | answer", f"answer: {answer.as_lark()}")

    def _guide(self, *rules: str) -> Guide:
        return Guide("lark", "\n".join([*rules, *self._rules()]) + "\n")

    @abstractmethod
    def _rules(self) -> list[str]:
        """Definitions of ``calls`` and what it needs."""

    def _objects(self) -> list[str]:
        """``call``: ``{"name": ..., "arguments": {...}}`` of any of the functions."""
        heads = [f'{{"name": {json.dumps(function["name"])}, "arguments": ' for function in self.functions]
        return [
            *_choice("call", [f'{_text(head)} arguments_{index} "}}"' for index, head in enumerate(heads)]),
            *self._arguments(),
        ]

    def _arguments(self) -> list[str]:
        return [
            f"arguments_{index}: {json_expression(function.get('parameters') or {})}"
            for index, function in enumerate(self.functions)
        ]

    def _marker(self, marker: str) -> str:
        """A marker as the model must write it: a special token is not spelled."""
        token = self.special_ids.get(marker)
        return _text(marker) if token is None else f"<[{token}]>"

    def _repeated(self, item: str, separator: str = "") -> str:
        return f"{item} ({separator} {item})*" if self.many else item


class _Marked(Calls):
    """Formats in which a marker stands before every call, so that text may stand around them."""

    marker = ""

    def allowed(self) -> Guide:
        """Free text, and from each marker on a call."""
        rest = "*" if self.many else "?"
        if self.marker in self.special_ids:
            return self._guide(
                f"start: TEXT ({self._marker(self.marker)} body TEXT){rest}", "TEXT: /(?s:.*)/"
            )
        return self._guide(
            f"start: (head body){rest} TEXT", f"head[lazy]: TEXT {_text(self.marker)}", "TEXT: /(?s:.*)/"
        )


class _Hermes(_Marked):
    marker = "<tool_call>"

    def _rules(self) -> list[str]:
        one = f"{self._marker(self.marker)} body"
        body = f'body: "\\n" call "\\n" {self._marker("</tool_call>")}'
        return [f"calls: {self._repeated(one, _text(chr(10)))}", body, *self._objects()]


class _Llama3Json(Calls):
    """Calls are JSON as a whole, so that llguidance can tell them from an answer in JSON after their first bracket."""

    def _rules(self) -> list[str]:
        calls = [json_expression(_called(function)) for function in self.functions]
        return [f"calls: {self._repeated('call', _text('; '))}", *_choice("call", calls)]


def _called(function: Mapping[str, Any]) -> dict[str, Any]:
    """The schema of ``{"name": ..., "parameters": {...}}``; what the parameters refer to moves to its root."""
    parameters = function.get("parameters") or {}
    return {
        "type": "object",
        "properties": {"name": {"const": function["name"]}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
        **_definitions(parameters),
    }


def _definitions(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in ("$defs", "definitions") if key in schema}


class _Mistral(_Marked):
    """One marker before a list of calls."""

    marker = "[TOOL_CALLS]"

    def _rules(self) -> list[str]:
        body = f'body: /[ ]?/ "[" {self._repeated("call", _text(", "))} "]"'
        return [f"calls: {self._marker(self.marker)} body", body, *self._objects()]


class _MistralV11(_Marked):
    """A marker before each call, and its name outside of JSON."""

    marker = "[TOOL_CALLS]"

    def _rules(self) -> list[str]:
        one = f"{self._marker(self.marker)} body"
        between = f"({self._marker('[CALL_ID]')} /[A-Za-z0-9]{{9}}/)? {self._marker('[ARGS]')}"
        bodies = [
            f"{_text(function['name'])} {between} arguments_{index}"
            for index, function in enumerate(self.functions)
        ]
        return [f"calls: {self._repeated(one)}", *_choice("body", bodies), *self._arguments()]


class _Pythonic(Calls):
    """Keyword arguments in the schema's order; their values are JSON, which the parser reads as well as Python."""

    def _rules(self) -> list[str]:
        calls = [
            f'{_text(function["name"] + "(")} first_{index}_0 ")"'
            for index, function in enumerate(self.functions)
        ]
        rules = [f'calls: "[" {self._repeated("call", _text(", "))} "]"', *_choice("call", calls)]
        for index, function in enumerate(self.functions):
            rules += _keywords(index, function.get("parameters") or {})
        return rules


def _keywords(index: int, schema: Mapping[str, Any]) -> list[str]:
    """Rules ``first_I_J`` for what may stand from property J on if nothing is before it, and ``next_I_J`` else."""
    required = set(schema.get("required", ()))
    properties = list(schema.get("properties", {}).items())
    rules = []
    for place, (name, value) in enumerate(properties):
        after = f"next_{index}_{place + 1}"
        value = {**value, **_definitions(schema)} if isinstance(value, Mapping) else value
        rules.append(f"value_{index}_{place}: {json_expression(value)}")
        for rule, comma in (("first", ""), ("next", '", " ')):
            given = f"{comma}{_text(name + '=')} value_{index}_{place} {after}"
            skipped = "" if name in required else f" | {rule}_{index}_{place + 1}"
            rules.append(f"{rule}_{index}_{place}: {given}{skipped}")
    return [*rules, f'first_{index}_{len(properties)}: ""', f'next_{index}_{len(properties)}: ""']


class _Harmony(Calls):
    """One call at the most, which ends the answer; messages of the other channels stay free."""

    def allowed(self) -> Guide:
        return self._guide("start: calls | final TEXT")

    def instead_of(self, answer: Guide) -> Guide:
        return self._guide("start: calls | final answer", f"answer: {answer.as_lark()}")

    def final(self, answer: Guide) -> Guide:
        """No calls."""
        return Guide(
            "lark",
            "\n".join(["start: final answer", f"answer: {answer.as_lark()}", *self._messages()]) + "\n",
        )

    def _rules(self) -> list[str]:
        channel, constrain, message = map(self._marker, ("<|channel|>", "<|constrain|>", "<|message|>"))
        heads = [_text(f"commentary to=functions.{function['name']} ") for function in self.functions]
        calls = [f'{head} {constrain} "json" {message} arguments_{index}' for index, head in enumerate(heads)]
        return [
            f"calls: before* {channel} call",
            *_choice("call", calls),
            *self._arguments(),
            *self._messages(),
        ]

    def _messages(self) -> list[str]:
        channel, message, end, start = map(
            self._marker, ("<|channel|>", "<|message|>", "<|end|>", "<|start|>")
        )
        return [
            f'final: before* {channel} "final" {message}',
            f'before: {channel} /analysis|commentary/ {message} TEXT {end} {start} "assistant"',
            "TEXT: /(?s:.*)/",
        ]


def in_final_channel(answer: Guide, special_ids: Mapping[str, int]) -> Guide:
    """``answer`` for a model that names its channels, as the message that the user sees.

    Raises:
        RequestError: a guide that cannot stand behind others.
    """
    return _Harmony((), False, special_ids).final(answer)


FORMATS: dict[str, type[Calls]] = {
    "hermes": _Hermes,
    "llama3_json": _Llama3Json,
    "pythonic": _Pythonic,
    "mistral": _Mistral,
    "mistral_v11": _MistralV11,
    "harmony": _Harmony,
}


def calls(
    tool_format: str, functions: Sequence[Mapping[str, Any]], *, many: bool, special_ids: Mapping[str, int]
) -> Calls:
    """The calls of ``functions`` in a format of ``parsers.FORMATS``; see the fields of ``Calls``."""
    return FORMATS[tool_format](functions, many, special_ids)


def _choice(name: str, options: list[str]) -> list[str]:
    return [f"{name}: " + " | ".join(f"{name}_{index}" for index in range(len(options)))] + [
        f"{name}_{index}: {option}" for index, option in enumerate(options)
    ]


def _text(text: str) -> str:
    """A literal."""
    return json.dumps(text, ensure_ascii=False)
