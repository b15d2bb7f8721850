"""How a time budget is spent: interleaved blocks, long enough for a steady state at the given load."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

MIN_BLOCK_S = 8.0
MAX_ROUNDS = 5
MIN_SAMPLES = 6
"""Latency samples that a block of the slowest server (one request at a time) must yield."""
SHORT_SAMPLES = 4
"""Answers after the ramp in a short block of such a server, for its throughput."""
SHORT_WAVE = 1.6
"""Times of a wave that a short block leaves for its only one after the ramp; it may be slower than in warm-up."""
SLACK = 1.1
BLOCK_OVERHEAD_S = 2.5
"""Start of the load generator, and waiting until the server is idle again."""


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


@dataclass(frozen=True)
class Block:
    """A stretch of load on one endpoint."""

    name: str
    endpoint: str
    seconds: int


def plan_blocks(
    candidate: str, baseline: str, paces: dict[str, Pace], concurrency: int, budget_s: float
) -> list[Block]:
    """Blocks A B A (B A ...): every baseline block has a candidate block on either side.

    As many rounds as the budget holds; what is left makes all blocks longer. If it does not hold one,
    the candidate's blocks of that round become short ones, and then the baseline's too. That is the
    least, planned even if the budget does not hold it.
    """
    shapes = [(rounds, False, False) for rounds in range(MAX_ROUNDS, 0, -1)]
    for rounds, short_a, short_b in [*shapes, (1, True, False), (1, True, True)]:
        a = paces[candidate].block_s(concurrency, short_a)
        b = paces[baseline].block_s(concurrency, short_b)
        load_s = (rounds + 1) * a + rounds * b
        left_s = budget_s - (2 * rounds + 1) * BLOCK_OVERHEAD_S
        if load_s <= left_s:
            break
    scale = max(1.0, left_s / load_s)
    order = [candidate, *[baseline, candidate] * rounds]
    seconds = {candidate: round(a * scale), baseline: round(b * scale)}
    return [Block(f"{i}-{endpoint}", endpoint, seconds[endpoint]) for i, endpoint in enumerate(order, 1)]


def too_short(blocks: list[Block], paces: dict[str, Pace]) -> list[str]:
    """The endpoints that cannot answer, in one of their blocks, a request sent after the block's ramp."""
    longest = {block.endpoint: block.seconds for block in blocks}
    return [name for name, pace in paces.items() if longest[name] < pace.first_s + pace.wave_s]


def planned_s(blocks: list[Block]) -> float:
    """Expected duration of the blocks with what lies between them."""
    return sum(block.seconds + BLOCK_OVERHEAD_S for block in blocks)


def neighbours(blocks: list[Block], candidate: str) -> list[tuple[Block, Block]]:
    """Every (candidate block, baseline block) that ran next to each other."""
    pairs = []
    for left, right in itertools.pairwise(blocks):
        pairs.append((left, right) if left.endpoint == candidate else (right, left))
    return pairs
