"""What comes back: chunks of a stream, and the whole answer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class PerfMetrics:
    """The server's own times of one request, in ns of its steady clock (no dates), and its KV-cache blocks."""

    arrival_time_ns: int
    first_scheduled_time_ns: int
    first_token_time_ns: int
    last_token_time_ns: int
    kv_cache_alloc_new_blocks: int | None = None
    kv_cache_reused_blocks: int | None = None
    kv_cache_alloc_total_blocks: int | None = None

    @property
    def queue_s(self) -> float:
        """From arrival to the first step that worked on the request."""
        return (self.first_scheduled_time_ns - self.arrival_time_ns) / 1e9

    @property
    def ttft_s(self) -> float:
        """From arrival to the first token."""
        return (self.first_token_time_ns - self.arrival_time_ns) / 1e9

    @property
    def total_s(self) -> float:
        """From arrival to the last token."""
        return (self.last_token_time_ns - self.arrival_time_ns) / 1e9


@dataclass(frozen=True)
class Chunk:
    """One response of a stream; ``str(chunk)`` is its text. Counts and metrics are None unless asked for."""

    text: str
    """New text only; the texts of all chunks concatenate to the answer."""
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None
    """Tokens generated so far."""
    log_probs: list[float] = field(default_factory=list)
    """Log-probability of each new token."""
    cum_log_prob: float | None = None
    """Sum of the log-probabilities so far."""
    perf_metrics: PerfMetrics | None = None

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Generation:
    """A complete answer; ``str(generation)`` is its text."""

    text: str
    finish_reason: str | None
    """``length`` (max_tokens reached) or ``stop`` (end token or stop word); None without token counts."""
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None
    log_probs: list[float] = field(default_factory=list)
    cum_log_prob: float | None = None
    perf_metrics: PerfMetrics | None = None

    def __str__(self) -> str:
        return self.text

    @classmethod
    def from_chunks(cls, chunks: Iterable[Chunk], max_tokens: int) -> Generation:
        """Adds the chunks of one stream up. Counts and metrics are those of the last chunk that has them."""
        merged = Chunk("")
        for chunk in chunks:
            merged = Chunk(
                text=merged.text + chunk.text,
                num_input_tokens=_latest(chunk.num_input_tokens, merged.num_input_tokens),
                num_output_tokens=_latest(chunk.num_output_tokens, merged.num_output_tokens),
                log_probs=merged.log_probs + chunk.log_probs,
                cum_log_prob=_latest(chunk.cum_log_prob, merged.cum_log_prob),
                perf_metrics=chunk.perf_metrics or merged.perf_metrics,
            )
        count = merged.num_output_tokens
        finish_reason = None if count is None else ("length" if count >= max_tokens else "stop")
        return cls(
            merged.text,
            finish_reason,
            merged.num_input_tokens,
            count,
            merged.log_probs,
            merged.cum_log_prob,
            merged.perf_metrics,
        )


def _latest(new, old):
    return old if new is None else new
