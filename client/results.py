"""What comes back: chunks of a stream, and the whole answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeVar

from flightline.client.errors import ClientError
from flightline.client.params import GenerateParams

T = TypeVar("T")
TopLogProbs = list[tuple[int, float]]
"""The most likely tokens in one place, the likeliest first: (token id, log-probability)."""
REASONS = {"end_id": "stop", "stop_words": "stop"}
"""The server's reason -> ours, where they differ."""


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
    total_draft_tokens: int | None = None
    """Tokens that the server guessed, and of those the right ones."""
    total_accepted_draft_tokens: int | None = None

    @property
    def acceptance_rate(self) -> float:
        """Of the server's guesses; 0 where it made none."""
        return (self.total_accepted_draft_tokens or 0) / (self.total_draft_tokens or 1)

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
    token_ids: list[int] = field(default_factory=list)
    """The new tokens."""
    top_log_probs: list[TopLogProbs] = field(default_factory=list)
    """The most likely tokens in the place of each new one."""
    prompt_log_probs: list[float] = field(default_factory=list)
    """Log-probability of each token of the prompt but the first, in the first chunk of an answer."""
    prompt_top_log_probs: list[TopLogProbs] = field(default_factory=list)
    """The most likely tokens in the places of those."""
    finish_reason: str | None = None
    """As in :class:`Generation`, in the last chunk of an answer."""
    sequence_index: int = 0
    """Of several answers to the prompt: which this belongs to."""
    error: ClientError | None = None
    """Of several answers to the prompt this one has failed; the others go on."""

    def __str__(self) -> str:
        return self.text


@dataclass(frozen=True)
class Generation:
    """A complete answer; ``str(generation)`` is its text."""

    text: str
    finish_reason: str | None
    """``length`` (max_tokens reached), ``stop`` (end token or stop word), ``cancelled`` (``return_finish_reason`` only)
    or ``error``; None if it was not asked for and there are no token counts."""
    num_input_tokens: int | None = None
    num_output_tokens: int | None = None
    log_probs: list[float] = field(default_factory=list)
    cum_log_prob: float | None = None
    perf_metrics: PerfMetrics | None = None
    token_ids: list[int] = field(default_factory=list)
    top_log_probs: list[TopLogProbs] = field(default_factory=list)
    prompt_log_probs: list[float] = field(default_factory=list)
    prompt_top_log_probs: list[TopLogProbs] = field(default_factory=list)
    sequence_index: int = 0
    error: ClientError | None = None
    """Of several answers to the prompt this one has failed; the rest is what came before."""

    def __str__(self) -> str:
        return self.text

    @classmethod
    def all_from_chunks(cls, chunks: Iterable[Chunk], params: GenerateParams) -> list[Generation]:
        """Each of several answers, by their ``sequence_index``.

        Raises:
            ClientError: all of them have failed; this is the first one's error.
        """
        answers: list[list[Chunk]] = [[] for _ in range(params.num_return_sequences or 1)]
        for chunk in chunks:
            answers[chunk.sequence_index].append(chunk)
        made = [cls.from_chunks(answer, params.max_tokens) for answer in answers]
        errors = [generation.error for generation in made if generation.error is not None]
        if len(errors) == len(made):
            raise errors[0]
        return made

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
                token_ids=merged.token_ids + chunk.token_ids,
                top_log_probs=merged.top_log_probs + chunk.top_log_probs,
                prompt_log_probs=merged.prompt_log_probs + chunk.prompt_log_probs,
                prompt_top_log_probs=merged.prompt_top_log_probs + chunk.prompt_top_log_probs,
                finish_reason=chunk.finish_reason or merged.finish_reason,
                sequence_index=chunk.sequence_index,
                error=chunk.error,
            )
        merged = dataclasses.replace(merged, finish_reason=_reason(merged, max_tokens))
        return cls(**vars(merged))


def _reason(answer: Chunk, max_tokens: int) -> str | None:
    if answer.error is not None:
        return "error"
    if answer.finish_reason is not None:
        return REASONS.get(answer.finish_reason, answer.finish_reason)
    if answer.num_output_tokens is None:
        return None
    return "length" if answer.num_output_tokens >= max_tokens else "stop"


def _latest(new: T | None, old: T | None) -> T | None:
    return old if new is None else new
