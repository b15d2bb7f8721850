"""Confidence: how many samples a percentile needs, and what a ratio of repeats is worth."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from scipy.special import bdtr, stdtrit

CONFIDENCE = 0.95
RESAMPLES = 2000


@cache
def samples_needed(percent: float) -> int:
    """Least number of samples for a percentile to be shown.

    With so many, the second largest sample is above the true percentile with 99 % confidence: p90 needs 64,
    p99 662. The rule is that of MLPerf's early stopping (mlcommons/endpoints, docs/early_stopping.md).
    """
    above = 1 - percent / 100
    n = 2
    while bdtr(1, n, above) > 0.01:
        n += 1
    return n


@dataclass(frozen=True)
class Ratio:
    """First against second, more than 1 is better, with the interval that holds the true one with 95 %.

    Of a lone round (``n`` is 1) there is no such interval; ``low`` and ``high`` are the quotients of its pairs.
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    """Rounds, or samples, behind it."""
    method: str = ""


Pair = tuple[float | None, float | None]


def ratio_of_rounds(rounds: Sequence[Sequence[Pair]]) -> Ratio:
    """Geometric mean of the rounds' ratios, with Student's t interval of their logarithms.

    Args:
        rounds: The pairs of neighbours in each. One round alone has no interval; of several pairs in it, ``low`` and
            ``high`` are the extremes.
    """
    quotients = [[a / b for a, b in pairs if a and b and a > 0 and b > 0] for pairs in rounds]
    logs = [[math.log(quotient) for quotient in one] for one in quotients if one]
    if not logs:
        return Ratio(None)
    means = [sum(one) / len(one) for one in logs]
    mean = sum(means) / len(means)
    if len(means) > 1:
        half = (
            stdtrit(len(means) - 1, 0.5 + CONFIDENCE / 2)
            * float(np.std(means, ddof=1))
            / math.sqrt(len(means))
        )
        low, high = math.exp(mean - half), math.exp(mean + half)
        return Ratio(math.exp(mean), low, high, len(means), "t interval over rounds of neighbouring repeats")
    if len(logs[0]) > 1:
        low, high = math.exp(min(logs[0])), math.exp(max(logs[0]))
        return Ratio(math.exp(mean), low, high, 1, "one round: its quotients")
    return Ratio(math.exp(mean), n=1, method="one pair: no interval")


def bootstrap_ratio(
    first: Sequence[float], second: Sequence[float], percent: float | None = 50, seed: int = 0
) -> Ratio:
    """Ratio of two unpaired samples' percentiles, or means if ``percent`` is None, with a bootstrap interval."""
    if len(first) < 2 or len(second) < 2:
        return Ratio(None)
    rng = np.random.default_rng(seed)

    def statistic(values: np.ndarray) -> np.ndarray:
        return values.mean(axis=-1) if percent is None else np.percentile(values, percent, axis=-1)

    def resampled(values: Sequence[float]) -> np.ndarray:
        array = np.asarray(values, dtype=float)
        picks = rng.integers(0, len(array), size=(RESAMPLES, len(array)))
        return statistic(array[picks])

    ratios = resampled(first) / resampled(second)
    low, high = np.percentile(ratios, [50 * (1 - CONFIDENCE), 100 - 50 * (1 - CONFIDENCE)])
    value = float(statistic(np.asarray(first, dtype=float)) / statistic(np.asarray(second, dtype=float)))
    return Ratio(value, float(low), float(high), min(len(first), len(second)), "bootstrap, unpaired")
