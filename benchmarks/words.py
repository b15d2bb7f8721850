"""A tokenizer for random weights: any ids can be asked for as text, come back as text and stay what they are."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

BYTES = 256
"""The first ids are bytes; each one after them is a word."""


def word(token: int) -> str:
    letters = []
    for _ in range(4):
        token, digit = divmod(token, 26)
        letters.append(chr(ord("a") + digit))
    return " " + "".join(letters)


def write_tokenizer(folder: Path, size: int) -> None:
    """Byte-level BPE without merges, in which every token after the bytes is a word of its own."""
    pieces = [*sorted(ByteLevel.alphabet()), *(word(token).replace(" ", "Ġ") for token in range(BYTES, size))]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "ignore_merges": True}
    tokenizer = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": byte_level,
        "post_processor": None, "decoder": byte_level, "model": model,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
