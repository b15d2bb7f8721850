"""Requests whose guide is being compiled: beside the steps, and for a limited time.

They wait outside the scheduler, where they delay nobody. A guide that is known already does not wait.
"""

from __future__ import annotations

import time
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

from llguidance import LLMatcher

from flightline.torch_engine.core.grammar import Grammar, Grammars
from flightline.torch_engine.core.request import Code, RequestError
from flightline.torch_engine.core.sequence import Sequence
from flightline.torch_engine.text.stream import TokenBytes

COMPILERS = 2
"""Guides compiled at a time."""
PATIENCE_S = 10.0
"""How long a request waits for that. The library's limits end each compilation long before, but there may be many."""


class Guided:
    """Gives sequences their grammars."""

    def __init__(self, tokens: TokenBytes, vocab: int, patience_s: float = PATIENCE_S) -> None:
        self.grammars = Grammars(tokens, vocab)
        self._tokens = tokens
        self._patience_s = patience_s
        self._pool = ThreadPoolExecutor(COMPILERS, "grammar")
        self._waiting: dict[Sequence, tuple[Future[LLMatcher], float]] = {}

    def __len__(self) -> int:
        """How many wait."""
        return len(self._waiting)

    def hold(self, sequence: Sequence) -> bool:
        """Whether a new sequence has to wait for its grammar; :meth:`release` returns it then."""
        guide = sequence.request.guide
        if guide is None:
            return False
        if (known := self.grammars.get(guide)) is not None:
            self._give(sequence, known)
            return False
        future = self._pool.submit(self.grammars.compile, guide)
        self._waiting[sequence] = future, time.monotonic() + self._patience_s
        return True

    def release(self) -> tuple[list[Sequence], list[tuple[Sequence, RequestError]]]:
        """Those that may start now, and those that never will; the latter are still to be forgotten."""
        ready: list[Sequence] = []
        failed: list[tuple[Sequence, RequestError]] = []
        now = time.monotonic()
        for sequence, (future, until) in list(self._waiting.items()):
            if future.done():
                try:
                    self._give(sequence, future.result())
                except RequestError as error:
                    failed.append((sequence, error))
                except Exception as error:
                    failed.append((sequence, RequestError(Code.INTERNAL, f"guide not compiled: {error!r}")))
                else:
                    del self._waiting[sequence]
                    ready.append(sequence)
            elif now > until:
                message = (
                    f"guide is not compiled after {self._patience_s:g} s: make it simpler, or try again later"
                )
                failed.append((sequence, RequestError(Code.UNAVAILABLE, message)))
        return ready, failed

    def forget(self, sequence: Sequence) -> bool:
        """The sequence has ended; whether it was waiting here."""
        waiting = self._waiting.pop(sequence, None)
        if waiting is not None:
            waiting[0].cancel()
        return waiting is not None

    def wait(self, seconds: float) -> None:
        """Until one of them may start, or for so long."""
        wait([future for future, _ in self._waiting.values()], seconds, FIRST_COMPLETED)

    def close(self) -> None:
        """Compiles no more."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _give(self, sequence: Sequence, matcher: LLMatcher) -> None:
        request = sequence.request
        # Whoever wants no end token still gets one where the grammar leaves nothing else.
        least = request.max_tokens if sequence.never_ends else request.min_tokens
        sequence.grammar = Grammar(matcher, self.grammars.vocab, self._tokens, sequence.end_ids, least)
