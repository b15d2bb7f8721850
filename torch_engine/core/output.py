"""One request's tokens to its outputs: whole text, stop words that never leak, log-probabilities beside their tokens.

Every engine tells its answers through this, ours and those of others.
"""

from __future__ import annotations

from collections.abc import Sequence as Several
from dataclasses import dataclass, field

from flightline.torch_engine.core.request import FinishReason, GenerationRequest, PerfMetrics, RequestOutput
from flightline.torch_engine.text.stream import Release, TextStream, TokenBytes


def end_ids_of(request: GenerationRequest, model_end_ids: tuple[int, ...]) -> frozenset[int]:
    """Tokens that end this request's output."""
    if request.end_id is not None:
        model_end_ids = () if request.end_id < 0 else (request.end_id,)
    return frozenset((*model_end_ids, *request.stop_ids))


@dataclass(eq=False)
class OutputAccumulator:
    """Takes tokens as they are generated; what the text holds back, their log-probabilities wait for, too."""

    request: GenerationRequest
    text: TextStream
    cum_log_prob: float = 0.0
    num_emitted: int = 0
    prompt_log_probs: list[float] = field(default_factory=list)
    """Of its tokens but the first, and the most likely ones in their places; told with the first message."""
    prompt_top_log_probs: list[list[tuple[int, float]]] = field(default_factory=list)
    _log_probs: list[float] = field(default_factory=list)
    _tops: list[list[tuple[int, float]]] = field(default_factory=list)

    @classmethod
    def of(cls, request: GenerationRequest, tokens: TokenBytes, whole: bool = False) -> OutputAccumulator:
        """``whole``: see :class:`TextStream`."""
        spelled = tokens if request.skip_special_tokens else tokens.with_special
        return cls(request, TextStream(spelled, request.stop, whole=whole))

    def hear(self, log_probs: list[tuple[float, Several[tuple[int, float]]]]) -> None:
        """More tokens of the prompt: their log-probabilities, and the likeliest ones in their places."""
        self.prompt_log_probs += [log_prob for log_prob, _ in log_probs]
        if self.request.top_log_probs:
            self.prompt_top_log_probs += [list(top) for _, top in log_probs]

    def push(self, token_id: int, log_prob: float, top: Several[tuple[int, float]] = ()) -> Release:
        """One new token, and the likeliest ones in its place; returns what is final now."""
        self.cum_log_prob += log_prob
        if self.request.return_log_probs:
            self._log_probs.append(log_prob)
        if self.request.top_log_probs:
            self._tops.append(list(top))
        return self.text.push(token_id)

    def rest(self, release: Release | None = None) -> Release:
        """All that was held back, behind ``release``: nothing follows."""
        rest = self.text.finish()
        if release is None:
            return rest
        return Release(release.token_ids + rest.token_ids, release.text + rest.text)

    def tell(
        self, release: Release, reason: FinishReason | None = None, metrics: PerfMetrics | None = None
    ) -> RequestOutput:
        """The message about ``release``; with a ``reason``, the last one."""
        log_probs: list[float] = []
        if self._log_probs:
            log_probs = release.told(self._log_probs, 0.0)
            if release.stopped:  # what the stop word drops counts nowhere
                self.cum_log_prob += sum(log_probs) - sum(self._log_probs)
            self._log_probs = self._log_probs[len(log_probs) :]
        tops = release.told(self._tops, [])
        self._tops = self._tops[len(tops) :]
        self.num_emitted += len(release.token_ids)
        prompt, self.prompt_log_probs = self.prompt_log_probs, []
        prompt_tops, self.prompt_top_log_probs = self.prompt_top_log_probs, []
        return RequestOutput(
            token_ids=release.token_ids,
            text=release.text,
            log_probs=log_probs,
            top_log_probs=tops,
            cum_log_prob=self.cum_log_prob,
            num_input_tokens=len(self.request.prompt_ids),
            num_output_tokens=self.num_emitted,
            finish_reason=reason,
            metrics=metrics,
            prompt_log_probs=prompt,
            prompt_top_log_probs=prompt_tops,
            sequence_index=self.request.sequence_index,
        )
