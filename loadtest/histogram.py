"""Counts in buckets 1 % wide, from a microsecond to a day.

All workers' samples go into one histogram: percentiles of different workers do not add up and are never averaged.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

GROWTH = 1.01
SMALLEST_S = 1e-6
_LOG_GROWTH = math.log(GROWTH)


class Histogram:
    """Of durations in seconds; what is below a microsecond counts as that."""

    def __init__(self, values: Iterable[float] = ()) -> None:
        self.counts: Counter[int] = Counter()
        for value in values:
            self.add(value)

    def add(self, seconds: float) -> None:
        self.counts[round(math.log(max(seconds, SMALLEST_S) / SMALLEST_S) / _LOG_GROWTH)] += 1

    @property
    def n(self) -> int:
        return self.counts.total()

    def percentile(self, percent: float) -> float | None:
        """Within 0.5 % of the raw samples' nearest-rank percentile; None without samples."""
        rank = max(1, math.ceil(self.n * percent / 100))
        for bucket in sorted(self.counts):
            rank -= self.counts[bucket]
            if rank <= 0:
                return SMALLEST_S * GROWTH**bucket
        return None
