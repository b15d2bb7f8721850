"""``--assert 'ttft_p99<500ms, ratio>=6'``: conditions on a result, for continuous integration."""

from __future__ import annotations

import operator
import re
from dataclasses import dataclass

from flightline.settings import SettingsError

OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "%": 0.01}
TIMES = ("ttft", "tpot", "e2e", "ntpot", "gap", "stall", "outside", "schedule_delay")
PERCENTILES = ("mean", "p50", "p90", "p95", "p99", "worst")
PLAIN = (
    "output_tokens_per_s", "total_tokens_per_s", "requests_per_s", "goodput_per_s", "attained", "error_rate",
    "joules_per_token", "cost_per_million",
)  # fmt: skip
RATIOS = ("ratio", "ratio_ttft_p50", "ratio_e2e_p50", "ratio_tpot_p50", "max_rate")
NAMES = tuple(f"{time}_{percentile}" for time in TIMES for percentile in PERCENTILES) + PLAIN + RATIOS


@dataclass(frozen=True)
class Assertion:
    text: str
    name: str
    operator: str
    limit: float

    def holds(self, value: float | None) -> bool:
        """A value that was not measured does not hold anything."""
        return value is not None and OPERATORS[self.operator](value, self.limit)


@dataclass(frozen=True)
class Checked:
    """An assertion and what became of it."""

    text: str
    value: float | None
    ok: bool


def parse_all(text: str) -> list[Assertion]:
    """Raises SettingsError: not such a list; the message names the part."""
    return [_parse(part.strip()) for part in text.split(",") if part.strip()]


def _parse(text: str) -> Assertion:
    match = re.fullmatch(r"([a-z0-9_]+)\s*(<=|>=|<|>)\s*(\d+(?:\.\d+)?)\s*(ms|us|s|%)?", text)
    if match is None:
        raise SettingsError(f"ASSERT={text!r} is not valid: use conditions like 'ttft_p99<500ms, ratio>=6'")
    name, sign, number, unit = match.groups()
    if name not in NAMES:
        raise SettingsError(f"ASSERT={text!r} is not valid: {name} is none of {', '.join(NAMES)}")
    is_time = name.rsplit("_", 1)[0] in TIMES
    if is_time and unit in (None, "%"):
        raise SettingsError(f"ASSERT={text!r} is not valid: give the time a unit, s or ms")
    if not is_time and unit in ("s", "ms", "us"):
        raise SettingsError(f"ASSERT={text!r} is not valid: {name} is not a time")
    return Assertion(text, name, sign, float(number) * UNITS[unit or ""])
