"""One request on its way through the engine."""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from flightline.torch_engine.core.blocks import NOWHERE, Beginning, BlockManager, Content
from flightline.torch_engine.core.grammar import Grammar
from flightline.torch_engine.core.output import OutputAccumulator, end_ids_of
from flightline.torch_engine.core.request import FinishReason, GenerationRequest, PerfMetrics, RequestOutput
from flightline.torch_engine.core.sampling_state import SamplingState
from flightline.torch_engine.core.speculation import PromptLookup
from flightline.torch_engine.text.stream import Release, TokenBytes


@dataclass(eq=False)
class Sequence:
    """Token ids, KV blocks and output of one request.

    Invariant: the KV cache holds ``tokens[:num_computed]``. What remains is computed in one or more
    chunks; when nothing remains, the next token is sampled and appended. A decode step is a chunk of one.
    While a sampled token is on the device only (``num_pending``), the invariant counts it as known.
    """

    key: Any
    """Names the request for whoever submitted it."""
    request: GenerationRequest
    end_ids: frozenset[int]
    output: OutputAccumulator
    arrival_ns: int
    tokens: list[int] = field(default_factory=list)
    num_computed: int = 0
    num_pending: int = 0
    """Tokens sampled by steps that have been launched and not fetched."""
    block_tables: list[list[int]] = field(default_factory=list)
    """For each group of layers its KV blocks, equally many, NOWHERE for those behind its window; empty: it has none."""
    num_left: list[int] = field(default_factory=list)
    """Of each table, how many of the first blocks are behind the window."""
    num_registered: int = 0
    last_content: Content | None = None
    """Of the blocks registered last."""
    finish_reason: FinishReason | None = None
    never_ends: bool = False
    """No token was to end it; ``end_ids`` are there for its grammar's end alone, if it has one."""
    samples_on_device: bool = field(init=False)
    """The next token is the argmax of the untouched logits, the model's end ids left out while the output is too short,
    and nothing else is asked about it."""
    searches: bool = field(init=False)
    """Its next token wants more than the sums of all probabilities: tokens are left out, or told, or make words."""
    first_scheduled_ns: int = 0
    first_token_ns: int = 0
    last_token_ns: int = 0
    grammar: Grammar | None = None
    """What its tokens have made of ``request.guide``; None: it has none, or that is not compiled yet."""
    sibling: Sequence | None = None
    """Has the same prompt, and computes it first (``core/siblings.py``)."""
    new_blocks: int = 0
    reused_blocks: int = 0
    num_cached: int = 0
    """Tokens of the prompt that did not have to be computed when it began."""
    num_scored: int = 0
    """Tokens of the prompt whose logits have told, or will when their step is fetched, how likely the next one was."""
    num_guessed: int = 0
    num_accepted: int = 0
    """Of the guessed tokens."""

    @classmethod
    def start(
        cls,
        key: Any,
        request: GenerationRequest,
        end_ids: tuple[int, ...],
        tokens: TokenBytes,
        arrival_ns: int,
    ) -> Sequence:
        """``end_ids`` are the model's."""
        output = OutputAccumulator.of(request, tokens, whole=not request.stream)
        own = end_ids_of(request, end_ids)
        never_ends = not own
        if never_ends and request.guide is not None:
            own = frozenset(end_ids)
        sequence = cls(key, request, own, output, arrival_ns, tokens=list(request.prompt_ids))
        sequence.never_ends = never_ends
        return sequence

    def __post_init__(self) -> None:
        request = self.request
        self.num_prompt = len(request.prompt_ids)
        self.last_length = self.num_prompt + request.max_tokens
        seed = request.sampling.seed
        self.seed = secrets.randbits(64) if seed is None else seed
        """Of this sequence's random numbers (``core/sampling.py``): of the request, or drawn here once."""
        self._sampling_state: SamplingState | None = None
        self.num_told = request.top_log_probs or (0 if request.return_log_probs else -1)
        """Likeliest tokens that are told with each one; -1: not even its own log-probability."""
        params = request.sampling
        self.remembers = any(
            (params.repetition_penalty != 1.0, params.presence_penalty, params.frequency_penalty)
        ) or any(len(word) > 1 for word in request.bad_ids)
        """What is said changes what may follow, by more than the model: a device keeps account of it."""
        leaves_out = (params.top_k or 0) > 0 or (params.top_p or 1.0) < 1 or (params.min_p or 0.0) > 0
        self.searches = (
            (leaves_out and not params.greedy)
            or self.num_told > 0
            or any(len(word) > 1 for word in request.bad_ids)
        )
        self.samples_on_device = (
            request.sampling.plain_greedy
            and request.guide is None
            and not request.return_log_probs
            and not request.top_log_probs
            and not request.bad_ids
            and not (request.min_tokens and request.stop_ids)
            and (not request.min_tokens or request.end_id is None or request.end_id < 0)
        )

    def sampling_state(self, vocab: int) -> SamplingState:
        """What sampling has to know, with all tokens so far; ``vocab`` is the length of a row of logits."""
        state = self._sampling_state
        if state is None:
            state = SamplingState(self.request, self.end_ids, self.seed, vocab)
            self._sampling_state = state
        state.catch_up(self.tokens)
        if self.grammar is not None:
            state.allowed = self.grammar.mask()
        return state

    @cached_property
    def lookup(self) -> PromptLookup:
        return PromptLookup(self.num_prompt)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - self.num_prompt

    def must_go_on(self, guesses: int = 0) -> bool:
        """What follows the tokens known, those in flight and so many guesses may not be an end id: ``min_tokens``."""
        said = self.num_generated + self.num_pending + guesses
        return said < self.request.min_tokens and bool(self.end_ids)

    @property
    def num_remaining(self) -> int:
        """Tokens to compute next; 0 too while a pending token is bound to be the last."""
        length = len(self.tokens) + self.num_pending
        if self.num_pending and length >= self.last_length:
            return 0
        return length - self.num_computed

    def num_unscored(self, num_tokens: int) -> int:
        """How many of the next ``num_tokens`` tokens tell how likely the one behind them was, and have to: those of a
        prompt whose log-probabilities are asked for, but for its last, which no token of the prompt follows."""
        if not self.request.return_prompt_log_probs:
            return 0
        end = min(self.num_computed + num_tokens, self.num_prompt - 1)
        return max(0, end - max(self.num_computed, self.num_scored))

    @property
    def max_length(self) -> int:
        """Most tokens whose keys and values this request can ever need; the last token needs none."""
        return self.last_length - 1

    def append(
        self, token_id: int, log_prob: float, now_ns: int, top: tuple[tuple[int, float], ...] = ()
    ) -> RequestOutput | None:
        """Takes the sampled token and the likeliest ones there; returns what can be told about it, if anything.

        Its grammar, if there is one, has the token already.
        """
        if not self.first_token_ns:
            self.first_token_ns = now_ns
        self.last_token_ns = now_ns
        if token_id in self.end_ids:
            return self._finish(FinishReason.END_ID)
        self.tokens.append(token_id)
        release = self.output.push(token_id, log_prob, top)
        if release.stopped:
            self.finish_reason = FinishReason.STOP
        elif self.grammar is not None and self.grammar.finished:
            return self._finish(FinishReason.END_ID, release)
        elif len(self.tokens) >= self.last_length:
            return self._finish(FinishReason.LENGTH, release)
        elif not release.token_ids:
            return None
        return self._tell(release)

    def end(self, reason: FinishReason) -> RequestOutput:
        """The request ends here, from outside."""
        return self._finish(reason)

    def _finish(self, reason: FinishReason, release: Release | None = None) -> RequestOutput:
        self.finish_reason = reason
        return self._tell(self.output.rest(release))

    def _tell(self, release: Release) -> RequestOutput:
        metrics = self.metrics() if self.finish_reason else None
        return self.output.tell(release, self.finish_reason, metrics)

    def metrics(self) -> PerfMetrics:
        return PerfMetrics(
            arrival_time_ns=self.arrival_ns,
            first_scheduled_time_ns=self.first_scheduled_ns,
            first_token_time_ns=self.first_token_ns,
            last_token_time_ns=self.last_token_ns,
            kv_cache_alloc_new_blocks=self.new_blocks,
            kv_cache_reused_blocks=self.reused_blocks,
            kv_cache_alloc_total_blocks=self.new_blocks + self.reused_blocks,
            total_draft_tokens=self.num_guessed,
            total_accepted_draft_tokens=self.num_accepted,
            num_cached_tokens=self.num_cached,
        )

    # KV blocks ---------------------------------------------------------------------------------

    def num_shareable(self, block_size: int) -> int:
        """Blocks of the prompt that a sibling can start from: its last token has to be computed to give logits."""
        return (self.num_prompt - 1) // block_size

    def computed_by_sibling(self, blocks: BlockManager) -> Beginning:
        """The prompt's blocks in the sibling's tables, as far as they are computed and not behind a window."""
        nothing = Beginning(0, [[] for _ in blocks.windows], [], [])
        if self.sibling is None or not self.sibling.block_tables:
            return nothing
        count = min(self.num_shareable(blocks.block_size), self.sibling.num_computed // blocks.block_size)
        tables = []
        for group, table in enumerate(self.sibling.block_tables):
            first = blocks.first_seen(count * blocks.block_size, group)
            if NOWHERE in table[first:count]:
                return nothing
            tables.append([NOWHERE] * first + table[first:count])
        return Beginning(count * blocks.block_size, tables, [], [])

    def adopt(self, blocks: BlockManager, beginning: Beginning) -> None:
        """Starts on blocks whose content is known."""
        blocks.take(beginning)
        self.block_tables = beginning.tables
        self.num_left = [blocks.first_seen(beginning.num_tokens, group) for group in range(blocks.num_groups)]
        self.num_computed = beginning.num_tokens
        self.num_registered = self.num_blocks
        self.last_content = beginning.contents[-1] if beginning.contents else None
        if self.num_registered and self.last_content is None:
            self.last_content = blocks.stray()
        if (
            not self.new_blocks + self.reused_blocks
        ):  # afterwards it only finds again what it had to give back
            self.num_cached = self.num_computed
        self.reused_blocks += self.num_registered
        blocks.num_reused += self.num_registered

    @property
    def num_blocks(self) -> int:
        """Of each table."""
        return len(self.block_tables[0]) if self.block_tables else 0

    @property
    def num_held(self) -> int:
        """Blocks in all tables together."""
        return len(self.block_tables) * self.num_blocks - sum(self.num_left)

    def missing(self, blocks: BlockManager, count: int) -> int:
        """Blocks that each table lacks for ``count`` more tokens; not above 0: there is room."""
        return blocks.blocks_for(self.num_computed + count) - self.num_blocks

    def grow(self, blocks: BlockManager, count: int) -> None:
        """``count`` more blocks for each table."""
        taken = blocks.allocate(count * len(self.block_tables))
        for group, table in enumerate(self.block_tables):
            table += taken[group * count : (group + 1) * count]
        self.new_blocks += count

    def leave_behind(self, blocks: BlockManager) -> None:
        """Gives up the blocks that no token to come sees, nor one that goes on after the last registered block."""
        position = self.num_registered * blocks.block_size
        for group, table in enumerate(self.block_tables):
            left, now = self.num_left[group], blocks.first_seen(position, group)
            if now > left:
                blocks.free(table[left:now], left_behind=True)
                table[left:now] = [NOWHERE] * (now - left)
                self.num_left[group] = now

    def computed(self, blocks: BlockManager, num_tokens: int) -> None:
        """``num_tokens`` more have their keys and values; blocks that became full may be reused from now on.

        A block is known by its tokens: one that ends in a pending token is registered a step later.
        """
        self.num_computed += num_tokens
        size, known = blocks.block_size, min(self.num_computed, len(self.tokens))
        while (self.num_registered + 1) * size <= known:
            start, number = self.num_registered * size, self.num_registered
            indices = [table[number] for table in self.block_tables]
            self.last_content = blocks.register(indices, self.last_content, self.tokens[start : start + size])
            self.num_registered += 1

    def reject(self, count: int) -> None:
        """The last ``count`` computed tokens were wrong guesses; their places in the blocks are written again."""
        self.num_computed -= count

    def release_blocks(self, blocks: BlockManager) -> None:
        """Gives all blocks back; what was computed has to be computed (or matched) again."""
        together = zip(*self.block_tables, strict=True)  # so that all groups keep what is kept longest
        blocks.free([index for indices in together for index in indices if index != NOWHERE])
        self.block_tables, self.num_left = [], []
        self.num_computed = self.num_registered = 0
        self.last_content = None
