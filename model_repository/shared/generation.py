"""Token by token to ``RequestOutput``: what every engine that is not ours needs around it.

An engine that only chooses tokens gets the contract from here: whole text, stop words that never leak, the model's
list of end tokens, counts and times.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from torch_engine.request import (
    FinishReason,
    GenerationRequest,
    PerfMetrics,
    RequestError,
    RequestOutput,
)
from torch_engine.text import Release, TextStream, TokenBytes


def end_ids_of(request: GenerationRequest, model_end_ids: tuple[int, ...]) -> frozenset[int]:
    """Tokens that end this request's output."""
    if request.end_id is None:
        return frozenset((*model_end_ids, *request.stop_ids))
    return (
        frozenset(request.stop_ids) if request.end_id < 0 else frozenset((request.end_id, *request.stop_ids))
    )


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
    cum_log_prob: float = 0.0
    cancelled: bool = False
    finished: bool = False
    told_metrics: bool = False
    """``metrics`` are the engine's own, of the whole request: tokens no longer set their times."""
    _held_log_probs: list[float] = field(default_factory=list)
    _held_tops: list[list[tuple[int, float]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        tokens = self.tokens if self.request.skip_special_tokens else self.tokens.with_special
        self._stream = TextStream(tokens, self.request.stop)

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
        self.cum_log_prob += log_prob
        self._held_log_probs.append(log_prob)
        self._held_tops.append(top)
        release = self._stream.push(token)
        if release.stopped:
            self.finish(FinishReason.STOP, release)
        elif self.num_tokens == self.request.max_tokens:
            rest = self._stream.finish()
            self.finish(
                FinishReason.LENGTH, Release(release.token_ids + rest.token_ids, release.text + rest.text)
            )
        elif release.token_ids:
            self._emit(release)

    def finish(self, reason: FinishReason, release: Release | None = None) -> None:
        """Ends it, with everything that was held back or just ``release``."""
        if not self.finished:
            self.finished = True
            self._emit(self._stream.finish() if release is None else release, reason)

    def fail(self, error: RequestError) -> None:
        if not self.finished:
            self.finished = True
            self.on_output(RequestOutput(finish_reason=FinishReason.ERROR, error=error))

    def _emit(self, release: Release, reason: FinishReason | None = None) -> None:
        count = len(release.token_ids)
        log_probs, self._held_log_probs = self._held_log_probs[:count], self._held_log_probs[count:]
        tops, self._held_tops = self._held_tops[:count], self._held_tops[count:]
        wanted = self.request.return_log_probs
        self.on_output(
            RequestOutput(
                token_ids=release.token_ids,
                text=release.text,
                log_probs=log_probs if wanted else [],
                top_log_probs=tops if self.request.top_log_probs else [],
                cum_log_prob=self.cum_log_prob if wanted else 0.0,
                num_input_tokens=len(self.request.prompt_ids),
                num_output_tokens=self.num_tokens,
                finish_reason=reason,
                metrics=None if reason is None else self.metrics,
                sequence_index=self.request.sequence_index,
            )
        )
