"""What prompt lookup brings and costs: an engine with it and without, in turns, on text that repeats itself or not."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from flightline.torch_engine.core.request import GenerationRequest
from flightline.torch_engine.engine import Engine

GUESSES = 4
"""Most guesses beside a token: ``speculation_tokens`` of the engine."""
HEAD = (
    "| text | in flight | without, tok/s | with, tok/s | with / without: median (spread) | guesses, right |\n"
    "|---|--:|--:|--:|--:|--:|"
)


@dataclass
class Turns:
    """Of one text at one concurrency: the rates of each round, in output tokens/s."""

    text: str
    in_flight: int
    without: list[float] = field(default_factory=list)
    with_guesses: list[float] = field(default_factory=list)
    guessed: int = 0
    right: int = 0

    def row(self) -> str:
        ratios = sorted(on / off for on, off in zip(self.with_guesses, self.without, strict=True))
        spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})"
        off, on = statistics.median(self.without), statistics.median(self.with_guesses)
        right = f"{self.right / self.guessed:.0%}" if self.guessed else "none"
        return (
            f"| {self.text} | {self.in_flight} | {off:.1f} | {on:.1f} | {spread} | {self.guessed}, {right} |"
        )


def take_turns(
    engine: Engine, text: str, in_flight: int, make: Callable[[int], list[GenerationRequest]], rounds: int
) -> Turns:
    """``engine`` has :data:`GUESSES`; ``make`` gives a round's requests from its number, for both turns the same."""
    speculation = engine.scheduler.speculation
    assert speculation is not None

    def rate(requests: list[GenerationRequest], guesses: bool) -> float:
        engine.scheduler.speculation = speculation if guesses else None
        before = engine.stats
        start = time.perf_counter()
        outputs = engine.generate(requests)
        seconds = time.perf_counter() - start
        turns.guessed += engine.stats.guessed_tokens - before.guessed_tokens
        turns.right += engine.stats.accepted_tokens - before.accepted_tokens
        return sum(len(output.token_ids) for output in outputs) / seconds

    turns = Turns(text, in_flight)
    rate(make(0), guesses=False)
    rate(make(0), guesses=True)
    turns.guessed = turns.right = 0
    for number in range(rounds):
        requests = make(number)
        for guesses in (number % 2 == 0, number % 2 == 1):
            (turns.with_guesses if guesses else turns.without).append(rate(requests, guesses))
    engine.scheduler.speculation = speculation
    return turns
