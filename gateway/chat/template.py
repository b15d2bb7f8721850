"""The checkpoint's chat template, and what can be told from it: tools, their format, thoughts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from flightline.client import chat_template
from flightline.client.chat_template import ChatTemplateError
from flightline.gateway.chat.errors import invalid, shown
from flightline.gateway.chat.guides import Reasoning
from flightline.gateway.chat.parsers import FORMATS

OFFERED, CALLED = "offered_tool", "called_tool"
"""Tools of the conversation that shows a template's form; two, so that an offer is not taken for a call."""
SIGNS: dict[str, str] = {
    "hermes": r'<tool_call>\s*\{"name": "called_tool", "arguments": ',
    "llama3_json": r'\{(?:"type": "function", )?"name": "called_tool", "parameters": ',
    "pythonic": r"\[called_tool\(",
    "mistral": r'\[TOOL_CALLS\]\s*\[\{"name": "called_tool", "arguments": ',
    "mistral_v11": r"\[TOOL_CALLS\]called_tool",
    "harmony": r"to=functions\.called_tool\b[^{]*<\|message\|>",
}
"""What the call looks like in each format."""
HARMONY_MARKERS = frozenset(
    f"<|{name}|>" for name in ("start", "end", "message", "channel", "constrain", "call", "return")
)


class ChatTemplate:
    """A compiled chat template; rendering is thread-safe and bounded in time and size."""

    def __init__(
        self,
        template: chat_template.ChatTemplate,
        special_ids: Mapping[str, int] | None = None,
        tool_format: str | None = None,
    ) -> None:
        """
        Args:
            template: what renders.
            special_ids: token ids of the special tokens by their text: these do not stand in decoded text.
            tool_format: how the model writes tool calls, if it cannot be told from the template.
        """
        self._template = template
        self._tool_format = tool_format
        self.special_ids = dict(special_ids or {})

    @classmethod
    def load(
        cls, tokenizer_dir: Path, override: Path | None = None, tool_format: str | None = None
    ) -> ChatTemplate | None:
        """The template of a checkpoint; None if it has none.

        Args:
            tokenizer_dir: the folder with ``tokenizer_config.json`` (and ``chat_template.jinja``).
            override: a template file to use instead.
            tool_format: how the model writes tool calls, if it cannot be told from the template.

        Raises:
            RequestError: a template that does not compile or cannot be read, an unknown ``tool_format``.
        """
        if tool_format is not None and tool_format not in FORMATS:
            raise invalid(
                f"tool format {shown(tool_format)} is not known: it must be one of {', '.join(FORMATS)}"
            )
        try:
            source = override.read_text(encoding="utf-8") if override else None
        except (OSError, ValueError) as error:
            raise invalid(f"the chat template {override} cannot be read: {error}") from None
        if source is not None and not source.strip():
            raise invalid(f"the chat template {override} is empty: give another file, or leave it out")
        try:
            template = chat_template.ChatTemplate.from_dir(tokenizer_dir, source)
        except chat_template.NoChatTemplate:
            return None
        except ChatTemplateError as error:
            raise invalid(str(error)) from None
        return cls(template, _special_ids(tokenizer_dir), tool_format)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt, with every special token that the template writes: tokenise it without adding BOS.

        Takes as long as the template takes (five seconds at most): call it off the event loop.

        Args:
            messages: as ``parse_messages`` returns them.
            tools: as ``ToolPlan.tools``.
            documents: ``{"title", "text"}`` each, for templates of retrieval models.
            add_generation_prompt: end where the assistant is to begin.
            continue_final_message: end inside the last message, for the model to go on with it.
            kwargs: ``chat_template_kwargs``: more variables, ``enable_thinking`` for instance.

        Raises:
            RequestError: the template refuses the messages (the text is the template's own) or passes a limit; a
                variable of ``kwargs`` that is not the caller's to set.
        """
        variables = dict(kwargs or {})
        if taken := OURS.intersection(variables):
            raise invalid(f"chat_template_kwargs sets {min(taken)}: that has a field of its own")
        if self.has_channels:
            messages = [_with_channels(message) for message in _one_call_each(messages)]
            tools = None if tools is None else [_described(tool) for tool in tools]
            if (effort := variables.get("reasoning_effort", EFFORTS[0])) not in EFFORTS:
                raise invalid(f"reasoning_effort is {shown(effort)}: it must be one of {', '.join(EFFORTS)}")
        if not self.shows_later_instructions:
            messages = _instructed_at_the_beginning(messages)
        try:
            return self._template.render(
                messages,
                add_generation_prompt,
                tools=tools,
                documents=documents,
                continue_final_message=continue_final_message,
                variables=variables,
            )
        except ChatTemplateError as error:
            raise invalid(f"messages: {error}") from None

    @cached_property
    def supports_tools(self) -> bool:
        """The template shows the tools to the model."""
        return OFFERED in self._shown([_USER], tools=[_tool(OFFERED)])

    @cached_property
    def shows_later_instructions(self) -> bool:
        """What a system message behind the first message says reaches the model, or is refused; else it is left out."""
        first = {"role": "system", "content": "Hello"}
        later = [first, {"role": "system", "content": INSTRUCTION}, _USER]
        try:
            return INSTRUCTION in self._template.render(later)
        except ChatTemplateError:
            return True

    @cached_property
    def tool_format(self) -> str | None:
        """How the model writes tool calls: a name of ``parsers.FORMATS``, or None if that is not known."""
        if self._tool_format is not None:
            return self._tool_format
        for arguments in ({"key": "value"}, '{"key": "value"}'):  # some templates want them as text
            text = self._shown([_USER, _call(arguments)], tools=[_tool(OFFERED)], add_generation_prompt=False)
            found = [name for name, sign in SIGNS.items() if re.search(sign, text)]
            if len(found) == 1:
                return found[0]
        return None

    @cached_property
    def opens_reasoning(self) -> bool:
        """A plain prompt ends inside ``<think>``."""
        return self.reasoning(self._shown([_USER])) is Reasoning.OPEN

    @cached_property
    def has_channels(self) -> bool:
        """Messages name their channels, as OpenAI's harmony format has it."""
        return "<|channel|>" in self._template.source and self.special_ids.keys() >= HARMONY_MARKERS

    @property
    def ends(self) -> list[int]:
        """Tokens that end an answer, whatever else the checkpoint says."""
        return [self.special_ids[name] for name in ("<|return|>", "<|call|>")] if self.has_channels else []

    def reasoning(self, prompt: str) -> Reasoning:
        """Where the answer to this prompt begins."""
        if self.has_channels:
            ends = max(prompt.rfind(f"<|{name}|>") for name in ("end", "return", "call"))
            return Reasoning.NONE if prompt.rfind("<|message|>") > ends else Reasoning.CHANNELS
        end = prompt.rstrip()
        if end.endswith("<think>"):
            return Reasoning.OPEN
        thinks = "<think>" in self._template.source and not end.endswith("</think>")
        return Reasoning.POSSIBLE if thinks else Reasoning.NONE

    def _shown(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """A prompt of ours, or nothing if the template refuses it."""
        try:
            return self._template.render(messages, **options)
        except ChatTemplateError:
            return ""


OURS = frozenset(
    {"messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template"}
)
"""Variables that ``chat_template_kwargs`` may not set."""
EFFORTS = ("low", "medium", "high")
"""Values of ``reasoning_effort`` that gpt-oss knows."""
INSTRUCTION = "instruction"
"""What a system message says whose place is tried out."""


def _instructed_at_the_beginning(messages: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """For templates that show one system message, the first: those that the conversation begins with are one."""
    count = next((at for at, message in enumerate(messages) if message["role"] != "system"), len(messages))
    for index, message in enumerate(messages[count:], count):
        if message["role"] == "system":
            raise invalid(
                f"messages[{index}].role is system, and the chat template of this model leaves that out behind other "
                "messages: put it at the beginning, or let the user say it"
            )
    if count < 2:
        return list(messages)
    text = "\n\n".join(message["content"] for message in messages[:count])
    return [{**messages[0], "content": text}, *messages[count:]]


def _one_call_each(messages: Sequence[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """As gpt-oss calls: one function after the other, each with its result behind it. What templates show of a message
    is its first call."""
    at = 0
    while at < len(messages):
        message, calls = messages[at], messages[at].get("tool_calls") or ()
        at += 1
        if len(calls) < 2:
            yield message
            continue
        end = next((i for i in range(at, len(messages)) if messages[i]["role"] != "tool"), len(messages))
        results = _results(calls, messages[at:end], at)
        said = message
        for call, result in zip(calls, results, strict=True):
            yield {**said, "tool_calls": [call]}
            yield from result
            said = {"role": "assistant", "content": ""}  # what came before the calls came once
        at = end


def _results(
    calls: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]], at: int
) -> list[list[Mapping[str, Any]]]:
    """Those of each call among ``tools``, the messages from index ``at`` on."""
    ids = [call.get("id") for call in calls]
    results: list[list[Mapping[str, Any]]] = [[] for _ in calls]
    for index, message in enumerate(tools, at):
        if (named := message["tool_call_id"]) not in ids:
            raise invalid(
                f"messages[{index}].tool_call_id is {shown(named)}: it must be the id of one of the calls that the "
                "message before has"
            )
        results[ids.index(named)].append(message)
    return results


def _with_channels(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """As templates of gpt-oss want it: thoughts under their own name.

    Before a call they show thoughts or what was said to the user, both as thoughts, and refuse the two together.
    """
    thoughts = message.get("reasoning_content")
    if thoughts is None:
        return message
    if thoughts and message["content"] and message.get("tool_calls"):
        return {**message, "content": "", "thinking": f"{thoughts}\n{message['content']}"}
    return {**message, "thinking": thoughts}


def _described(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Templates of gpt-oss count on a description."""
    function = tool["function"]
    return {**tool, "function": {**function, "description": function.get("description") or ""}}


_USER = {"role": "user", "content": "Hello"}


def _tool(name: str) -> dict[str, Any]:
    key = {"type": "string", "description": "a key"}
    parameters = {"type": "object", "properties": {"key": key}, "required": ["key"]}
    return {"type": "function", "function": {"name": name, "description": "a tool", "parameters": parameters}}


def _call(arguments: dict[str, str] | str) -> dict[str, Any]:
    call = {"id": "abcDEF123", "type": "function", "function": {"name": CALLED, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


def _special_ids(folder: Path) -> dict[str, int]:
    """Ids of the tokens that ``tokenizer.json`` calls special, by their text."""
    try:
        tokenizer = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}  # a tokenizer of another kind: markers are then text
    return {
        token["content"]: token["id"] for token in tokenizer.get("added_tokens", []) if token.get("special")
    }
