"""How a time budget is spent: interleaved blocks, long enough for a steady state at the given load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

MIN_BLOCK_S = 8.0
MIN_SAMPLES = 6
"""Latency samples that a block of the slowest server (one request at a time) must yield."""
SHORT_SAMPLES = 4
"""Answers after the ramp in a short block of such a server, for its throughput."""
SHORT_WAVE = 1.6
"""Times of a wave that a short block leaves for its only one after the ramp; it may be slower than in warm-up."""
SLACK = 1.1
BLOCK_OVERHEAD_S = 2.5
"""Start of the load generator, and waiting until the server is idle again."""
SHORT_ROUNDS = 2
"""Fewest rounds of short blocks, unless fewer full ones would have done."""


@dataclass(frozen=True)
class Pace:
    """What warm-up showed about an endpoint under the full load."""

    first_s: float
    """Until the first of the requests is answered."""
    wave_s: float
    """Until all requests of one wave are answered: the steady latency."""

    @classmethod
    def of(cls, completions_s: list[float], concurrency: int) -> Pace:
        """From the completion times of the first requests of a wave; the others are extrapolated.

        Args:
            completions_s: Ascending, at least one.
            concurrency: Requests of the wave.
        """
        first, last, count = completions_s[0], completions_s[-1], len(completions_s)
        between = (last - first) / (count - 1) if count > 1 else first
        return cls(first, last + (concurrency - count) * between)

    def block_s(self, concurrency: int, short: bool = False) -> float:
        """Length of a block with a ramp, one full latency, and then enough completions.

        Enough are ``MIN_SAMPLES`` of a server that answers one by one, or another wave of one that
        answers all at once. A short block goes without the full latency: its completions give the
        throughput, but a server that answers one by one shows no latency in it.
        """
        samples, latency_s, waves = (
            (SHORT_SAMPLES, 0.0, SHORT_WAVE) if short else (MIN_SAMPLES, self.wave_s, 1.0)
        )
        enough = max(waves * self.first_s, self.wave_s * samples / concurrency)
        return max(MIN_BLOCK_S, SLACK * (self.first_s + latency_s + enough))

    def shows_latency(self, block_s: float) -> bool:
        """Whether a request sent after the block's ramp can be answered before its end."""
        return block_s >= self.first_s + self.wave_s


Key = tuple[str, str]
"""A contestant's label and a level's."""


@dataclass(frozen=True)
class Plan:
    """Rounds, in each of which every contestant has a block at every level.

    A lone round has the last contestant's blocks twice, before and after all others, so that drift of the machine
    hits both sides alike; several rounds go back and forth and need no more.
    """

    rounds: int
    seconds: dict[Key, int]

    @property
    def total_s(self) -> float:
        """Expected duration of all blocks with what lies between them."""
        return sum(times * (self.seconds[key] + BLOCK_OVERHEAD_S) for key, times in self._times().items())

    def orders(self, contestants: list[str]) -> list[list[str]]:
        """The contestants of each round in the order of their blocks."""
        if self.rounds == 1:
            return [[*reversed(contestants), contestants[-1]]]
        return [contestants if number % 2 else contestants[::-1] for number in range(1, self.rounds + 1)]

    def stretched(self, budget_s: float) -> Plan:
        """The same with longer blocks, as far as the budget allows."""
        load_s = sum(times * self.seconds[key] for key, times in self._times().items())
        scale = max(1.0, 1.0 + (budget_s - self.total_s) / load_s)
        return Plan(self.rounds, {key: int(scale * length) for key, length in self.seconds.items()})

    def _times(self) -> dict[Key, int]:
        last = list(self.seconds)[-1][0]
        return {key: 2 if self.rounds == 1 and key[0] == last else self.rounds for key in self.seconds}


def plan(lengths: Mapping[Key, tuple[float, float]], rounds: int, full_rounds: int, budget_s: float) -> Plan:
    """The best of the plans that the budget holds, or the shortest of them all.

    From best to worst: ``rounds`` with full blocks down to ``full_rounds``; then that many with short blocks of the
    fastest contestant, of the fastest two, ... of all; then fewer of those.

    Args:
        lengths: (full, short) seconds of a block, the contestants in their order.
    """
    contestants = list(dict.fromkeys(contestant for contestant, _ in lengths))
    fastest_first = sorted(
        contestants, key=lambda c: sum(full for key, (full, _) in lengths.items() if key[0] == c)
    )
    least, everybody = min(rounds, full_rounds), len(contestants)
    shapes = [(number, 0) for number in range(rounds, least - 1, -1)]
    shapes += [(least, shortened) for shortened in range(1, everybody + 1)]
    shapes += [(number, everybody) for number in range(least - 1, min(least, SHORT_ROUNDS) - 1, -1)]
    for number, shortened in shapes:
        short = fastest_first[:shortened]
        made = Plan(number, {key: round(both[key[0] in short]) for key, both in lengths.items()})
        if made.total_s <= budget_s:
            break
    return made
