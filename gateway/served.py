"""The served model as the gateway knows it: names, tokenizer, chat template, defaults."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flightline.client.params import DECLARED
from flightline.gateway.chat.guides import Guide
from flightline.gateway.chat.template import ChatTemplate
from flightline.gateway.errors import ApiError, invalid
from flightline.gateway.settings import GatewaySettings, Upstream
from flightline.model_repository.shared.vocabulary import Vocabulary
from flightline.torch_engine.core import grammar
from flightline.torch_engine.core.request import Guide as EngineGuide
from flightline.torch_engine.core.request import InvalidField

TORCH = "torch"
FROM_GENERATION_CONFIG = [
    name for name, declared in DECLARED.items() if declared.openai is not None and declared.openai.of_model
]
"""Defaults that a checkpoint may set, as at vLLM."""


class ServedModel:
    """Loaded once a process; its methods may be called from any thread."""

    def __init__(self, gateway: GatewaySettings, upstream: Upstream) -> None:
        """Raises RequestError: a chat template or a tool format that cannot work."""
        folder = Path(upstream.tokenizer_dir)
        self.names = gateway.served_names or (upstream.model,)
        self._lane = upstream.lane
        self.tells_cached_tokens = upstream.tells_cached_tokens
        self.counts_at_end = upstream.counts_at_end
        self.max_seq_len = upstream.max_seq_len
        self.created = int(time.time())
        self.vocabulary = Vocabulary(folder)
        override = Path(gateway.chat_template) if gateway.chat_template else None
        self._template = ChatTemplate.load(folder, override, gateway.tool_format or None)
        self.defaults = _generation_config(folder)

    @property
    def template(self) -> ChatTemplate:
        """Raises ApiError: 400, there is none."""
        if self._template is None:
            raise invalid(
                f"model {self.names[0]} has no chat template, so it cannot chat: use /v1/completions, "
                "or start the server with CHAT_TEMPLATE=file"
            )
        return self._template

    def check_name(self, name: str | None) -> str:
        """The name to echo. Raises ApiError: 404, not one of its names."""
        if name is not None and name not in self.names:
            message = f"The model `{name[:200]}` does not exist; served: {', '.join(self.names)}"
            raise ApiError(404, message, param="model", code="model_not_found")
        return name or self.names[0]

    def encode(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids; called off the event loop.

        Raises:
            ApiError: 400, no text, or one that cannot fit the context whatever its tokens are.
        """
        if len(text.encode()) > self.vocabulary.most_bytes(self.max_seq_len):
            raise self._too_long(f"{param} has {len(text)} characters", param)
        ids = self.vocabulary.encode_prompt(text, add_special_tokens)
        if not ids:
            raise invalid(f"{param} is empty: give at least one token", param)
        return ids

    def check_ids(self, ids: Any, param: str) -> list[int]:
        """Raises ApiError: 400, not a list of this model's token ids."""
        most = len(self.vocabulary.bytes) - 1
        for token in ids:
            if type(token) is not int or not 0 <= token <= most:
                raise invalid(f"{param} holds {str(token)[:40]}: ids of this model are 0 to {most}", param)
        return ids

    def room(self, num_prompt_tokens: int, max_tokens: int | None, names: Mapping[str, str]) -> int:
        """How many tokens an answer may have: ``max_tokens``, or None = all that fit.

        ``names``: of the fields that ``input_ids`` and ``max_tokens`` come from.

        Raises:
            ApiError: 400 ``context_length_exceeded``.
        """
        room, param = self.max_seq_len - num_prompt_tokens, names["input_ids"]
        if room < 1:
            raise self._too_long(f"{param} has {num_prompt_tokens} tokens", param)
        if max_tokens is not None and max_tokens > room:
            raise self._too_long(
                f"{param} has {num_prompt_tokens} tokens and {names.get('max_tokens', 'max_tokens')} is {max_tokens}: "
                "with this prompt it must be "
                f"at most {room}; together",
                param,
            )
        return max_tokens or room

    def _too_long(self, what: str, param: str) -> ApiError:
        message = f"{what}: this model's maximum context length is {self.max_seq_len} tokens"
        return invalid(message, param, "context_length_exceeded")

    def can_enforce(self, guide: Guide) -> bool:
        """Whether the engine keeps an answer to ``guide``; called off the event loop."""
        # Which guides TensorRT-LLM takes depends on its version and its own settings.
        return self._lane == TORCH and not self.why_not(guide)

    def why_not(self, guide: Guide) -> str:
        """Why the engine does not keep an answer to ``guide``; empty: it does, or that is not known beforehand.

        Called off the event loop.
        """
        if self._lane != TORCH:
            return ""
        try:
            grammar.check(EngineGuide(guide.type, guide.text))
        except InvalidField as error:
            return error.problem
        return ""

    def card(self, name: str) -> dict[str, Any]:
        """The entry at ``/v1/models``."""
        return {
            "id": name,
            "object": "model",
            "created": self.created,
            "owned_by": "flightline",
            "root": self.names[0],
            "parent": None,
            "max_model_len": self.max_seq_len,
        }


def _generation_config(folder: Path) -> dict[str, float]:
    path = folder / "generation_config.json"
    values = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {name: values[name] for name in FROM_GENERATION_CONFIG if values.get(name) is not None}
