"""What the answer must look like: NVIDIA's pair of guided-decoding tensors, as ``response_format`` and its kin ask."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from flightline.gateway.chat.errors import invalid, shown
from flightline.torch_engine.core.grammar import asks_for_nothing


class Reasoning(StrEnum):
    """Where an answer begins."""

    NONE = "none"
    """In the answer: the model does not think aloud, or the prompt has closed its thoughts."""
    POSSIBLE = "possible"
    """The model may open ``<think>`` first."""
    OPEN = "open"
    """Inside ``<think>``, which the prompt has opened."""
    CHANNELS = "channels"
    """At the head of a message that names its channel, as OpenAI's harmony format has it."""


THOUGHTS = {
    Reasoning.POSSIBLE: 'start: ("<think>" thoughts SPACE)? answer',
    Reasoning.OPEN: "start: thoughts SPACE answer",
}


@dataclass(frozen=True)
class Guide:
    """``type`` and ``text`` go into ``guided_decoding_guide_type`` and ``guided_decoding_guide``."""

    type: str
    """``json_schema``, ``regex``, ``ebnf_grammar``, ``lark`` (llguidance's dialect) or ``structural_tag``."""
    text: str

    def beside(self, reasoning: Reasoning) -> Guide:
        """The same guide for an answer that may have thoughts before it, which stay free.

        A guide for channels has them in itself already (``grammars.py``).

        Raises:
            RequestError: a guide type that cannot be put behind thoughts.
        """
        if reasoning in (Reasoning.NONE, Reasoning.CHANNELS):
            return self
        rules = [
            THOUGHTS[reasoning],
            'thoughts[suffix="</think>"]: /(?s:.*)/',
            "SPACE: /[ \\n]{0,4}/",
            f"answer: {self.as_lark()}",
        ]
        return Guide("lark", "\n".join(rules) + "\n")

    def as_lark(self) -> str:
        """An expression of llguidance's dialect that is equal to this guide.

        Raises:
            RequestError: a guide type that has no such expression.
        """
        if self.type == "json_schema":
            return json_expression(json.loads(self.text))
        if self.type == "regex":
            return _regex_literal(self.text)
        if self.type == "lark":
            return "%lark {\n" + self.text + "\n}"
        raise invalid(
            f"structured output of type {self.type} cannot follow thoughts or stand beside tool calls: "
            "use json_schema, regex or a Lark grammar, or switch thinking off"
        )


STYLE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as ``tojson`` writes it into prompts; and no white space without end."""


def json_expression(schema: Any) -> str:
    """The values of a JSON schema, in the style of prompts, in llguidance's dialect."""
    if not isinstance(schema, Mapping):
        schema = {} if schema else {"not": {}}
    return "%json " + json.dumps({**_bare(schema), "x-guidance": STYLE}, separators=(",", ":"))


REMARKS = frozenset(
    {"title", "description", "default", "example", "examples", "$schema", "$comment", "deprecated"}
)
"""Keywords for readers."""
NAMED_SCHEMAS = frozenset({"properties", "patternProperties", "$defs", "definitions"})
"""Keywords whose keys are names, so that one of them may well be ``title``."""


def _bare(schema: Any) -> Any:
    """The schema without what asks for nothing, as do remarks, which the prompt has shown: grammars have a limit."""
    if isinstance(schema, list):
        return [_bare(item) for item in schema]
    if not isinstance(schema, Mapping):
        return schema
    found = {}
    for key, value in schema.items():
        if key in NAMED_SCHEMAS and isinstance(value, Mapping):
            found[key] = {name: _bare(inner) for name, inner in value.items()}
        elif key not in REMARKS and not asks_for_nothing(key, value):
            found[key] = value if key in ("enum", "const", "required") else _bare(value)
    return found


def _regex_literal(pattern: str) -> str:
    """``/pattern/``, with the slashes that are not escaped yet."""
    escaped = re.sub(
        r"\\.|/|\n", lambda found: {"/": r"\/", "\n": r"\n"}.get(found[0], found[0]), pattern, flags=re.S
    )
    return f"/{escaped}/"


OBJECT = Guide("json_schema", '{"type": "object"}')
"""OpenAI's ``json_object``; NVIDIA's guide type ``json`` would let a bare number through."""


def response_format(body: Mapping[str, Any]) -> Guide | None:
    """The guide of ``response_format``, ``structured_outputs`` or ``guided_*``; None if the answer is free.

    Raises:
        RequestError: an unknown form, or two that contradict each other.
    """
    given = {field: body[field] for field in FIELDS if body.get(field) is not None}
    guides = {
        field: guide for field, value in given.items() if (guide := FIELDS[field](value, field)) is not None
    }
    if len(guides) > 1:
        raise invalid(f"{' and '.join(guides)} are given: only one may say what the answer looks like")
    return next(iter(guides.values()), None)


def _response_format(value: Any, field: str) -> Guide | None:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return OBJECT
    if kind == "json_schema":
        inner = value.get("json_schema")
        if not isinstance(inner, dict) or "schema" not in inner:
            raise invalid(f"{field}.json_schema.schema is missing: it must be the JSON schema of the answer")
        return _json(inner["schema"], f"{field}.json_schema.schema")
    if kind == "structural_tag":
        return Guide("structural_tag", json.dumps(value))
    raise invalid(
        f"{field}.type is {shown(kind)}: it must be one of text, json_object, json_schema, structural_tag"
    )


def _structured_outputs(value: Any, field: str) -> Guide | None:
    """vLLM's form: exactly one of several, and switches that are refused because they would change the guide."""
    if not isinstance(value, dict):
        raise invalid(f"{field} is {shown(value)}: it must be an object with one of {', '.join(FORMS)}")
    given = [key for key, inner in value.items() if inner is not None and inner is not False]
    for key in given:
        if key not in FORMS:
            raise invalid(f"{field}.{key} is not supported: it must be one of {', '.join(FORMS)}")
    if len(given) != 1:
        raise invalid(
            f"{field} has {', '.join(given) or 'nothing'}: it must have exactly one of {', '.join(FORMS)}"
        )
    return FORMS[given[0]](value[given[0]], f"{field}.{given[0]}")


def _json(value: Any, field: str) -> Guide:
    """A schema, as an object or as JSON text."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError) as error:
            raise invalid(f"{field} is no JSON: {error}") from None
    if not isinstance(value, dict | bool):
        raise invalid(f"{field} is {shown(value)}: it must be a JSON schema")
    return Guide("json_schema", json.dumps(value))


def _regex(value: Any, field: str) -> Guide:
    return Guide("regex", _nonempty(value, field))


def _choice(value: Any, field: str) -> Guide:
    if not isinstance(value, list) or not value:
        raise invalid(f"{field} is {shown(value)}: it must be a list of texts")
    texts = [_nonempty(item, f"{field}[{index}]") for index, item in enumerate(value)]
    return Guide("regex", "|".join(re.sub(r"([\\.+*?()|\[\]{}^$])", r"\\\1", text) for text in texts))


def _grammar(value: Any, field: str) -> Guide:
    """EBNF has ``::=`` where Lark has a colon."""
    text = _nonempty(value, field)
    return Guide("ebnf_grammar" if "::=" in text else "lark", text)


def _json_object(value: Any, field: str) -> Guide | None:
    if not isinstance(value, bool):
        raise invalid(f"{field} is {shown(value)}: it must be true or false")
    return OBJECT if value else None


def _structural_tag(value: Any, field: str) -> Guide:
    if not isinstance(value, dict | str) or not value:
        raise invalid(f"{field} is {shown(value)}: it must be a structural tag, as an object or as JSON text")
    return Guide("structural_tag", value if isinstance(value, str) else json.dumps(value))


def _nonempty(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise invalid(f"{field} is {shown(value)}: it must be a text that is not empty")
    return value


Form = Callable[[Any, str], Guide | None]
FORMS: dict[str, Form] = {
    "json": _json,
    "regex": _regex,
    "choice": _choice,
    "grammar": _grammar,
    "json_object": _json_object,
    "structural_tag": _structural_tag,
}
FIELDS: dict[str, Form] = {
    "response_format": _response_format,
    "structured_outputs": _structured_outputs,
    "guided_json": _json,
    "guided_regex": _regex,
    "guided_choice": _choice,
    "guided_grammar": _grammar,
}
"""Fields of a request body; those named ``guided_`` are vLLM's former ones."""
