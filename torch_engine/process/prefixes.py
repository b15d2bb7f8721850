"""Which engines have seen how a prompt begins: a table that all processes share which send requests to them.

For every ``CHUNK`` tokens of a prompt it holds, under a hash of all tokens up to there, the engines that such a
prompt was sent to. Nobody locks it and nothing is deleted: if a slot was overwritten, or an engine has evicted
those tokens since, a request goes to an engine that is no better than another, and nothing else happens.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence

CHUNK = 64
SLOTS = 2**18
"""Of 8 bytes: the chunks of 16 million tokens."""
MOST_ENGINES = 16
_ENGINES = 2**MOST_ENGINES - 1
_TAG = 2**64 - 1 - _ENGINES


def chunk_keys(tokens: Sequence[int]) -> list[int]:
    """A number of 64 bits for each whole chunk: what it and all before it are. The same in every process."""
    keys, key = [], 0
    for start in range(0, len(tokens) - CHUNK + 1, CHUNK):
        key = hash((key, *tokens[start : start + CHUNK])) & (_TAG | _ENGINES)
        keys.append(key)
    return keys


class Prefixes:
    """The table at ``path``, which the first to come makes and whoever owns the folder removes.

    A slot has the key's upper 48 bits and a bit for each engine.
    """

    def __init__(self, path: str) -> None:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(file, 8 * SLOTS)
            self._slots = memoryview(mmap.mmap(file, 8 * SLOTS)).cast("Q")
        finally:
            os.close(file)

    def known(self, keys: Sequence[int], engines: int) -> list[int]:
        """How many tokens of a prompt's beginning each of the engines has seen; ``keys`` are its :func:`chunk_keys`."""
        lengths = [0] * engines
        seen_by = 2**engines - 1
        for number, key in enumerate(keys, 1):
            seen_by &= self._engines_of(key)
            if not seen_by:
                break
            for engine in range(engines):
                if seen_by >> engine & 1:
                    lengths[engine] = number * CHUNK
        return lengths

    def add(self, keys: Sequence[int], engine: int) -> None:
        """Such a prompt goes to ``engine``."""
        for key in keys:
            self._slots[key % SLOTS] = key & _TAG | self._engines_of(key) | 1 << engine

    def _engines_of(self, key: int) -> int:
        slot = self._slots[key % SLOTS]
        return slot & _ENGINES if slot & _TAG == key & _TAG else 0
