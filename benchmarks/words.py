"""A tokenizer for random weights: any ids can be asked for as text, come back as text and stay what they are."""

from __future__ import annotations

import json
import random
import string
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


def pieces(size: int) -> list[bytes]:
    """A vocabulary made up as real ones are, for grammars to choose from: all bytes, JSON's marks, numbers, and parts
    of words of 2 to 8 letters, half of them after a space.
    """
    chance = random.Random(0)
    marks = (
        '{"',
        '"}',
        '": "',
        '", "',
        '":',
        '",',
        "[]",
        "{}",
        '["',
        '"]',
        "}, {",
        "},",
        "],",
        "  ",
        "\n",
        "\n\n",
        "\n  ",
    )
    found = [bytes([value]) for value in range(256)]
    found += [mark.encode() for mark in marks if len(mark) > 1]
    found += [str(number).encode() for number in range(10, 1000)]
    known = set(found)
    while len(found) < size:
        text = "".join(chance.choices(string.ascii_lowercase, k=chance.randint(2, 8)))
        piece = chance.choice(("", " ")) + chance.choice((text, text, text.capitalize()))
        if (coded := piece.encode()) not in known:
            known.add(coded)
            found.append(coded)
    return found
