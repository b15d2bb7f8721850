"""How long a step takes, learned from the steps that ran, and how much of a prompt fits into a given time.

The model is one that every device follows closely enough: seconds = a + b * tokens + c * tokens * context. Its three
numbers are fitted to the latest steps. Steps of decodes alone are far more frequent than those with prompts and tell
nothing of them, so the latest of each kind are kept apart.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

KEPT = 48
"""Latest steps of each kind that the model is fitted to."""
UNKNOWN = 64
"""Tokens of a prompt that a step may have while no step with a prompt was seen."""
SPREAD = 4.0
"""A step that took so many times what was expected is taken for that at most: it was held up from outside. What is
expected of a step larger than all that ran is no more than a guess, and it is believed whatever it takes."""
GROWTH = 2
"""A step may be so many times as large as those that ran: few tokens take as long as one on many devices, which says
nothing of thousands."""


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

    def observe(self, work: Work, seconds: float, prompts: bool) -> None:
        """``prompts``: the step had more of a sequence than its next token."""
        if seconds <= 0:
            return
        latest = self._latest[prompts]
        if len(latest) >= KEPT // 4 and _within(work, _largest(latest)):
            seconds = min(seconds, SPREAD * self.expected(work))
        latest.append((work, seconds))
        self._fitted = None

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
        """Least squares of the relative errors, without negative numbers."""
        if self._fitted is None:
            samples = [*self._latest[False], *self._latest[True]]
            self._fitted = _least_squares(samples) if samples else (0.0, 0.0, 0.0)
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


def _least_squares(samples: list[tuple[Work, float]]) -> tuple[float, float, float]:
    seconds = np.array([took for _, took in samples])
    columns = np.array([(1.0, work.tokens, work.pairs) for work, _ in samples]) / seconds[:, None]
    units = np.maximum(columns.max(0), 1e-30)  # so that all three are of one size
    kept = [0, 1, 2]
    numbers = np.zeros(3)
    while kept:
        found = np.linalg.lstsq(columns[:, kept] / units[kept], np.ones(len(samples)), rcond=1e-6)[0]
        if (found >= 0).all():
            numbers[kept] = found / units[kept]
            break
        kept.pop(int(found.argmin()))
    a, b, c = numbers.tolist()
    return a, b, c
