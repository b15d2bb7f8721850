"""Service-level objectives: limits on TTFT and TPOT, and the share of requests that must keep them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from flightline.loadtest.records import RequestRecord
from flightline.settings import SettingsError


@dataclass(frozen=True)
class Slo:
    """Holds if ``percent`` of the requests keep both limits; a request that fails keeps none."""

    name: str
    ttft_s: float
    tpot_s: float
    percent: float = 99.0

    @classmethod
    def parse(cls, text: str) -> Slo:
        """A preset's name, or own values like ``ttft=2s,tpot=100ms`` or ``ttft=500ms,tpot=30ms,p=95``.

        Raises:
            SettingsError: neither.
        """
        if text in PRESETS:
            return PRESETS[text]
        values: dict[str, float] = {}
        for part in text.split(","):
            match = re.fullmatch(r"\s*(ttft|tpot|p)\s*=\s*([\d.]+)\s*(ms|s|%)?\s*", part)
            if match is None or match[1] in values or (match[1] == "p") == (match[3] in ("ms", "s")):
                values = {}
                break
            try:
                values[match[1]] = float(match[2]) / (1e3 if match[3] == "ms" else 1)
            except ValueError:
                values = {}
                break
        if not {"ttft", "tpot"} <= set(values) or min(values.values()) <= 0 or values.get("p", 99) > 100:
            names = ", ".join(PRESETS)
            raise SettingsError(
                f"SLO={text!r} is not valid: use {names}, or limits like ttft=2s,tpot=100ms,p=99"
            )
        return cls(text, values["ttft"], values["tpot"], values.get("p", 99.0))

    def describe(self) -> str:
        return f"TTFT ≤ {1e3 * self.ttft_s:g} ms and TPOT ≤ {1e3 * self.tpot_s:g} ms for {self.percent:g} % of requests"

    def kept_by(self, record: RequestRecord) -> bool:
        """An answer in one piece has no TPOT and is judged by its TTFT alone."""
        if record.problem is not None or not record.complete or record.ttft_s is None:
            return False
        return record.ttft_s <= self.ttft_s and (record.tpot_s or 0.0) <= self.tpot_s


PRESETS = {
    # MLPerf Inference, llama3.1-8b, Server and Interactive scenarios: p99 limits of loadgen's mlperf.conf.
    "mlperf-server": Slo("mlperf-server", 2.000, 0.100),
    "mlperf-interactive": Slo("mlperf-interactive", 0.500, 0.030),
}
