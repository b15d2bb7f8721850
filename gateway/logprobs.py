"""Log-probabilities of tokens in OpenAI's two shapes."""

from __future__ import annotations

import codecs
from collections.abc import Iterator, Sequence
from typing import Any

from flightline.gateway import errors
from flightline.gateway.upstream import Piece
from flightline.torch_engine.text.stream import TokenBytes

FLOOR = -9999.0
"""Stands for -inf, which is not JSON; vLLM has the same."""


class TokenNames:
    """What tokens are called in an answer."""

    def __init__(self, tokens: TokenBytes, as_ids: bool) -> None:
        self._plain = tokens
        self._tokens = tokens.with_special
        self._as_ids = as_ids

    def is_special(self, token: int) -> bool:
        """Whether it has a name and no text."""
        return not self._plain[token]

    def of(self, token: int) -> tuple[str, bytes]:
        """Its text, or its bytes spelled out where they are no text by themselves, and its bytes."""
        data = self._tokens[token]
        if self._as_ids:
            return f"token_id:{token}", data
        try:
            return data.decode(), data
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data), data


def _places(piece: Piece, count: int) -> Iterator[tuple[int, float, list[tuple[int, float]]]]:
    """(token, its log-probability, the most likely ones there) of each new token."""
    return _told(piece.token_ids, piece.log_probs, piece.top_ids, piece.top_log_probs, count)


def _told(
    tokens: Sequence[int],
    log_probs: Sequence[float],
    top_ids: Sequence[int],
    top_log_probs: Sequence[float],
    count: int,
) -> Iterator[tuple[int, float, list[tuple[int, float]]]]:
    for place, (token, value) in enumerate(zip(tokens, log_probs, strict=True)):
        part = slice(place * count, (place + 1) * count)
        top = zip(top_ids[part], top_log_probs[part], strict=True)
        yield token, max(value, FLOOR), [(other, max(weight, FLOOR)) for other, weight in top if other >= 0]


def chat_entries(piece: Piece, count: int, names: TokenNames) -> list[dict[str, Any]]:
    """``logprobs.content`` of the piece's tokens."""

    def entry(token: int, value: float) -> dict[str, Any]:
        text, data = names.of(token)
        return {"token": text, "logprob": value, "bytes": list(data)}

    return [
        entry(token, value) | {"top_logprobs": [entry(*other) for other in top]}
        for token, value, top in _places(piece, count)
    ]


class CompletionLogprobs:
    """The parallel arrays of a completion, of one choice; offsets are characters of its text so far."""

    def __init__(self, count: int, names: TokenNames, offset: int = 0) -> None:
        self._count = count
        self._names = names
        self._offset = offset
        self._text = codecs.getincrementaldecoder("utf-8")("replace")
        """Characters of the tokens' bytes; a token that goes on with a character stands where that began."""

    def entries(self, piece: Piece) -> dict[str, list[Any]]:
        made = joined([])
        for token, value, top in _places(piece, self._count):
            self._enter(made, token, value, top)
        return made

    def prompt(self, ids: Sequence[int], text: str, piece: Piece) -> dict[str, list[Any]]:
        """The tokens of the prompt ``text``, before all others; nothing is told of the first, which follows none."""
        made = joined([])
        if not piece.prompt_log_probs and len(ids) > 1:
            raise errors.internal("the answer has no log-probabilities of the prompt")
        told = _told(
            ids[1:], piece.prompt_log_probs, piece.prompt_top_ids, piece.prompt_top_log_probs, self._count
        )
        for token, value, top in ((ids[0], None, []), *told):
            self._enter(made, token, value, top, text)
        self._offset = len(text)
        self._text.reset()
        return made

    def _enter(
        self,
        made: dict[str, list[Any]],
        token: int,
        value: float | None,
        top: list[tuple[int, float]],
        prompt: str | None = None,
    ) -> None:
        text, data = self._names.of(token)
        made["tokens"].append(text)
        made["token_logprobs"].append(value)
        most = {self._names.of(other)[0]: weight for other, weight in top}
        made["top_logprobs"].append(None if value is None else {**most, text: value})
        if data and data[0] & 0xC0 != 0x80:  # what was begun before it does not go on
            self._offset += len(self._text.decode(b"", final=True))
        made["text_offset"].append(self._offset)
        # A special token that was put before a prompt is not in its text.
        if (
            prompt is None
            or not self._names.is_special(token)
            or prompt.startswith(data.decode(), self._offset)
        ):
            self._offset += len(self._text.decode(data))


def joined(parts: list[dict[str, list[Any]]]) -> dict[str, list[Any]]:
    """Of a whole answer."""
    made: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
    for part in parts:
        for name, values in part.items():
            made[name] += values
    return made
