"""Finds the first of many words in a stream of bytes, a byte at a time, at a cost that their number does not change.

The automaton of Aho and Corasick (1975), built only as far as the text goes: making a :class:`Matcher` sorts the
words and no more, and each state is made when a text first reaches it. No state is made twice, so that all texts
together cost at most as much as the whole automaton would.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable


class State:
    """The longest end of the text so far that begins a word."""

    __slots__ = ("depth", "fallback", "first", "last", "matched", "next")

    def __init__(self, depth: int, first: int, last: int) -> None:
        self.depth = depth
        """Its length in bytes."""
        self.first, self.last = first, last
        """The words that begin so: ``words[first:last]``."""
        self.fallback: State = self
        """Of the next shorter such end; the start's is itself."""
        self.matched = 0
        """Length of the longest word that ends here; 0 = none does."""
        self.next: dict[int, State] = {}
        """What has followed so far, by the next byte."""


class Matcher:
    """A set of words; texts begin at ``start`` and go on with :meth:`step`."""

    def __init__(self, words: Iterable[bytes]) -> None:
        self._words = sorted({word for word in words if word})
        self.start = State(0, 0, len(self._words))

    def step(self, state: State, byte: int) -> State:
        """The state after one more byte of 0..255."""
        return state.next.get(byte) or self._go(state, byte)

    def _go(self, state: State, byte: int) -> State:
        """Makes the transitions that lead on from ``state`` and its fallbacks, the shortest first."""
        path = []
        found = state
        while byte not in found.next:
            path.append(found)
            if found is self.start:
                break
            found = found.fallback
        longest = found.next.get(byte, self.start)
        for origin in reversed(path):
            if (child := self._child(origin, byte)) is not None:
                child.fallback = longest
                child.matched = child.matched or longest.matched
                longest = child
            origin.next[byte] = longest
        return longest

    def _child(self, state: State, byte: int) -> State | None:
        """The state of one byte more, if a word begins so; without its fallback."""
        words, depth = self._words, state.depth

        def following(index: int) -> int:
            return words[index][depth] if len(words[index]) > depth else -1

        span = range(state.first, state.last)
        first = state.first + bisect_left(span, byte, key=following)
        last = state.first + bisect_left(span, byte + 1, key=following)
        if first == last:
            return None
        child = State(depth + 1, first, last)
        if len(words[first]) == child.depth:  # of all that begin so the shortest is first
            child.matched = child.depth
        return child
