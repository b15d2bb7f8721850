"""Which tokens the next step computes: in-flight batching under a token budget.

Requests join and leave at every step. Running decodes come first, one token each; what is left of the
budget goes to prompts, in chunks, the oldest first, so that a long prompt delays the running streams by
at most one budget.

The policies are TensorRT-LLM's:

* ``guaranteed_no_evict`` admits a request only if its longest possible output fits beside what was
  promised to the others: a request that has started always finishes without interruption.
* ``max_utilization`` admits as soon as the prompt fits; when blocks run out, the youngest request gives
  its blocks back and starts over later (its tokens are kept, their keys and values computed again).
"""

from __future__ import annotations

import time
from collections import deque
from typing import NamedTuple

from flightline.torch_engine.core.blocks import BlockManager
from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.sequence import Sequence
from flightline.torch_engine.core.speculation import MOST_ROWS, Speculation


class Chunk(NamedTuple):
    """``num_tokens`` tokens of a sequence from ``sequence.num_computed`` on, computed in one step."""

    sequence: Sequence
    num_tokens: int
    samples: bool
    """Nothing remains after this chunk: its last logits choose the next token."""
    guesses: tuple[int, ...] = ()
    """Of the tokens the last ones are only guessed; each is followed by logits that choose what comes after it."""

    @property
    def inputs(self) -> list[int]:
        """Token ids that are computed."""
        begin = self.sequence.num_computed
        return [*self.sequence.tokens[begin : begin + self.num_tokens - len(self.guesses)], *self.guesses]

    @property
    def num_sampled(self) -> int:
        """Tokens that its logits choose."""
        return 1 + len(self.guesses) if self.samples else 0


class Scheduler:
    """Admits, chunks and preempts; ``row_cost`` is the device's, for :class:`Speculation`."""

    def __init__(self, config: EngineConfig, blocks: BlockManager, row_cost: float = 0.0) -> None:
        self.config = config
        most = config.speculation_tokens
        self.speculation = Speculation(most, row_cost) if most else None
        self.blocks = blocks
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        """In order of admission: the last one is preempted first."""
        self.num_preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Takes a finished or cancelled sequence out and frees its blocks."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        sequence.release_blocks(self.blocks)

    def schedule(self) -> list[Chunk]:
        """The chunks of the next step, each with its blocks allocated; decodes first."""
        chunks: dict[Sequence, Chunk] = {}
        budget = self.config.max_num_tokens
        for sequence, remaining in self._decodes_first():
            if not sequence.block_table:
                continue  # it was preempted just now
            count = min(remaining, budget)
            if count == 0:
                break
            if not sequence.has_room(self.blocks, count):
                room, given_up = self._make_room(sequence, count, chunks)
                budget += given_up
                if not room:
                    continue
            chunks[sequence] = Chunk(sequence, count, count == remaining)
            budget -= count
        promised = None
        while self.waiting and budget > 0 and len(self.running) < self.config.max_batch_size:
            if promised is None:
                promised = self._promised()
            sequence = self.waiting[0]
            count = self._admit(sequence, budget, promised)
            if count == 0:
                break
            self.waiting.popleft()
            self.running.append(sequence)
            sequence.first_scheduled_ns = sequence.first_scheduled_ns or time.monotonic_ns()
            if self.config.batch_scheduler_policy == "guaranteed_no_evict":
                promised += self._outstanding(sequence)
            chunks[sequence] = Chunk(sequence, count, count == sequence.num_remaining)
            budget -= count
        if self.speculation is not None and all(
            chunk.num_sampled == chunk.num_tokens for chunk in chunks.values()
        ):
            self._guess(self.speculation, chunks, budget)
        return sorted(chunks.values(), key=lambda chunk: chunk.num_tokens > 1)

    def expects_guesses(self) -> bool:
        """Whether the next step, if the tokens in flight were known, is likely to be worth guesses."""
        if self.speculation is None or len(self.running) >= MOST_ROWS:
            return False
        if self.waiting and len(self.running) < self.config.max_batch_size:
            return False  # prompts have the budget
        remaining = [(sequence, sequence.num_remaining) for sequence in self.running]
        if any(count > 1 for _, count in remaining):
            return False
        decodes = [sequence for sequence, count in remaining if count]
        return bool(self.speculation.plan(decodes, self.config.max_num_tokens - len(decodes)))

    def _guess(self, speculation: Speculation, chunks: dict[Sequence, Chunk], budget: int) -> None:
        """Adds guesses to a step of decodes whose tokens are all known, as far as there are blocks."""
        if any(sequence.num_pending for sequence in chunks):
            return
        for sequence, guesses in speculation.plan(list(chunks), budget).items():
            missing = self.blocks.blocks_for(sequence.num_computed + 1 + len(guesses)) - len(
                sequence.block_table
            )
            if missing > 0:
                sequence.grow(self.blocks, min(missing, self.blocks.num_free))
            room = len(sequence.block_table) * self.blocks.block_size - sequence.num_computed - 1
            if guesses := guesses[:room]:
                chunks[sequence] = Chunk(sequence, 1 + len(guesses), True, tuple(guesses))

    def _decodes_first(self) -> list[tuple[Sequence, int]]:
        """Running sequences that have something to compute, and how many tokens."""
        decodes, prompts = [], []
        for sequence in self.running:
            remaining = sequence.num_remaining
            if remaining == 1:
                decodes.append((sequence, 1))
            elif remaining:
                prompts.append((sequence, remaining))
        return decodes + prompts

    def _make_room(self, sequence: Sequence, count: int, chunks: dict[Sequence, Chunk]) -> tuple[bool, int]:
        """Gives a running sequence the blocks for ``count`` more tokens, at the cost of younger ones if need be.

        Returns whether it has them, and the budget that preempted chunks set free.
        """
        given_up = 0
        missing = self.blocks.blocks_for(sequence.num_computed + count) - len(sequence.block_table)
        while missing > self.blocks.num_free:
            victim = self.running[-1]
            self._preempt(victim)
            if (chunk := chunks.pop(victim, None)) is not None:
                given_up += chunk.num_tokens
            if victim is sequence:
                return False, given_up
        if missing > 0:
            sequence.grow(self.blocks, missing)
        return True, given_up

    def _preempt(self, victim: Sequence) -> None:
        self.running.remove(victim)
        victim.release_blocks(self.blocks)
        self.waiting.appendleft(victim)
        self.num_preemptions += 1

    def _promised(self) -> int:
        """Blocks that running sequences may still ask for and are sure to get."""
        if self.config.batch_scheduler_policy != "guaranteed_no_evict":
            return 0
        return sum(self._outstanding(sequence) for sequence in self.running)

    def _admit(self, sequence: Sequence, budget: int, promised: int) -> int:
        """Starts a waiting sequence if it fits; returns the tokens of its first chunk, 0 if it has to wait."""
        if sequence.num_pending:
            return 0  # preempted with a token in flight: its tokens are not all known
        cached = self.blocks.match(sequence.tokens) or sequence.computed_by_sibling(self.blocks)
        computed = len(cached) * self.blocks.block_size
        count = min(len(sequence.tokens) - computed, budget)
        if not self.config.enable_chunked_context and count < len(sequence.tokens) - computed:
            return 0
        if self.config.batch_scheduler_policy == "guaranteed_no_evict":
            needed = self.blocks.blocks_for(sequence.max_length)
        else:
            needed = self.blocks.blocks_for(len(sequence.tokens))
        available = self.blocks.num_free - self.blocks.num_free_among(cached) - promised
        if needed - len(cached) > available:
            return 0
        sequence.adopt(self.blocks, cached)
        sequence.grow(self.blocks, self.blocks.blocks_for(computed + count) - len(cached))
        return count

    def _outstanding(self, sequence: Sequence) -> int:
        """Blocks promised to a running sequence and not allocated yet."""
        return self.blocks.blocks_for(sequence.max_length) - len(sequence.block_table)
