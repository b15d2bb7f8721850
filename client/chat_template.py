"""The model's chat template, rendered as Transformers' ``apply_chat_template`` does, without Transformers."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from client.errors import InvalidRequest

Message = Mapping[str, Any]
"""``{"role": "system" | "user" | "assistant", "content": text}``"""

BUILD_DIR = Path(__file__).resolve().parents[1] / "build"
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatTemplateError(InvalidRequest):
    """No usable chat template, or messages that it refuses."""


class _GenerationBlock(Extension):
    """``{% generation %}`` marks what the assistant said for training; here it only renders its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationBlock, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


class ChatTemplate:
    """A compiled chat template and the special tokens that it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str] | None = None) -> None:
        try:
            self._template = _environment().from_string(source)
        except jinja2.TemplateError as error:
            raise ChatTemplateError(f"the chat template is not valid: {error}") from None
        self._special_tokens = dict(special_tokens or {})

    @classmethod
    def from_dir(cls, model_dir: str | Path) -> ChatTemplate:
        """Reads ``chat_template.jinja``, or ``chat_template`` in ``tokenizer_config.json``.

        Raises:
            ChatTemplateError: the folder has neither.
        """
        folder = Path(model_dir)
        try:
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except (OSError, json.JSONDecodeError) as error:
            raise ChatTemplateError(f"{folder} has no readable tokenizer_config.json: {error}") from None
        template_file = folder / "chat_template.jinja"
        source = (
            template_file.read_text(encoding="utf-8")
            if template_file.exists()
            else config.get("chat_template")
        )
        if isinstance(source, list):  # several named templates
            source = {entry["name"]: entry["template"] for entry in source}.get("default")
        if not source:
            raise ChatTemplateError(f"the model in {folder} has no chat template: it is not a chat model")
        tokens = {name: _token_text(config.get(name)) for name in SPECIAL_TOKENS}
        return cls(source, {name: text for name, text in tokens.items() if text is not None})

    def render(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """The prompt text, ending where the assistant is to begin.

        Raises:
            ChatTemplateError: the template refuses the messages; the text is the template's own.
        """
        try:
            return self._template.render(
                messages=[dict(message) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=add_generation_prompt,
                **self._special_tokens,
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ChatTemplateError(f"the chat template refuses these messages: {error}") from None


def _token_text(token: str | Mapping[str, Any] | None) -> str | None:
    return token["content"] if isinstance(token, Mapping) else token


def deployed_model_dir(build_dir: Path | None = None) -> Path:
    """The folder of the model that ``make build-engines`` built last; environment: BUILD_DIR.

    Raises:
        ChatTemplateError: nothing is built here.
    """
    deployment_file = (build_dir or Path(os.environ.get("BUILD_DIR") or BUILD_DIR)) / "deployment.json"
    try:
        return Path(json.loads(deployment_file.read_text(encoding="utf-8"))["source_dir"])
    except (OSError, json.JSONDecodeError, KeyError):
        raise ChatTemplateError(
            f"no chat template: no {deployment_file}; run 'make build-engines' or give the model folder"
        ) from None
