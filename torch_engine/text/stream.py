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
import re
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from flightline.torch_engine.text.matcher import Matcher

T = TypeVar("T")

SPIECE_SPACE = "\u2581"
_BYTE_PIECE = re.compile("<0x([0-9A-Fa-f]{2})>")


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


def _decoder_types(decoder: dict[str, Any] | None) -> set[str]:
    if not decoder:
        return set()
    if decoder["type"] == "Sequence":
        return set().union(*(_decoder_types(part) for part in decoder["decoders"]))
    if decoder["type"] == "Replace" and decoder.get("pattern") != {"String": SPIECE_SPACE}:
        return {"Replace(other)"}
    if decoder["type"] == "Metaspace" and decoder.get("replacement") != SPIECE_SPACE:
        return {"Metaspace(other)"}
    return {decoder["type"]}


def _vocabulary(model: dict[str, Any]) -> dict[str, int]:
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

    def __init__(
        self, table: list[bytes], longest_added: int = 0, special: dict[int, bytes] | None = None
    ) -> None:
        """
        Args:
            longest_added: bytes of the longest added token as it is written in a prompt.
            special: what special tokens, which have no bytes, are called.
        """
        self._table = table
        self._special = special or {}
        self.longest = max(longest_added, *map(len, table), 1)
        """Most bytes of a text that one token can stand for."""
        self._texts = [_whole_text(piece) for piece in table]
        self._ids: dict[bytes, int] | None = None

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
                    return bytes(map(alphabet.__getitem__, piece))
                except KeyError:
                    return piece.encode()  # a piece outside the alphabet is literal text

        elif types and types <= {"ByteFallback", "Fuse", "Replace", "Strip", "Metaspace"}:

            def spell(piece: str) -> bytes:
                if "ByteFallback" in types and (found := _BYTE_PIECE.fullmatch(piece)):
                    return bytes([int(found[1], 16)])
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
            # A decoder treats an added token like any other: Gemma's of several spaces is written with their stand-ins.
            table[token["id"]] = b"" if token["special"] else spell(token["content"])
        return cls(
            table,
            max((len(token["content"].encode()) for token in added), default=0),
            {token["id"]: token["content"].encode() for token in added if token["special"]},
        )

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
        ids, start = [], 0
        while start < len(data):
            for end in range(min(len(data), start + self.longest), start, -1):
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
    num_spelled: int = 0
    """How many of the last ids spell the beginning of one generated token, whose end belongs to a stop word."""

    def told(self, values: list[T], nothing: T) -> list[T]:
        """One value for each of ``token_ids`` out of ``values``, which has one for each token as it was generated.

        The ids that spell one token anew share its value: the first has it, the others ``nothing``.
        """
        whole = len(self.token_ids) - self.num_spelled
        if not self.num_spelled or not values:
            return values[:whole]
        return values[: whole + 1] + [nothing] * (self.num_spelled - 1)


NOTHING = Release()


@dataclass(slots=True)
class _Group:
    """Tokens that together end on a whole character, or do not yet."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    num_bytes: int = 0


class TextStream:
    """Feeds generated tokens in, releases them in groups whose text is final.

    Invariants: the texts of all releases concatenate to the text of all tokens up to the stop word; each
    is valid UTF-8; ``tokens.decode(release.token_ids) == release.text``, so that whoever sees only the
    ids (Triton's postprocessing) gets the same text without any state. What a token costs depends on its
    own length only: neither on what is held back nor on the stop words.
    """

    def __init__(self, tokens: TokenBytes, stop: tuple[bytes, ...] = (), whole: bool = False) -> None:
        """``whole``: everything is released at the end."""
        self._tokens = tokens
        self._matcher = Matcher(stop) if any(stop) else None
        self._state = self._matcher.start if self._matcher else None
        self._whole = whole
        self._final: list[int] = []
        """Tokens that are final and wait for the end."""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._groups: deque[_Group] = deque()
        """What is held back: it may still become a stop word."""
        self._open = _Group()
        """Held back behind that: the last character is not whole."""
        self._num_bytes = 0
        """Of both."""

    @property
    def num_held(self) -> int:
        return len(self._held())

    def push(self, token_id: int) -> Release:
        """Adds one token; returns what became final with it, which may be nothing."""
        if not self._whole:
            return self._push(token_id)
        if not self._matcher:
            self._final.append(token_id)  # its text is made at the end
            return NOTHING
        release = self._push(token_id)
        if release.stopped:
            ids = self._final + release.token_ids
            return Release(ids, self._tokens.decode(ids), True, release.num_spelled)
        self._final += release.token_ids
        return NOTHING

    def _push(self, token_id: int) -> Release:
        if not self._matcher and not self._open.ids and (text := self._tokens.text_of(token_id)) is not None:
            return Release([token_id], text)
        piece, group = self._tokens[token_id], self._open
        group.ids.append(token_id)
        if self._matcher and (end := self._match(piece)) is not None:
            return self._stop_before(end)
        group.num_bytes += len(piece)
        self._num_bytes += len(piece)
        group.text += self._decoder.decode(piece)
        if not self._decoder.getstate()[0]:
            self._groups.append(group)
            self._open = _Group()
        return self._release()

    def _match(self, piece: bytes) -> int | None:
        """Reads on; where among the held bytes and ``piece`` the first stop word begins, if one is complete."""
        matcher, state = self._matcher, self._state
        assert matcher is not None and state is not None
        for count, byte in enumerate(piece, 1):
            state = matcher.step(state, byte)
            if state.matched:
                return self._num_bytes + count - state.matched
        self._state = state
        return None

    def finish(self) -> Release:
        """The output ends here: releases everything held."""
        ids = self._final + self._held()
        self._final = []
        self._forget()
        return Release(ids, self._tokens.decode(ids))

    def _held(self) -> list[int]:
        return [token for group in (*self._groups, self._open) for token in group.ids]

    def _forget(self) -> None:
        self._groups.clear()
        self._open, self._num_bytes = _Group(), 0
        self._decoder.reset()

    def _release(self) -> Release:
        """Releases the groups that no stop word can reach any more."""
        limit = self._num_bytes - (self._state.depth if self._state else 0)
        release = Release()
        while self._groups and self._groups[0].num_bytes <= limit:
            group = self._groups.popleft()
            limit -= group.num_bytes
            self._num_bytes -= group.num_bytes
            release.token_ids += group.ids
            release.text += group.text
        return release

    def _stop_before(self, end: int) -> Release:
        """Keeps the first ``end`` bytes held; a token that the stop word cuts is spelled anew."""
        held, count, whole = self._held(), 0, 0
        while count < len(held) and (after := whole + len(self._tokens[held[count]])) <= end:
            count, whole = count + 1, after
        rest = self._tokens[held[count]][: end - whole] if count < len(held) else b""
        spelled = self._tokens.spell(rest)
        ids = held[:count] + spelled
        self._forget()
        return Release(ids, self._tokens.decode(ids), stopped=True, num_spelled=len(spelled))
