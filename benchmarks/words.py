"""A tokenizer for random weights: any ids can be asked for as text, come back as text and stay what they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tokenizers.pre_tokenizers import ByteLevel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flightline.loadtest.prompts import NAMES  # noqa: E402
from flightline.loadtest.workload import WORDS  # noqa: E402

COMMON = sorted({word for phrase in (*NAMES, *WORDS) for word in phrase.split()})
"""What the load test writes its prompts with."""
FIRST = 256 + len(COMMON)
"""The first ids are bytes and common words; each one from here on is a word that :func:`word` spells."""


def word(token: int) -> str:
    letters = []
    for _ in range(4):
        token, digit = divmod(token, 26)
        letters.append(chr(ord("A") + digit))
    return " " + "".join(letters)


def write_tokenizer(folder: Path, size: int) -> None:
    """Byte-level BPE without merges, in which every token after the bytes is a word of its own."""
    pieces = [*sorted(ByteLevel.alphabet()), *(f"Ġ{text}" for text in COMMON)]
    pieces += [word(token).replace(" ", "Ġ") for token in range(FIRST, size)]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "ignore_merges": True}
    tokenizer = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": byte_level,
        "post_processor": None, "decoder": byte_level, "model": model,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
