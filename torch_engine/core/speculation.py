"""Guesses of what requests will say next, taken from their own text (prompt lookup decoding: Saxena 2023).

What followed the last few tokens when they stood there before often follows again: quotations, code, tables. Guesses
are computed beside the token that is due, in one step, and one is right if it is what would have been chosen or drawn
there: the output is what it would have been without.

What is guessed costs: rows to compute, and where the host works a step ahead, that lead. So guesses are made in silence
first. A lookup says what it expects of each token before it is known, and how often it was right decides whether a
step's guesses are expected to bring more tokens than the same time brings without. Text that does not repeat itself
pays for the lookup alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flightline.torch_engine.core.sequence import Sequence

MOST_ROWS = 64
"""Of a step with guesses: beyond them a row more is no longer cheap on any device."""
READ = 1024
"""Tokens that lookups read in one step, all together: a long prompt must not stop the others."""
RATE = 0.25
"""How fast the trust in a lookup follows what it is worth: the weight of the last expectation."""
MARGIN = 0.25
"""What guesses must bring beyond what they cost, in tokens for each request of the step: they may be wrong, and the
step waits for the one before it."""
CANDIDATES = 8
"""Places where the last two tokens stood before that are compared, the latest first."""
LONGEST = 8
"""Tokens before such a place that are compared."""


class PromptLookup:
    """Expects what followed a sequence's latest tokens where they stood before.

    Of the last ``CANDIDATES`` such places the one with the longest common text counts, the latest of equals; and as
    long as what it says comes true, the next token is expected from there too.

    Args:
        num_prompt: tokens that are given: what is expected of these is no merit.
    """

    def __init__(self, num_prompt: int) -> None:
        self._num_prompt = num_prompt
        self._latest: dict[int, int] = {}
        """Two neighbouring tokens -> where what followed them last begins."""
        self._earlier: list[int] = []
        """For each place the one before it that follows the same two tokens; -1: none."""
        self._expected = -1
        """Where the next token is expected to stand already; -1: nothing is expected."""
        self.trust = 0.0
        """How likely an expected token is to come, by those that came or did not."""

    def read(self, tokens: list[int], most: int) -> None:
        """Takes up to ``most`` of the tokens that are new; call it with the same sequence, grown, every time."""
        begin = len(self._earlier)
        for end in range(begin, min(len(tokens), begin + most)):
            if self._expected >= 0:
                self._compare(tokens[end] == tokens[self._expected])
            pair = tokens[end - 1] << 32 | tokens[end] if end else -1
            earlier = self._latest.get(pair, -1)
            self._latest[pair] = end + 1
            self._earlier.append(earlier)
            if self._expected < 0 and end >= self._num_prompt - 1:
                self._expected = self._longest(tokens, end + 1, earlier)

    def guess(self, tokens: list[int], count: int) -> list[int]:
        """The ``count`` tokens that are expected after ``tokens``; none before all of these are read."""
        if self._expected < 0 or len(self._earlier) < len(tokens):
            return []
        period = len(tokens) - self._expected  # what repeats itself may go on doing so
        return [tokens[self._expected + number % period] for number in range(count)]

    def _compare(self, right: bool) -> None:
        """The expected token has come, or another one."""
        self.trust += RATE * (right - self.trust)
        self._expected = self._expected + 1 if right else -1

    def _longest(self, tokens: list[int], end: int, place: int) -> int:
        """Of the places from ``place`` backwards the one before which most of ``tokens[:end]``'s last ones stand."""
        best, longest = -1, 0
        for _ in range(CANDIDATES):
            if place < 0:
                break
            length = 2
            while length < min(LONGEST, place) and tokens[place - length - 1] == tokens[end - length - 1]:
                length += 1
            if length > longest:
                best, longest = place, length
            place = self._earlier[place - 1]
        return best


class Speculation:
    """Decides what a step guesses.

    Args:
        most: guesses beside one token.
        row_cost: time of one row more in a step, in times of what the step takes however few rows it has.
        margin: see :data:`MARGIN`.
    """

    def __init__(self, most: int, row_cost: float, margin: float = MARGIN) -> None:
        self._most = most
        self._row_cost = row_cost
        self._margin = margin

    def plan(self, decodes: list[Sequence], budget: int) -> dict[Sequence, list[int]]:
        """Guesses for those of a step's decodes where they are worth it, ``budget`` at most; often none.

        Where a sequence's last token is in flight, they follow what that is expected to be.
        """
        rows = len(decodes)
        room = min(budget, MOST_ROWS - rows)
        # What a grammar holds gets no guesses: each would need a mask of its own, of a state that may never be.
        free = [sequence for sequence in decodes if sequence.request.guide is None]
        if room <= 0 or not free:
            return {}
        for sequence in free:
            sequence.lookup.read(sequence.tokens, READ // rows)
        cost = (
            self._row_cost * rows / (1 + self._row_cost * rows)
        )  # of a row, in tokens that it takes as long as
        profit, plans = 0.0, {}
        for sequence in sorted(free, key=lambda each: -each.lookup.trust):
            guesses, gain = self._guesses(sequence, room, cost)
            if guesses:
                plans[sequence] = guesses
                profit += gain
                room -= len(guesses)
        return plans if profit > self._margin * rows else {}

    def _guesses(self, sequence: Sequence, room: int, cost: float) -> tuple[list[int], float]:
        """Those that are worth a row each, and the tokens that they bring beyond what they cost."""
        lookup, pending = sequence.lookup, sequence.num_pending
        if lookup.trust <= cost:
            return [], 0.0
        left = sequence.last_length - len(sequence.tokens) - pending - 1
        count = min(self._most, room, left)
        guesses, chance, gain = [], lookup.trust**pending, 0.0
        for guess in lookup.guess(sequence.tokens, pending + count)[pending:]:
            chance *= lookup.trust
            if chance <= cost:
                break
            guesses.append(guess)
            gain += chance - cost
        return guesses, gain
