"""How long a step takes, learned from the steps that ran, and how much of a prompt fits into a given time.

The model is one that every device follows closely enough: seconds = a + b * tokens + c * tokens * context. Its three
numbers are fitted to the latest steps. Steps of decodes alone are far more frequent than those with prompts and tell
nothing of them, so the latest of each kind are kept apart, and each kind counts as much as the other.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

KEPT = 48
"""Latest steps of each kind that the model is fitted to."""
UNKNOWN = 64
"""Tokens of a prompt that a step may have while no step with a prompt was seen."""
GROWTH = 2
"""A step may be so many times as large as those that ran: few tokens take as long as one on many devices, which says
nothing of thousands."""
MOST_MARGIN = 1.5
LEAST_MARGIN = 1.1
"""Between them is what a step may take of what was expected: as much as the latest ones took at the most, but for one
that was held up."""
ROUNDS = 2
"""Of the fit, each of which weighs the errors by what the one before expected."""
NUMBERS = [[0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]]
"""Which of the model's three are not 0. The best fit without negative ones is the best of all these: to drop one after
the other may leave a model that knows decodes only."""


class Work(NamedTuple):
    """What a step computes."""

    tokens: int
    pairs: float
    """Tokens times the tokens that they see, added up."""

    def __add__(self, other: tuple[object, ...]) -> Work:
        more = Work(*other)  # type: ignore[arg-type]
        return Work(self.tokens + more.tokens, self.pairs + more.pairs)

    @classmethod
    def of(cls, begin: int, count: int) -> Work:
        """``count`` tokens after ``begin`` that are in the KV cache."""
        return cls(count, count * (begin + count / 2))


NOTHING = Work(0, 0.0)


class StepTimes:
    """Expects how long steps take, by those that ran."""

    def __init__(self) -> None:
        self._latest: dict[bool, deque[tuple[Work, float]]] = {
            kind: deque(maxlen=KEPT) for kind in (False, True)
        }
        self._fitted: tuple[float, float, float] | None = None
        self._surprises: deque[float] = deque(maxlen=KEPT)
        """What the latest steps with prompts took of what was expected."""

    def observe(self, work: Work, seconds: float, prompts: bool, sure: bool = True) -> None:
        """A step has run.

        Args:
            prompts: it had more of a sequence than its next token.
            sure: it took so long itself; otherwise that is only how long everybody waited, since the host was late.
        """
        if seconds <= 0 or work.tokens <= 0:
            return
        latest = self._latest[prompts]
        if prompts and len(latest) >= KEPT // 4 and _within(work, _largest(latest)):
            self._surprises.append(seconds / max(self.expected(work), 1e-9))
        if sure:
            latest.append((work, seconds))
            self._fitted = None

    @property
    def margin(self) -> float:
        """Times longer than expected that a step has to be allowed for."""
        *_, second, _ = sorted([LEAST_MARGIN, LEAST_MARGIN, *self._surprises])
        return min(second, MOST_MARGIN)

    def expected(self, work: Work) -> float:
        """Seconds; 0 while nothing is known."""
        a, b, c = self._fit()
        return a + b * work.tokens + c * work.pairs

    def fitting(self, before: Work, begin: int, seconds: float) -> int:
        """Tokens after ``begin`` of one prompt with which a step that computes ``before``, too, stays in ``seconds``.

        May be 0 or less: the step takes longer without them.
        """
        if not self._latest[True]:
            return UNKNOWN - before.tokens
        _, b, c = self._fit()
        left = seconds - self.expected(before)
        if left <= 0:
            return 0
        tokens, pairs = _largest(self._latest[True])
        # c / 2 n^2 + (b + c begin) n = left, and the same of the pairs alone
        return min(
            _root(c, b + c * begin, left),
            GROWTH * tokens - before.tokens,
            _root(1.0, begin, GROWTH * pairs - before.pairs),
        )

    def _fit(self) -> tuple[float, float, float]:
        """Least squares of the relative errors among numbers that are not negative."""
        if self._fitted is None:
            kinds = [steps for steps in self._latest.values() if steps]
            self._fitted = _least_squares(kinds) if kinds else (0.0, 0.0, 0.0)
        return self._fitted


def _largest(steps: Iterable[tuple[Work, float]]) -> Work:
    """The most tokens and the most pairs of any."""
    works = [work for work, _ in steps]
    return Work(max(work.tokens for work in works), max(work.pairs for work in works))


def _within(work: Work, largest: Work) -> bool:
    return work.tokens <= largest.tokens and work.pairs <= largest.pairs


def _root(square: float, linear: float, sum_: float) -> int:
    """The largest whole n with ``square / 2 n^2 + linear n <= sum_``, none of which is negative but ``sum_``."""
    if sum_ <= 0:
        return 0
    if square > 0:
        return min(int((math.sqrt(linear * linear + 2 * square * sum_) - linear) / square), 2**31)
    return int(sum_ / linear) if linear > 0 else 2**31


def _least_squares(kinds: Iterable[Sequence[tuple[Work, float]]]) -> tuple[float, float, float]:
    """Of all kinds of steps, each counted as much as the others together, however many there are of it.

    Errors are relative: to what a step took or to what was expected, whichever is more. One that seems to have taken
    no time, or an hour, because the host was held up, would decide everything otherwise.
    """
    columns, seconds, expected, shares = [], [], [], []
    for steps in kinds:
        works = np.array([(1.0, *work) for work, _ in steps])
        took = np.array([took for _, took in steps])
        columns.append(works)
        seconds.append(took)
        expected.append(works[:, 1] * np.median(took / works[:, 1]))
        shares.append(np.full(len(steps), len(steps) ** -0.5))
    rows, wanted, guess, share = map(np.concatenate, (columns, seconds, expected, shares))
    fitted = np.zeros(3)
    for _ in range(ROUNDS):
        weights = share / np.maximum(wanted, guess)
        fitted = _not_negative(rows * weights[:, None], wanted * weights)
        guess = rows @ fitted
    a, b, c = fitted.tolist()
    return a, b, c


def _not_negative(columns: NDArray[Any], wanted: NDArray[Any]) -> NDArray[Any]:
    """The best of the fits that have no negative number."""
    units = np.maximum(columns.max(0), 1e-30)  # so that all three are of one size
    columns = columns / units
    square, right = columns.T @ columns + 1e-9 * np.eye(3), columns.T @ wanted
    best, least = units * 0, math.inf
    for kept in NUMBERS:
        found = units * 0
        found[kept] = np.linalg.solve(square[np.ix_(kept, kept)], right[kept])
        error = float(found @ square @ found - 2 * right @ found)
        if (found >= 0).all() and error < least:
            best, least = found, error
    fitted: NDArray[Any] = best / units
    return fitted
