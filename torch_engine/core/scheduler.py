"""Which tokens the next step computes: in-flight batching under a token budget.

Requests join and leave at every step. Running decodes come first, one token each; what is left of the
budget goes to prompts, in chunks, so that a long prompt delays the running streams by at most one budget, or
by ``max_gap_ms`` where that is set. The oldest prompt comes first and has half of it at the least; the rest is
left to those behind that need much less: a question does not wait for a book, and the book goes on.

The policies are TensorRT-LLM's:

* ``guaranteed_no_evict`` admits a request only if its longest possible output fits beside what was
  promised to the others: a request that has started always finishes without interruption.
* ``max_utilization`` admits as soon as the prompt fits; when blocks run out, the youngest request gives
  its blocks back and starts over later (its tokens are kept, their keys and values computed again).
"""

from __future__ import annotations

import time
from collections import deque
from itertools import islice
from typing import NamedTuple

from flightline.torch_engine.core.blocks import NOWHERE, Beginning, BlockManager
from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.sequence import Sequence
from flightline.torch_engine.core.speculation import MOST_ROWS, Speculation
from flightline.torch_engine.core.step_times import NOTHING, StepTimes, Work

LEAST = 16
"""Tokens that the first prompt of a step has at the least, however long the step takes: it must come to its end."""
MUCH = 4
"""A prompt leaves room for those that need so many times less."""
MOST_SCORED = 256
"""Tokens of a step's prompts whose log-probabilities are asked for, of all requests together: in float32 the logits of
so many are 131 MB for 128,256 words."""
SEEN = 8
"""Waiting requests for which a prompt leaves something, at most: there may be thousands."""


class Chunk(NamedTuple):
    """``num_tokens`` tokens of a sequence from ``sequence.num_computed`` on, computed in one step."""

    sequence: Sequence
    num_tokens: int
    samples: bool
    """Nothing remains after this chunk: its last logits choose the next token."""
    guesses: tuple[int, ...] = ()
    """Of the tokens the last ones are only guessed; each is followed by logits that choose what comes after it."""
    scored: int = 0
    """Of the tokens so many, before the one that chooses, are followed by logits that tell how likely the next one of
    the prompt was."""

    @classmethod
    def of(cls, sequence: Sequence, num_tokens: int) -> Chunk:
        return cls(
            sequence, num_tokens, num_tokens == sequence.num_remaining, (), sequence.num_unscored(num_tokens)
        )

    @property
    def inputs(self) -> list[int]:
        """Token ids that are computed."""
        begin = self.sequence.num_computed
        return [*self.sequence.tokens[begin : begin + self.num_tokens - len(self.guesses)], *self.guesses]

    @property
    def work(self) -> Work:
        """Before it counts as computed."""
        return Work.of(self.sequence.num_computed, self.num_tokens)

    @property
    def num_sampled(self) -> int:
        """Tokens that its logits choose."""
        return 1 + len(self.guesses) if self.samples else 0

    @property
    def num_rows(self) -> int:
        """Its last tokens that are followed by logits: first those of the prompt's, then those that choose."""
        return self.scored + self.num_sampled


class Budget:
    """What is left of a step: tokens, and where ``seconds`` are given, time."""

    def __init__(self, tokens: int, times: StepTimes | None = None, seconds: float = 0.0) -> None:
        self.tokens = tokens
        self.scores = MOST_SCORED
        self._times, self._seconds = times, seconds
        self._work, self.prompts = NOTHING, 0

    def take(self, chunk: Chunk) -> None:
        self._change(chunk, 1)

    def give_back(self, chunk: Chunk) -> None:
        self._change(chunk, -1)

    def _change(self, chunk: Chunk, sign: int) -> None:
        self.tokens -= sign * chunk.num_tokens
        self.scores -= sign * chunk.scored
        self.prompts += sign * (chunk.num_tokens > 1)
        if self._times is not None:
            work = chunk.work
            self._work = Work(self._work.tokens + sign * work.tokens, self._work.pairs + sign * work.pairs)

    def limited(self, sequence: Sequence, count: int) -> int:
        """So many tokens of the sequence's next ``count`` whose logits the step has room for."""
        return min(count, self.scores) if sequence.num_unscored(count) else count

    def most(self, begin: int) -> int:
        """Tokens that a prompt may have of which ``begin`` are computed. Nobody waits in a step without decodes."""
        if self._times is None or self._work.tokens == 0:
            return self.tokens
        fitting = self._times.fitting(self._work, begin, self._seconds) // LEAST * LEAST
        return min(self.tokens, max(fitting, 0 if self.prompts else LEAST))


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
        self.times = StepTimes() if config.max_gap_ms else None
        """Whoever runs the steps tells it how long they take."""

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
        for sequence in self.running if self.blocks.has_windows else ():
            sequence.leave_behind(self.blocks)
        chunks: dict[Sequence, Chunk] = {}
        seconds = self.config.max_gap_ms / 1000 / self.times.margin if self.times else 0.0
        budget = Budget(self.config.max_num_tokens, self.times, seconds)
        decodes, prompts = self._work()
        for sequence in decodes:
            self._extend(sequence, min(1, budget.tokens), chunks, budget)
        needs = [remaining for _, remaining in prompts]
        if len(self.running) < self.config.max_batch_size:
            needs += [len(sequence.tokens) for sequence in islice(self.waiting, SEEN)]
        for number, (sequence, _) in enumerate(prompts):
            count = self._fair(sequence.num_computed, needs[number:], budget)
            self._extend(sequence, budget.limited(sequence, count), chunks, budget)
        self._admit_all(needs[len(prompts) :], chunks, budget)
        self._give_rest(chunks, budget)
        if self.speculation is not None and all(
            chunk.num_sampled == chunk.num_tokens for chunk in chunks.values()
        ):
            self._guess(self.speculation, chunks, budget.tokens)
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
            missing = sequence.missing(self.blocks, 1 + len(guesses))
            if missing > 0:
                sequence.grow(self.blocks, min(missing, self.blocks.num_free // self.blocks.num_groups))
            room = sequence.num_blocks * self.blocks.block_size - sequence.num_computed - 1
            if guesses := guesses[:room]:
                chunks[sequence] = Chunk(sequence, 1 + len(guesses), True, tuple(guesses))

    def _work(self) -> tuple[list[Sequence], list[tuple[Sequence, int]]]:
        """Running sequences that decode, and those with more to compute, with the number of tokens."""
        decodes, prompts = [], []
        for sequence in self.running:
            remaining = sequence.num_remaining
            if remaining == 1:
                decodes.append(sequence)
            elif remaining:
                prompts.append((sequence, remaining))
        return decodes, prompts

    @staticmethod
    def _fair(begin: int, needs: list[int], budget: Budget) -> int:
        """Tokens of a prompt that needs ``needs[0]``: all but what is for those that need much less.

        The oldest keeps half. Others have something left for them where it is enough: pieces cost more than a whole.
        """
        own, *others = needs
        most = budget.most(begin)
        spare, left = most if budget.prompts else most // 2, 0
        for other in sorted(other for other in others if other <= own // MUCH):
            if left + other > spare:
                break
            left += other
        return min(own, most - left)

    def _extend(self, sequence: Sequence, count: int, chunks: dict[Sequence, Chunk], budget: Budget) -> None:
        """Gives a running sequence ``count`` tokens of the step, if it has the blocks or can be given them."""
        if not count or not sequence.block_tables:
            return  # nothing is left; or it was preempted just now
        if self._make_room(sequence, count, chunks, budget):
            chunks[sequence] = Chunk.of(sequence, count)
            budget.take(chunks[sequence])

    def _admit_all(self, needs: list[int], chunks: dict[Sequence, Chunk], budget: Budget) -> None:
        """Starts waiting sequences, the first ones of which need so many tokens, as far as they fit."""
        promised = None
        aside: list[Sequence] = []
        """Prompts whose logits there is no room for: others do not wait for them."""
        while self.waiting and budget.tokens > 0 and len(self.running) < self.config.max_batch_size:
            if promised is None:
                promised = self._promised()
            sequence = self.waiting[0]
            if budget.scores == 0 and sequence.num_unscored(len(sequence.tokens)):
                aside.append(self.waiting.popleft())
                needs = needs[1:]
                continue
            count = self._admit(sequence, needs[1:], budget, promised)
            if count == 0:
                break
            self.waiting.popleft()
            needs = needs[1:]
            self.running.append(sequence)
            sequence.first_scheduled_ns = sequence.first_scheduled_ns or time.monotonic_ns()
            if self.config.batch_scheduler_policy == "guaranteed_no_evict":
                promised += self._outstanding(sequence)
            chunks[sequence] = Chunk.of(sequence, count)
            budget.take(chunks[sequence])
        self.waiting.extendleft(reversed(aside))

    def _give_rest(self, chunks: dict[Sequence, Chunk], budget: Budget) -> None:
        """What prompts have left for others that could not start goes to them after all, as far as there are blocks."""
        for sequence, chunk in list(chunks.items()):
            if budget.tokens == 0:
                return
            if chunk.samples:
                continue
            budget.give_back(chunk)
            most = budget.limited(sequence, min(sequence.num_remaining, budget.most(sequence.num_computed)))
            count = max(chunk.num_tokens, most)
            missing = sequence.missing(self.blocks, count)
            if missing * self.blocks.num_groups > self.blocks.num_free:
                count = chunk.num_tokens
            elif missing > 0:
                sequence.grow(self.blocks, missing)
            chunks[sequence] = Chunk.of(sequence, count)
            budget.take(chunks[sequence])

    def _make_room(
        self, sequence: Sequence, count: int, chunks: dict[Sequence, Chunk], budget: Budget
    ) -> bool:
        """Gives a running sequence the blocks for ``count`` more tokens, at the cost of younger ones if need be.

        Returns whether it has them; ``budget`` gets back what preempted chunks set free.
        """
        missing = sequence.missing(self.blocks, count)
        while missing * self.blocks.num_groups > self.blocks.num_free:
            victim = self.running[-1]
            if (chunk := chunks.pop(victim, None)) is not None:
                budget.give_back(chunk)
            self._preempt(victim)
            if victim is sequence:
                return False
        if missing > 0:
            sequence.grow(self.blocks, missing)
        return True

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

    def _admit(self, sequence: Sequence, others: list[int], budget: Budget, promised: int) -> int:
        """Starts a waiting sequence if it fits; returns the tokens of its first chunk, 0 if it has to wait."""
        if sequence.num_pending:
            return 0  # preempted with a token in flight: its tokens are not all known
        scores = sequence.num_unscored(len(sequence.tokens)) > 0
        known = self.blocks.match([] if scores else sequence.tokens)  # what nobody computes has no logits
        if not known.num_tokens and not scores:
            known = sequence.computed_by_sibling(self.blocks)
        computed = known.num_tokens
        remaining = len(sequence.tokens) - computed
        count = self._fair(computed, [remaining, *others], budget)
        count = max(count, min(LEAST, remaining, budget.most(computed)))  # or nobody behind it could start
        if scores:
            count = budget.limited(sequence, count)
        elif not self.config.enable_chunked_context:
            count = remaining if remaining <= budget.tokens else 0
        if count == 0:
            return 0
        if not self._fits(sequence, known, promised):
            return 0
        sequence.adopt(self.blocks, known)
        sequence.grow(self.blocks, sequence.missing(self.blocks, count))
        return count

    def _fits(self, sequence: Sequence, known: Beginning, promised: int) -> bool:
        """Whether there are the blocks for a sequence that begins with what is ``known`` of it.

        Those that others use, too, come for nothing; but of a window's it will give some up, which are not free then.
        """
        blocks, length = self.blocks, len(sequence.tokens)
        if self.config.batch_scheduler_policy == "guaranteed_no_evict":
            length = sequence.max_length
        needed = blocks.most_held(length, self._at_once(len(sequence.tokens) - known.num_tokens))
        taken = len(known.absent)
        for table, window in zip(known.tables, blocks.windows, strict=True):
            there = [index for index in table if index != NOWHERE]
            free = blocks.num_free_among(there)
            taken += free
            needed -= len(there) if window is None else free
        return needed - len(known.absent) <= blocks.num_free - taken - promised

    def _at_once(self, remaining: int) -> int:
        """Tokens that one step computes of a sequence at most, from now on."""
        return max(1 + self.config.speculation_tokens, min(self.config.max_num_tokens, remaining))

    def _outstanding(self, sequence: Sequence) -> int:
        """Blocks promised to a running sequence and not allocated yet."""
        most = self.blocks.most_held(sequence.max_length, self._at_once(sequence.num_remaining))
        return max(0, most - sequence.num_held)
