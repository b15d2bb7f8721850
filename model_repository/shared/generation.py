"""Token by token to ``RequestOutput``: what every engine that is not ours needs around it.

An engine that only chooses tokens gets the contract from here: whole text, stop words that never leak, the model's
list of end tokens, counts and times.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from flightline.torch_engine.core.output import OutputAccumulator
from flightline.torch_engine.core.request import (
    FinishReason,
    GenerationRequest,
    PerfMetrics,
    RequestError,
    RequestOutput,
)
from flightline.torch_engine.text.stream import Release, TokenBytes


@dataclass(eq=False)
class Progress:
    """One request on its way through another engine; ``take`` its tokens until ``finished``."""

    request: GenerationRequest
    on_output: Callable[[RequestOutput], None]
    tokens: TokenBytes
    end_ids: frozenset[int]
    metrics: PerfMetrics
    """Starts with the arrival time; times are filled in as they come."""
    num_tokens: int = 0
    cancelled: bool = False
    finished: bool = False
    told_metrics: bool = False
    """``metrics`` are the engine's own, of the whole request: tokens no longer set their times."""
    lane_outputs: Mapping[str, Any] = field(default_factory=dict)
    """Goes into the last message; see ``RequestOutput``."""

    def __post_init__(self) -> None:
        self._output = OutputAccumulator.of(self.request, self.tokens)

    def scheduled(self) -> None:
        """The engine has begun to work on it."""
        self.metrics = replace(self.metrics, first_scheduled_time_ns=time.monotonic_ns())

    def take(self, token: int, log_prob: float = 0.0, top: list[tuple[int, float]] | None = None) -> None:
        """One new token, and the likeliest ones in its place: emits what is final, finishes if this was the last."""
        if self.finished:
            return
        if not self.told_metrics:
            now = time.monotonic_ns()
            self.metrics = replace(
                self.metrics,
                first_scheduled_time_ns=self.metrics.first_scheduled_time_ns or now,
                first_token_time_ns=self.metrics.first_token_time_ns or now,
                last_token_time_ns=now,
            )
        if self.cancelled:
            self.finish(FinishReason.CANCELLED)
        elif token in self.end_ids:
            self.finish(FinishReason.END_ID)
        else:
            self._add(token, log_prob, top or [])

    def _add(self, token: int, log_prob: float, top: list[tuple[int, float]]) -> None:
        self.num_tokens += 1
        release = self._output.push(token, log_prob, top)
        if release.stopped:
            self.finish(FinishReason.STOP, release)
        elif self.num_tokens == self.request.max_tokens:
            self.finish(FinishReason.LENGTH, self._output.rest(release))
        elif release.token_ids:
            self._emit(release)

    def finish(self, reason: FinishReason, release: Release | None = None) -> None:
        """Ends it, with everything that was held back or just ``release``."""
        if not self.finished:
            self.finished = True
            self._emit(self._output.rest() if release is None else release, reason)

    def fail(self, error: RequestError) -> None:
        if not self.finished:
            self.finished = True
            self.on_output(RequestOutput(finish_reason=FinishReason.ERROR, error=error))

    def _emit(self, release: Release, reason: FinishReason | None = None) -> None:
        output = self._output.tell(release, reason, None if reason is None else self.metrics)
        if reason is not None and self.lane_outputs:
            output.lane_outputs = self.lane_outputs
        self.on_output(output)
