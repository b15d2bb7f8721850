"""``SamplingParams``, with the checks of the real one."""

from __future__ import annotations

from typing import Any

from .surface import Strict


class SamplingParams(Strict):
    table = "sampling_params"

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValueError as error:
            raise TypeError(str(error)) from None  # a dataclass upstream
        self.bad_sequences: list[list[int]] | None = None

    @property
    def greedy(self) -> bool:
        return self.top_k in (None, 1) and self.top_p in (None, 0.0)

    def setup(self, eos_id: int, encode: Any) -> None:
        """Upstream tokenises ``bad`` only here, which it reaches only if ``end_id`` was left to it."""
        self.end_id = eos_id
        self.bad_sequences = [encode(word) for word in self.bad or []]

    def bad_words(self) -> list[list[int]]:
        words = [[token] for token in self.bad_token_ids or []]
        if self.bad is None:
            return words
        if self.bad_sequences is None:
            raise RuntimeError(f"SamplingParams.bad ({self.bad}) is not processed by tokenizer")
        return words + self.bad_sequences
