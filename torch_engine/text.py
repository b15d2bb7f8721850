"""Tokens to text, exactly and incrementally. Pure Python over ``tokenizer.json``; no torch.

A token is a byte string; text is the UTF-8 of the bytes. Decoding token by token (NVIDIA's ensemble)
or by differences of ``tokenizer.decode`` loses leading spaces and splits characters; adding bytes up
does neither, whichever way the stream is cut.

* :class:`TokenBytes` maps ids to bytes, for byte-level BPE (GPT-2, Llama 3, Qwen) and SentencePiece-style
  vocabularies (Llama 2, Mistral, Gemma), and refuses any other decoder by name.
* :class:`TextStream` releases tokens as soon as their text is whole: it holds back an incomplete UTF-8
  sequence and anything that may still become a stop word.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

SPIECE_SPACE = "\u2581"


class UnsupportedTokenizer(ValueError):
    """The tokenizer's decoder is neither byte-level nor SentencePiece-like."""


def _byte_level_alphabet() -> dict[str, int]:
    """Printable stand-in -> byte, of byte-level BPE (Radford et al. 2019, GPT-2's ``bytes_to_unicode``).

    Bytes that print keep their code point; the others are numbered from 256 upwards.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    alphabet.update({chr(256 + rank): byte for rank, byte in enumerate(rest)})
    return alphabet


def _decoder_types(decoder: dict | None) -> set[str]:
    if not decoder:
        return set()
    if decoder["type"] == "Sequence":
        return set().union(*(_decoder_types(part) for part in decoder["decoders"]))
    if decoder["type"] == "Replace" and decoder.get("pattern") != {"String": SPIECE_SPACE}:
        return {"Replace(other)"}
    return {decoder["type"]}


def _vocabulary(model: dict) -> dict[str, int]:
    vocab = model.get("vocab")
    if isinstance(vocab, dict):
        return vocab
    if isinstance(vocab, list):  # Unigram: [piece, score] in id order
        return {piece: index for index, (piece, _score) in enumerate(vocab)}
    raise UnsupportedTokenizer(f"tokenizer model {model.get('type')!r} has no vocabulary")


def _whole_text(piece: bytes) -> str | None:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return None


class TokenBytes:
    """The bytes that each token stands for; special tokens stand for none."""

    def __init__(self, table: list[bytes], special: dict[int, bytes] | None = None) -> None:
        """``special``: what special tokens, which have no bytes, are called."""
        self._table = table
        self._special = special or {}
        self._texts = [_whole_text(piece) for piece in table]
        self._ids: dict[bytes, int] | None = None
        self._longest = 0

    @classmethod
    def from_dir(cls, model_dir: str | Path) -> TokenBytes:
        """Reads ``tokenizer.json``.

        Raises:
            UnsupportedTokenizer: no such file, or a decoder whose tokens are not plain byte strings.
        """
        path = Path(model_dir) / "tokenizer.json"
        try:
            tokenizer = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise UnsupportedTokenizer(
                f"{path} does not exist: the checkpoint needs a fast tokenizer"
            ) from None
        types = _decoder_types(tokenizer.get("decoder"))
        vocab = _vocabulary(tokenizer["model"])
        if "ByteLevel" in types:
            alphabet = _byte_level_alphabet()

            def spell(piece: str) -> bytes:
                try:
                    return bytes(alphabet[char] for char in piece)
                except KeyError:
                    return piece.encode()  # a piece outside the alphabet is literal text

        elif types and types <= {"ByteFallback", "Fuse", "Replace", "Strip", "Metaspace"}:

            def spell(piece: str) -> bytes:
                if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):
                    return bytes([int(piece[3:5], 16)])
                return piece.replace(SPIECE_SPACE, " ").encode()

        else:
            raise UnsupportedTokenizer(
                f"{path}: decoder {sorted(types) or None} is not supported: "
                "byte-level BPE and SentencePiece-like decoders are"
            )
        added = tokenizer.get("added_tokens") or []
        size = 1 + max([*vocab.values(), *(token["id"] for token in added)], default=-1)
        table = [b""] * size
        for piece, index in vocab.items():
            table[index] = spell(piece)
        for token in added:
            table[token["id"]] = b"" if token["special"] else token["content"].encode()
        return cls(table, {token["id"]: token["content"].encode() for token in added if token["special"]})

    @cached_property
    def with_special(self) -> TokenBytes:
        """The same with special tokens spelled as they are called (``skip_special_tokens=False``)."""
        return TokenBytes([self._special.get(token, piece) for token, piece in enumerate(self._table)])

    def __len__(self) -> int:
        return len(self._table)

    def __getitem__(self, token_id: int) -> bytes:
        """Bytes of one token; an id that the tokenizer does not know (padded vocabularies) has none."""
        return self._table[token_id] if 0 <= token_id < len(self._table) else b""

    def text_of(self, token_id: int) -> str | None:
        """Text of a token that is whole characters by itself; None of one that is not."""
        return self._texts[token_id] if 0 <= token_id < len(self._texts) else ""

    def bytes_of(self, token_ids: Iterable[int]) -> bytes:
        return b"".join(self[token_id] for token_id in token_ids)

    def decode(self, token_ids: Iterable[int]) -> str:
        """Text of the tokens; what is not UTF-8 becomes U+FFFD."""
        return self.bytes_of(token_ids).decode("utf-8", errors="replace")

    def spell(self, data: bytes) -> list[int]:
        """Token ids whose bytes are ``data``, longest pieces first; bytes that no token spells are left out."""
        if self._ids is None:
            self._ids = {piece: index for index, piece in reversed(list(enumerate(self._table))) if piece}
            self._longest = max(map(len, self._ids), default=0)
        ids, start = [], 0
        while start < len(data):
            for end in range(min(len(data), start + self._longest), start, -1):
                if (index := self._ids.get(data[start:end])) is not None:
                    ids.append(index)
                    start = end
                    break
            else:
                start += 1
        return ids


@dataclass(slots=True)
class Release:
    """Tokens whose text is whole, and that text."""

    token_ids: list[int] = field(default_factory=list)
    text: str = ""
    stopped: bool = False
    """A stop word was found; it and what follows are dropped."""


NOTHING = Release()


class TextStream:
    """Feeds generated tokens in, releases them in groups whose text is final.

    Invariants: the texts of all releases concatenate to the text of all tokens up to the stop word; each
    is valid UTF-8; ``tokens.decode(release.token_ids) == release.text``, so that whoever sees only the
    ids (Triton's postprocessing) gets the same text without any state.
    """

    def __init__(self, tokens: TokenBytes, stop: tuple[bytes, ...] = (), whole: bool = False) -> None:
        """``whole``: everything is released at the end."""
        self._tokens = tokens
        self._stop = tuple(word for word in stop if word)
        self._whole = whole
        self._final: list[int] = []
        """Tokens that are final and wait for the end."""
        self._ids: list[int] = []
        self._ends: list[int] = []
        """Where the bytes of each held token end in ``_held``."""
        self._held = b""

    @property
    def num_held(self) -> int:
        return len(self._ids)

    def push(self, token_id: int) -> Release:
        """Adds one token; returns what became final with it, which may be nothing."""
        if not self._whole:
            return self._push(token_id)
        if not self._stop:
            self._final.append(token_id)  # its text is made at the end
            return NOTHING
        release = self._push(token_id)
        self._final += release.token_ids
        return self.finish(stopped=True) if release.stopped else NOTHING

    def _push(self, token_id: int) -> Release:
        if not self._ids and not self._stop and (text := self._tokens.text_of(token_id)) is not None:
            return Release([token_id], text)
        self._ids.append(token_id)
        self._held += self._tokens[token_id]
        self._ends.append(len(self._held))
        found = [at for word in self._stop if (at := self._held.find(word)) >= 0]
        if found:
            return self._stop_at(min(found))
        return self._release(len(self._held) - self._possible_stop())

    def finish(self, stopped: bool = False) -> Release:
        """The output ends here: releases everything held."""
        ids = self._final + self._ids
        text = self._tokens.decode(ids) if self._final else self._held.decode("utf-8", errors="replace")
        self._ids, self._ends, self._held, self._final = [], [], b"", []
        return Release(ids, text, stopped)

    def _possible_stop(self) -> int:
        """Length of the longest end of the held bytes that begins a stop word."""
        longest = 0
        for word in self._stop:
            for length in range(min(len(word) - 1, len(self._held)), longest, -1):
                if self._held.endswith(word[:length]):
                    longest = length
                    break
        return longest

    def _release(self, limit: int) -> Release:
        """Releases the most tokens that end within ``limit`` bytes and on a whole character."""
        for count in range(len(self._ids), 0, -1):
            end = self._ends[count - 1]
            if end > limit:
                continue
            text, whole = codecs.utf_8_decode(self._held[:end], "replace", False)
            if whole == end:
                release = Release(self._ids[:count], text)
                self._ids = self._ids[count:]
                self._ends = [other - end for other in self._ends[count:]]
                self._held = self._held[end:]
                return release
        return Release()

    def _stop_at(self, position: int) -> Release:
        """Keeps the bytes before ``position``; a token that the stop word cuts is spelled anew."""
        count = sum(end <= position for end in self._ends)
        whole = self._ends[count - 1] if count else 0
        ids = self._ids[:count] + self._tokens.spell(self._held[whole:position])
        self._ids, self._ends, self._held = [], [], b""
        return Release(ids, self._tokens.decode(ids), stopped=True)
