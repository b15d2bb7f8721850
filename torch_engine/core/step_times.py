"""How long a step takes, learned from the steps that ran, and how much of a prompt fits into a given time.

The model is one that every device follows closely enough: seconds = a + b * tokens + c * tokens * context. Its three
numbers are fitted to the latest steps. Steps of decodes alone are far more frequent than those with prompts and tell
nothing of them, so the latest of each kind are kept apart.
"""

from __future__ import annotations

import math
from collections import deque
from typing import NamedTuple

import numpy as np

KEPT = 48
"""Latest steps of each kind that the model is fitted to."""
UNKNOWN = 64
"""Tokens of a prompt that a step may have while no step with a prompt was seen."""
SPREAD = 4.0
"""A step that took so many times what was expected is taken for that at most: it was held up from outside."""


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
        if len(latest) >= KEPT // 4:
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
        # c / 2 n^2 + (b + c begin) n = left
        linear = b + c * begin
        if left <= 0:
            return 0
        if c > 0:
            return min(int((math.sqrt(linear * linear + 2 * c * left) - linear) / c), 2**31)
        return int(left / linear) if linear > 0 else 2**31

    def _fit(self) -> tuple[float, float, float]:
        """Least squares of the relative errors, without negative numbers."""
        if self._fitted is None:
            samples = [*self._latest[False], *self._latest[True]]
            self._fitted = _least_squares(samples) if samples else (0.0, 0.0, 0.0)
        return self._fitted


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
