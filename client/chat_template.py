"""The model's chat template, rendered as Transformers' ``apply_chat_template`` does, without Transformers."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from flightline.client.errors import InvalidRequest
from flightline.client.template_sandbox import Environment
from flightline.client.wire import variable

Message = Mapping[str, Any]
"""``{"role": "system" | "user" | "assistant", "content": text}``"""

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
LARGEST_TEMPLATE = 2**20
"""Characters; those of today's models have some 10,000."""
END_OF_FINAL = "<<<the final message ends here>>> "
"""Put behind a message that is to be continued, to find where its text ends; the space tells whether it was trimmed."""

_ENVIRONMENT = Environment()


class ChatTemplateError(InvalidRequest):
    """No usable chat template, or messages that it refuses."""


class NoChatTemplate(ChatTemplateError):
    """The checkpoint is not a chat model's."""


class ChatTemplate:
    """A compiled chat template and the special tokens that it may name. Threads may share it."""

    def __init__(
        self, source: str | Mapping[str, str], special_tokens: Mapping[str, str] | None = None
    ) -> None:
        """
        Args:
            source: the template, or several by name: ``tool_use`` serves requests with tools, ``default`` all others.
            special_tokens: text of ``bos_token`` and its like.
        """
        sources = {"default": source} if isinstance(source, str) else dict(source)
        if "default" not in sources:
            raise ChatTemplateError(
                f"none of the chat templates {', '.join(sorted(sources))} is named default"
            )
        self.source = sources["default"]
        self._templates = {name: _compiled(text) for name, text in sources.items()}
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def from_dir(cls, model_dir: str | Path, source: str | None = None) -> ChatTemplate:
        """Reads ``chat_template.jinja`` (and ``additional_chat_templates``), or the key in ``tokenizer_config.json``.

        Args:
            model_dir: checkpoint folder.
            source: a template to use instead of the folder's.

        Raises:
            ChatTemplateError: the folder has neither.
        """
        folder = Path(model_dir)
        try:
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ChatTemplateError(f"{folder} has no readable tokenizer_config.json: {error}") from None
        found = source or _template_files(folder) or config.get("chat_template")
        if isinstance(found, list):  # several named templates
            found = {entry["name"]: entry["template"] for entry in found}
        if not found:
            raise NoChatTemplate(f"the model in {folder} has no chat template: it is not a chat model")
        tokens = {name: _token_text(config.get(name)) for name in SPECIAL_TOKENS}
        return cls(found, {name: text for name, text in tokens.items() if text is not None})

    def render(
        self,
        messages: Sequence[Message],
        add_generation_prompt: bool = True,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        documents: Sequence[Mapping[str, Any]] | None = None,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt text, ending where the assistant is to begin.

        Args:
            messages: the conversation.
            add_generation_prompt: end with what opens the assistant's turn.
            tools: OpenAI's ``tools``.
            documents: ``{"title", "text"}`` each, for templates that know them.
            continue_final_message: end where the text of the last message ends.
            variables: more of the template's own, such as ``enable_thinking``.

        Raises:
            ChatTemplateError: the template refuses the messages (the text is the template's own), or it takes too
                long or makes too much.
        """
        messages = [dict(message) for message in messages]
        final = ""
        if continue_final_message:
            if add_generation_prompt:
                raise ChatTemplateError(
                    "continue_final_message and add_generation_prompt are both true: one of them must be false"
                )
            messages, final = _marked([dict(message) for message in messages])
        known: dict[str, Any] = {**self._special_tokens, **(variables or {})}
        known.update(
            messages=messages, tools=tools, documents=documents, add_generation_prompt=add_generation_prompt
        )
        use = "tool_use" if tools is not None and "tool_use" in self._templates else "default"
        try:
            text = _ENVIRONMENT.render(self._templates[use], known)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from None
        except Exception as error:  # whatever a template's own expressions run into
            kind = type(error).__name__
            raise ChatTemplateError(
                f"the chat template refuses these messages: {kind}: {str(error)[:200]}"
            ) from None
        return _cut(text, final) if continue_final_message else text


def _compiled(source: str) -> jinja2.Template:
    if len(source) > LARGEST_TEMPLATE:
        raise ChatTemplateError(
            f"the chat template has {len(source):,} characters: it must have {LARGEST_TEMPLATE:,} at most"
        )
    try:
        return _ENVIRONMENT.from_string(source)
    except (jinja2.TemplateError, RecursionError, SyntaxError) as error:
        raise ChatTemplateError(f"the chat template is not valid: {error}") from None


def _template_files(folder: Path) -> dict[str, str]:
    """Templates by name, of files of their own."""
    main = folder / "chat_template.jinja"
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    files |= {"default": main} if main.exists() else {}
    return {name: path.read_text(encoding="utf-8") for name, path in files.items()}


def _marked(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], str]:
    """The messages with the end of the last one's text marked, and that text."""
    last = copy.deepcopy(messages[-1]) if messages else {}
    content = last.get("content")
    part = last
    key = "content"
    if isinstance(content, list):
        part = next((part for part in reversed(content) if "text" in part), {})
        key = "text"
    if not isinstance(part.get(key), str):
        raise ChatTemplateError("continue_final_message: the last message has no text to continue")
    final = part[key]
    part[key] += END_OF_FINAL
    return [*messages[:-1], last], final


def _cut(text: str, final: str) -> str:
    """``text`` up to the mark."""
    end = text.rfind(END_OF_FINAL.strip())
    if end < 0 or final.strip() not in text:
        raise ChatTemplateError(
            "continue_final_message: the chat template does not show the last message as it is"
        )
    return text[:end] if text.startswith(END_OF_FINAL, end) else text[:end].rstrip()


def _token_text(token: str | Mapping[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, Mapping) else token


def deployed_model_dir(build_dir: Path | None = None) -> Path:
    """The folder of the model that was built last in ``build_dir``, ``FLIGHTLINE_BUILD_DIR``, or ``build``.

    Raises:
        ChatTemplateError: nothing is built here.
    """
    deployment_file = (build_dir or Path(variable("BUILD_DIR") or "build")) / "deployment.json"
    try:
        return Path(json.loads(deployment_file.read_text(encoding="utf-8"))["source_dir"])
    except (OSError, json.JSONDecodeError, KeyError):
        raise ChatTemplateError(
            f"no chat template: no {deployment_file}; run 'make build-engines' or give the model folder"
        ) from None
