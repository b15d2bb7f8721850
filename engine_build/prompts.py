"""Prompt files: JSON lines with ``text``, ``prompt`` or ``messages``, and their rendering for one model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flightline.engine_build.errors import BuildError

MIN_SAMPLES = 8
ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class Sample:
    """Raw ``text``, or a chat."""

    text: str | None = None
    messages: tuple[dict[str, str], ...] = ()

    @property
    def wants_answer(self) -> bool:
        """Whether the model's own answer should follow: raw text and finished chats stand for themselves."""
        return bool(self.messages) and self.messages[-1]["role"] != "assistant"

    def render(self, tokenizer: Any) -> str:
        """The text the model reads: through its chat template, or the bare words if it has none."""
        if self.text is not None:
            return self.text
        if not tokenizer.chat_template:
            return "\n\n".join(message["content"] for message in self.messages)
        return tokenizer.apply_chat_template(
            list(self.messages), tokenize=False, add_generation_prompt=self.wants_answer
        )


def read_prompts(path: Path, minimum: int = MIN_SAMPLES) -> list[Sample]:
    """Reads a prompt file.

    Raises:
        BuildError: the file is missing, a line is malformed (named by number), or there are too few.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BuildError(
            f"prompt file {path} cannot be read ({error}): give a UTF-8 JSON lines file"
        ) from None
    samples = [_sample(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]
    if len(samples) < minimum:
        raise BuildError(f"{path} has {len(samples)} samples: calibration needs at least {minimum}")
    return samples


def _sample(line: str, where: str) -> Sample:
    shape = 'want {"text": "..."}, {"prompt": "..."} or {"messages": [{"role": "...", "content": "..."}]}'
    try:
        record = json.loads(line)
    except json.JSONDecodeError as error:
        raise BuildError(f"{where}: not valid JSON ({error.msg}); {shape}") from None
    keys = {"text", "prompt", "messages"} & set(record) if isinstance(record, dict) else set()
    if len(keys) != 1:
        raise BuildError(f"{where}: exactly one of text, prompt, messages is needed; {shape}")
    key = keys.pop()
    value = record[key]
    if key == "messages":
        if not isinstance(value, list) or not value or not all(map(_is_message, value)):
            raise BuildError(f"{where}: messages must be a non-empty list of role and content; {shape}")
        return Sample(messages=tuple({"role": m["role"], "content": m["content"]} for m in value))
    if not isinstance(value, str) or not value.strip():
        raise BuildError(f"{where}: {key} must be a non-empty string; {shape}")
    return Sample(text=value) if key == "text" else Sample(messages=({"role": "user", "content": value},))


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and value.get("role") in ROLES and isinstance(value.get("content"), str)
