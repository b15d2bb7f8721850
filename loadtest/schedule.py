"""When requests are sent in an open loop: absolute times that do not depend on what the server does.

A process of unit rate (constant, Poisson, gamma) is bent by the rate's profile: its ``k``-th event happens
when the integral of the rate reaches the ``k``-th unit time. All workers make the same schedule from the
same seed and each takes its share, so that one worker and ten send the same requests at the same times.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from flightline.settings import SettingsError

Pattern = Literal["constant", "poisson", "gamma"]
PATTERNS: tuple[str, ...] = get_args(Pattern)


@dataclass(frozen=True)
class Stage:
    """The rate goes linearly from ``start`` to ``end`` requests/s in ``seconds`` (may be endless if equal)."""

    start: float
    end: float
    seconds: float

    @property
    def requests(self) -> float:
        return (self.start + self.end) / 2 * self.seconds

    def time_of(self, requests: float) -> float:
        """Seconds after which the stage has had so many requests."""
        slope = (self.end - self.start) / self.seconds
        if abs(slope) < 1e-12:
            return requests / self.start
        return (math.sqrt(max(0.0, self.start**2 + 2 * slope * requests)) - self.start) / slope


@dataclass(frozen=True)
class Profile:
    """Request rate over time."""

    stages: tuple[Stage, ...]

    @classmethod
    def parse(cls, text: str, seconds: float, ramp_s: float = 0.0) -> Profile:
        """``4`` is a constant rate, ``1-8`` rises linearly, ``2@30,2-8@60`` are stages one after the other.

        Args:
            seconds: Length of a profile that names none; may be infinite if the rate is constant.
            ramp_s: Length of a linear start from 0 to the first rate, a part of ``seconds``.

        Raises:
            SettingsError: not such a text, or a rate that is not positive.
        """
        stages = []
        for part in text.split(","):
            rates, _, length = part.partition("@")
            low, dash, high = rates.partition("-")
            try:
                start, end = float(low), float(high if dash else low)
                stage = Stage(start, end, float(length) if length else seconds)
            except ValueError:
                raise SettingsError(
                    f"RATE={text!r} is not valid: use requests/s like 4, 1-8 or 2@30,8@30"
                ) from None
            if min(start, end) < 0 or max(start, end) <= 0 or stage.seconds <= 0:
                raise SettingsError(f"RATE={text!r} is not valid: rates and lengths must be positive")
            if math.isinf(stage.seconds) and start != end:
                raise SettingsError(
                    f"RATE={text!r} is not valid: a rate that changes needs a length, as in 1-8@60"
                )
            stages.append(stage)
        if ramp_s:
            first = stages[0]
            if ramp_s >= first.seconds:
                raise SettingsError(f"RAMP_S={ramp_s:g} is not valid: it must be shorter than the load")
            stages[:1] = [
                Stage(0, first.start, ramp_s),
                Stage(first.start, first.end, first.seconds - ramp_s),
            ]
        return cls(tuple(stages))

    @property
    def seconds(self) -> float:
        return sum(stage.seconds for stage in self.stages)

    def times(self, unit_times: Iterator[float]) -> Iterator[float]:
        """Seconds since the start, until the profile ends."""
        done, before_s = 0.0, 0.0
        stages = iter(self.stages)
        stage = next(stages)
        for unit_time in unit_times:
            while unit_time - done >= stage.requests:
                done, before_s = done + stage.requests, before_s + stage.seconds
                following = next(stages, None)
                if following is None:
                    return
                stage = following
            yield before_s + stage.time_of(unit_time - done)


def unit_times(pattern: str, seed: int, burstiness: float = 1.0) -> Iterator[float]:
    """Ascending times with a mean distance of 1.

    ``gamma`` has gaps of shape ``burstiness``: their coefficient of variation is 1/sqrt(burstiness), so 1 is
    Poisson, less is burstier, more is smoother.
    """
    rng = random.Random(f"arrivals/{seed}")
    now = 0.0
    while True:
        yield now
        if pattern == "constant":
            now += 1.0
        elif pattern == "poisson":
            now += rng.expovariate(1.0)
        else:
            now += rng.gammavariate(burstiness, 1.0 / burstiness)
