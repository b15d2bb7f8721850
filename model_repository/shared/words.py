"""Stop and bad words: as text in the ensemble's contract, as token ids between its models.

Token ids travel as int32 ``[2, N]``: row 0 holds the words' ids one after the other (padded 0), row 1
where each word ends (padded -1). Words [5, 6] and [7] are ``[[5, 6, 7], [2, 3, -1]]``; no words, N = 0.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence

import numpy as np

MOST_WORDS = 1024
MOST_BYTES = 16_384
"""Of one list as it is sent. Each word is tokenised and looked for, and thousands are never meant."""
MOST_TOKEN_WORDS = 4 * MOST_WORDS
MOST_TOKENS = 4 * MOST_BYTES
"""Of a list of token ids, in which a word may stand in several spellings."""


def parse(elements: Iterable[bytes], json_lists: bool) -> list[str]:
    """Words in one row of a ``stop_words``/``bad_words`` tensor.

    An element is a word, or with ``json_lists`` a JSON list of words; "" is none.

    Raises:
        UnicodeDecodeError: an element is not UTF-8.
        ValueError: too many words or bytes.
    """
    elements = list(elements)
    _limit(sum(map(len, elements)), MOST_BYTES, "bytes")
    words: list[str] = []
    for element in elements:
        text = element.decode("utf-8")
        words += (json_lists and _json_list(text)) or [text]
    words = [word for word in words if word]
    _limit(len(words), MOST_WORDS, "words")
    return words


def _limit(count: int, most: int, what: str) -> None:
    if count > most:
        raise ValueError(f"has {count} {what}: at most {most} are allowed")


def _json_list(text: str) -> list[str] | None:
    if not text.startswith("["):
        return None
    try:
        value = json.loads(text)
    except (json.JSONDecodeError, RecursionError):
        return None  # a word that happens to begin with a bracket, or with a thousand
    return value if value and all(isinstance(word, str) for word in value) else None


def pack(rows: Sequence[Sequence[Sequence[int]]], width: int = 0) -> np.ndarray:
    """Token ids of the words of each row -> int32 ``[rows, 2, N]``, N at least ``width``."""
    flat = [[token for word in words for token in word] for words in rows]
    ends = [np.cumsum([len(word) for word in words], dtype=np.int32) for words in rows]
    packed = np.zeros((len(rows), 2, max(width, *map(len, flat), 0)), dtype=np.int32)
    packed[:, 1] = -1
    for row, (tokens, stops) in enumerate(zip(flat, ends, strict=True)):
        packed[row, 0, : len(tokens)] = tokens
        packed[row, 1, : len(stops)] = stops
    return packed


def unpack(packed: np.ndarray) -> list[list[int]]:
    """One row, int ``[2, N]`` -> token ids of each word.

    Raises:
        ValueError: row 1 is not a list of increasing end offsets within N; too many words or tokens.
    """
    _limit(packed.shape[-1], MOST_TOKENS, "tokens")
    _limit(int((packed[1] > 0).sum()), MOST_TOKEN_WORDS, "words")
    tokens, ends = packed.tolist()
    words, start = [], 0
    for end in ends:
        if end <= 0:  # -1 pads; so do the zeros that some clients send
            break
        if not start < end <= len(tokens):
            raise ValueError(
                f"is malformed: its row 1 must hold increasing end offsets of at most {len(tokens)}, not {ends}"
            )
        words.append(tokens[start:end])
        start = end
    return words
