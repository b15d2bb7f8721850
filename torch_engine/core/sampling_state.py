"""What sampling has to know of a sequence: what was asked, in arrays, and what was said, kept up token by token.

Nothing here grows with each step but by the token that is new, so that a penalty over 30,000 tokens costs what one over
ten does.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flightline.torch_engine.core.request import GenerationRequest
from flightline.torch_engine.text.bad_words import BadWords


class SamplingState:
    """Arrays are [count]; ids outside the vocabulary are left out.

    Args:
        request: what is asked for.
        end_ids: tokens that end the output.
        seed: of the sequence's random numbers, 64 bits.
        vocab: logits a row.
    """

    def __init__(self, request: GenerationRequest, end_ids: frozenset[int], seed: int, vocab: int) -> None:
        params = request.sampling
        self.vocab = vocab
        self.seed = seed
        self.greedy = params.greedy
        self.temperature = 0.0 if params.greedy else params.temperature
        self.top_k = 0 if params.greedy or not params.top_k or params.top_k >= vocab else params.top_k
        """0: no limit."""
        self.top_p = 1.0 if params.greedy or not params.top_p else params.top_p
        self.least = (
            params.temperature * math.log(params.min_p) if self.temperature and params.min_p else -math.inf
        )
        """Min-p: how far below the highest a logit may be."""
        self.repetition = params.repetition_penalty
        self.num_top = request.top_log_probs or (0 if request.return_log_probs else -1)
        """Most likely tokens to be told with the chosen one; -1: no log-probability at all."""
        bias = [(token, value) for token, value in params.logit_bias if token < vocab]
        self.bias_ids = np.array([token for token, _ in bias], dtype=np.int32)
        self.biases = np.array([value for _, value in bias], dtype=np.float32)
        self.words = BadWords(request.bad_ids, vocab)
        self.banned = self.words.always
        self.word_state = 0
        self.allowed: NDArray[np.int32] | None = None
        """A bit for each token that a grammar allows next, in words of 32 (uint32); None: no grammar."""
        early = request.min_tokens and request.guide is None  # a grammar says itself when it may end
        ends = sorted(token for token in end_ids if 0 <= token < vocab) if early else []
        self.ends = np.array(ends, dtype=np.int32)
        self.ends_from = len(request.prompt_ids) + request.min_tokens
        """Position of the first token that may be one of ``ends``."""
        self.num_prompt = len(request.prompt_ids)
        self.num_known = 0
        """Tokens of the sequence that the following has in it."""
        self.seen = np.zeros(-(-vocab // 64) * 8 if self.repetition != 1.0 else 0, dtype=np.uint8)
        """A bit for each token of prompt and output, the lowest of a byte first, in whole words of 64; empty: no
        penalty asks for it."""
        self._seen = self.seen.data
        self._presence = float(np.float32(params.presence_penalty))
        self._frequency = float(np.float32(params.frequency_penalty))
        self.penalises_output = bool(self._presence or self._frequency)
        self._places: dict[int, int] = {}
        self._counts: list[int] = []
        self._generated = np.zeros(16, dtype=np.int32)
        self._amounts = np.zeros(16, dtype=np.float32)
        self.made: Any = None
        """What an implementation makes of this once and keeps."""
        self.remembers = bool(len(self.seen)) or self.penalises_output or self.words.spans_tokens
        """Whether what was said changes what comes."""
        self.plain = (
            self.greedy
            and request.guide is None
            and not self.remembers
            and self.num_top < 0
            and not (len(self.bias_ids) or len(self.banned) or len(self.ends))
        )
        """The next token is the argmax of the logits as they are."""

    @property
    def generated(self) -> NDArray[Any]:
        """Tokens generated, each once: int32."""
        return self._generated[: len(self._counts)]

    @property
    def amounts(self) -> NDArray[Any]:
        """What presence and frequency penalty subtract from the logits of ``generated``: float32."""
        return self._amounts[: len(self._counts)]

    @property
    def matched(self) -> NDArray[Any]:
        """Tokens that would complete a bad word of several tokens: int32."""
        return self.words.banned[self.word_state]

    def catch_up(self, tokens: list[int]) -> None:
        """Takes what is new in the sequence's tokens."""
        if not self.remembers or self.num_known == len(tokens):
            return
        if self.num_known < self.num_prompt:
            self._hear(tokens[: self.num_prompt])
        for token in tokens[max(self.num_known, self.num_prompt) :]:
            self._say(token)
        self.num_known = len(tokens)

    def _hear(self, prompt: list[int]) -> None:
        if len(self.seen):
            flags = np.zeros(8 * len(self.seen), dtype=bool)
            flags[prompt] = True
            self.seen[:] = np.packbits(flags, bitorder="little")
        if self.words.spans_tokens:
            for token in prompt[-self.words.longest :]:
                self.word_state = self.words.advance(self.word_state, token)

    def after(self, guesses: tuple[int, ...]) -> SamplingState:
        """As it will be when these tokens have been said, too."""
        if not guesses or not self.remembers:
            return self
        later = copy.copy(self)
        later.made = None
        later.seen = self.seen.copy()
        later._seen = later.seen.data
        later._places, later._counts = dict(self._places), list(self._counts)
        later._generated, later._amounts = self._generated.copy(), self._amounts.copy()
        for token in guesses:
            later._say(token)
        return later

    def _say(self, token: int) -> None:
        if len(self._seen):
            self._seen[token >> 3] |= 1 << (token & 7)
        if self.words.spans_tokens:
            self.word_state = self.words.advance(self.word_state, token)
        if self.penalises_output:
            place = self._places.setdefault(token, len(self._counts))
            if place == len(self._counts):
                self._counts.append(0)
                if place == len(self._generated):
                    self._generated = np.resize(self._generated, 2 * place)
                    self._amounts = np.resize(self._amounts, 2 * place)
                self._generated[place] = token
            self._counts[place] += 1
            self._amounts[place] = self._presence + self._frequency * self._counts[place]
