"""Guesses of what a greedy request will say next, taken from its own text (prompt lookup decoding: Saxena 2023).

What followed the last few tokens when they stood there before often follows again: quotations, code, tables. The
guesses are computed beside the token that is due, in one step; those that the model would have chosen itself are kept,
and the first wrong one costs nothing but the work, so that the output is what it would have been without.
"""

from __future__ import annotations

LONGEST, SHORTEST = 3, 2
"""Tokens that must repeat before what followed them is a guess: the longest match first."""


class PromptLookup:
    """Finds the last place where a sequence's latest tokens stood before."""

    def __init__(self) -> None:
        self._after: dict[tuple[int, ...], int] = {}
        """Tokens -> where what followed them last begins."""
        self._indexed = 0

    def guess(self, tokens: list[int], count: int) -> list[int]:
        """Up to ``count`` tokens that may follow ``tokens``; call it with the same sequence, grown, every time."""
        for end in range(max(self._indexed, SHORTEST), len(tokens)):
            for length in range(SHORTEST, min(LONGEST, end) + 1):
                self._after[tuple(tokens[end - length : end])] = end
        self._indexed = max(self._indexed, len(tokens))
        for length in range(min(LONGEST, len(tokens)), SHORTEST - 1, -1):
            if (begin := self._after.get(tuple(tokens[-length:]))) is not None:
                return tokens[begin : begin + count]
        return []
