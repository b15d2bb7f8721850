"""Text to token ids for the front ends; the way back is ``text/stream.py``."""

from __future__ import annotations

import ctypes
import json
import os
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer

from flightline.torch_engine.core.request import Code, RequestError
from flightline.torch_engine.text.stream import TokenBytes

LONG_TEXT = 2**18
"""Characters from which on tokenising takes so much memory that it matters where it goes."""

# A pool of threads in every stub, for batches of one text.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class Stops(NamedTuple):
    """What ends an output beside its end token."""

    texts: tuple[bytes, ...]
    tokens: tuple[int, ...]


class Vocabulary:
    """A checkpoint's tokenizer and the ids that have a meaning."""

    def __init__(self, model_dir: str | Path, add_special_tokens: bool = True) -> None:
        """Reads ``tokenizer.json`` and the id and token names beside it."""
        folder = Path(model_dir)
        self.bytes = TokenBytes.from_dir(folder)
        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # A file may say how prompts were cut and padded in training. Like Transformers, we do neither.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._add_special_tokens = add_special_tokens
        names = _read_json(folder / "tokenizer_config.json")
        self.bos_id = self._id_of(names.get("bos_token"))
        self.eos_id = self._id_of(names.get("eos_token"))
        self.pad_id = self._id_of(names.get("pad_token"))
        self.end_ids = {self.eos_id, *_end_ids(folder)} - {None}

    def _id_of(self, token: str | dict | None) -> int | None:
        content = token.get("content") if isinstance(token, dict) else token
        return None if content is None else self._tokenizer.token_to_id(content)

    def most_bytes(self, max_seq_len: int) -> int:
        """Bytes of the longest text that can fit ``max_seq_len`` tokens, if each were the longest there is."""
        return max_seq_len * self.bytes.longest

    def encode_prompt(self, text: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids of a prompt, with one BOS where the model wants one, even if the text has its own.

        ``add_special_tokens`` overrides the vocabulary's own: a rendered chat has those that it needs.

        Other threads go on meanwhile: tokenizers lets go of the interpreter for a batch, and for nothing else.
        """
        special = self._add_special_tokens if add_special_tokens is None else add_special_tokens
        (encoded,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=special)
        ids = encoded.ids
        del encoded
        if len(text) > LONG_TEXT:
            _give_memory_back()
        if len(ids) > 1 and self.bos_id is not None and ids[0] == ids[1] == self.bos_id:
            return ids[1:]
        return ids

    def stops(self, words: list[str]) -> Stops:
        """What ends an output: the text of stop words, and special tokens, which have none, by their ids."""
        ids = [self._tokenizer.token_to_id(word) for word in words]
        special = [token for token in ids if token is not None and not self.bytes[token]]
        texts = [word for word, token in zip(words, ids, strict=True) if token not in special]
        return Stops(tuple(word.encode("utf-8") for word in texts), tuple(special))

    def stop_ids(self, word: str) -> list[int]:
        """Token ids that spell a stop word: the tokenizer's own, or where those put a space before it, ours.

        Raises:
            RequestError: the vocabulary cannot spell it.
        """
        ids, (texts, special) = self.word_ids(word), self.stops([word])
        if special:
            return list(special)
        (data,) = texts
        if self.bytes.bytes_of(ids) != data:
            ids = self.bytes.spell(data)
        if self.bytes.bytes_of(ids) != data:
            raise RequestError(
                Code.INVALID_ARG, f"stop_words holds {word!r}, which no tokens of this model spell"
            )
        return ids

    def word_ids(self, word: str) -> list[int]:
        """A word as NVIDIA's preprocessing encodes it."""
        return self._tokenizer.encode(word, add_special_tokens=False).ids

    def bad_ids(self, word: str, spaced: bool) -> list[list[int]]:
        """Token sequences of a word: as it stands, and if ``spaced`` after a space.

        Raises:
            RequestError: the tokenizer makes nothing of the word.
        """
        bare = self.word_ids(word)
        if not bare:
            raise RequestError(
                Code.INVALID_ARG,
                f"bad_words holds {word!r}, which no tokens of this model spell: leave it out",
            )
        if not spaced:
            return [bare]
        after_space, space = self.word_ids(" " + word), self.word_ids(" ")
        # Where the space is a token of its own, the second variant only repeats the first.
        return [bare] if after_space in (bare, space + bare) else [bare, after_space]

    def bias(self, words: list[tuple[str, float]]) -> tuple[tuple[int, float], ...]:
        """(token id, bias) of words, each token of a word by its word's weight, as NVIDIA's preprocessing adds up.

        Theirs encodes a word like a prompt, with special tokens; so does this.
        """
        sums: dict[int, float] = {}
        for word, weight in words:
            for token in self._tokenizer.encode(word, add_special_tokens=True).ids if word else []:
                sums[token] = sums.get(token, 0.0) + weight
        return tuple(sorted(sums.items()))


def _give_memory_back() -> None:
    """To the system: the C library keeps what the tokenizer has freed, 60 bytes for each of a prompt."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's alone
    if trim is not None:
        trim(0)


def _read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _end_ids(folder: Path) -> list[int]:
    for name in ("generation_config.json", "config.json"):
        config = _read_json(folder / name)
        for part in (config, config.get("text_config") or {}):  # the second of a model for images
            value = part.get("eos_token_id")
            if value is not None:
                return value if isinstance(value, list) else [value]
    return []
