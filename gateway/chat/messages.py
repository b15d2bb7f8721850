"""``messages`` of a chat request, checked and in the form that chat templates expect."""

from __future__ import annotations

import json
from typing import Any

from flightline.gateway.chat.errors import invalid, shown

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
"""What a template is told for each role: those that know ``developer`` are few, and to them it is the system's too."""
TEXT_PARTS = {"text": "text", "input_text": "text", "output_text": "text", "refusal": "refusal"}
"""Types of content parts, and the key of each one's text."""
OTHER_PARTS = frozenset(
    {"image_url", "input_image", "input_audio", "audio_url", "video_url", "file", "input_file"}
)


def parse_messages(value: Any) -> list[dict[str, Any]]:
    """The messages for a template: ``developer`` is ``system``, text parts are joined, arguments are objects.

    Raises:
        RequestError: names the message and the field.
    """
    if not isinstance(value, list) or not value:
        raise invalid(f"messages is {shown(value)}: it must be a list of at least one message")
    return [_message(item, f"messages[{index}]") for index, item in enumerate(value)]


def _message(item: Any, where: str) -> dict[str, Any]:
    if not isinstance(item, dict):
        raise invalid(f"{where} is {shown(item)}: it must be an object with role and content")
    role = item.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise invalid(f"{where}.role is {shown(role)}: it must be one of {', '.join(ROLES)}")
    for field in ("function_call", "audio"):
        if item.get(field) is not None:
            raise invalid(f"{where}.{field} is not supported: use tool_calls and text")
    calls = item.get("tool_calls")
    if calls is not None and role != "assistant":
        raise invalid(f"{where}.tool_calls belongs to role assistant, not to {role}")
    said = item.get("content")
    thoughts = _thoughts(item, where) if role == "assistant" else None
    if said is None and not calls and role == "assistant":
        said = "" if item.get("refusal") is None and thoughts else item.get("refusal")
    if said is None and not calls:
        raise invalid(f"{where}.content is missing: it must be text, or a list of text parts")
    message: dict[str, Any] = {"role": ROLES[role], "content": _content(said, f"{where}.content")}
    if (name := item.get("name")) is not None:
        message["name"] = _text(name, f"{where}.name")
    if role == "assistant":
        if thoughts is not None:
            message["reasoning_content"] = thoughts
        if calls:
            message["tool_calls"] = _calls(calls, f"{where}.tool_calls")
    if role == "tool":
        message["tool_call_id"] = _text(item.get("tool_call_id"), f"{where}.tool_call_id")
    return message


def _thoughts(item: dict[str, Any], where: str) -> str | None:
    """Under either of the names that servers give them; a message that was cut in them has nothing else."""
    for field in ("reasoning_content", "reasoning"):
        if (thoughts := item.get(field)) is not None:
            return _text(thoughts, f"{where}.{field}")
    return None


def _content(value: Any, where: str) -> str:
    """One text: templates that take parts take text as well, most others take text only."""
    if value is None:
        return ""
    if not isinstance(value, list):
        return _text(value, where)
    return "\n".join(_part(part, f"{where}[{index}]") for index, part in enumerate(value))


def _part(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind in TEXT_PARTS:
        key = TEXT_PARTS[kind]
        return _text(part.get(key), f"{where}.{key}")
    if isinstance(kind, str) and kind in OTHER_PARTS:
        raise invalid(f"{where}.type is {kind}: this model reads text only")
    raise invalid(f'{where} is {shown(part)}: it must be {{"type": "text", "text": ...}}')


def _text(value: Any, where: str) -> str:
    if not isinstance(value, str):
        raise invalid(f"{where} is {shown(value)}: it must be text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise invalid(f"{where} holds half of a surrogate pair: it must be valid Unicode") from None
    return value


def _calls(value: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(value, list):
        raise invalid(f"{where} is {shown(value)}: it must be a list")
    return [_call(call, f"{where}[{index}]") for index, call in enumerate(value)]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or call.get("type", "function") != "function":
        raise invalid(
            f'{where} is {shown(call)}: it must be {{"id", "type": "function", "function": {{...}}}}'
        )
    name = _text(function.get("name"), f"{where}.function.name")
    arguments = _arguments(function.get("arguments"), f"{where}.function.arguments")
    found = {"type": "function", "function": {"name": name, "arguments": arguments}}
    return found if call.get("id") is None else {"id": _text(call["id"], f"{where}.id"), **found}


def _arguments(value: Any, where: str) -> Any:
    """An object, which most templates write out; text that is none stays as the model may have written it."""
    if isinstance(value, dict):
        return value
    text = _text("" if value is None else value, where)
    try:
        parsed = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text
    return parsed if isinstance(parsed, dict) else text
