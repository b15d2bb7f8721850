"""The engine: add requests, call :meth:`Engine.step` as long as there is work, read what comes out.

Single-threaded; ``process/server.py`` puts a process and a socket around it.

On a GPU the host works one step ahead: step n + 1 is scheduled and launched while the device still runs
step n, and only then are the tokens of step n fetched. The input tokens of step n + 1 never leave the
device. A sequence whose end the host learns of a step late has run once more for nothing; that token is
dropped. Its blocks can be given away at once all the same, because the device runs the steps in order.

A step with guesses (``core/speculation.py``) needs the tokens before it, and how many of its own count is known
only when it has ended: before and after it the host waits.

What a grammar (``core/grammar.py``) allows next depends on the token before. Such a step is launched in two parts: the
forward pass as ever; then the tokens of step n are fetched, and while the device computes and the host tells what has
become of them and plans step n + 2, their masks are made. Before that step is launched, the choice of step n + 1's
tokens is queued (:meth:`Runner.finish`).
"""

from __future__ import annotations

import gc
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from flightline.torch_engine.core.blocks import BlockEvent, BlockManager
from flightline.torch_engine.core.config import ConfigError, EngineConfig
from flightline.torch_engine.core.grammar import Grammar, take
from flightline.torch_engine.core.guided import Guided
from flightline.torch_engine.core.memory import reserved_gpu_memory
from flightline.torch_engine.core.request import (
    Code,
    EngineStats,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    QueueFull,
    RequestError,
    RequestOutput,
)
from flightline.torch_engine.core.sampling import Sampled
from flightline.torch_engine.core.scheduler import Chunk, Scheduler
from flightline.torch_engine.core.sequence import Sequence
from flightline.torch_engine.core.siblings import Siblings
from flightline.torch_engine.core.step_times import NOTHING, Work
from flightline.torch_engine.loading import gather_ranks, layer_groups, load_runner
from flightline.torch_engine.model.config_json import load_spec
from flightline.torch_engine.model.weights import Checkpoint
from flightline.torch_engine.parallel.ranks import RankLost
from flightline.torch_engine.runner import SamplingFailed, Ticket
from flightline.torch_engine.text.stream import TokenBytes


def freeze_garbage_collector() -> None:
    """For a process that has loaded its engine: Python's garbage collector no longer looks at what stays anyway.

    At 1,024 requests it took half of the host's time. Requests hold no reference cycles, so that it frees little.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(100_000, 50, 100)


IDLE_S = 0.002
"""How long a step waits for a grammar if there is nothing else to do: other requests may come meanwhile."""
Outputs = list[tuple[Any, RequestOutput]]
"""Request keys, each with what became of its request."""


class MovesFailed(Exception):
    """KV blocks were not copied to host memory or back: what this step begins with may be missing."""


@dataclass(frozen=True)
class Flight:
    """A launched step whose tokens have not been fetched."""

    chunks: list[Chunk]
    ticket: Ticket
    work: Work
    launched_ns: int


class Engine:
    """In-flight batching over one model on one device.

    Args:
        config: what to run and how.
        checkpoint, tokens: instead of the ones in ``config.model_dir``.

    Raises on construction:
        ConfigError, UnsupportedModel, UnsupportedTokenizer: the configuration or checkpoint cannot run.
        RankLost: one of several ranks that share the model failed. :meth:`step` raises it, too; the engine has ended.
    """

    def __init__(
        self, config: EngineConfig, checkpoint: Checkpoint | None = None, tokens: TokenBytes | None = None
    ) -> None:
        self.config = config
        checkpoint = checkpoint or Checkpoint(config.model_dir, load_spec(config.model_dir))
        spec = checkpoint.spec
        self.tokens = tokens or TokenBytes.from_dir(config.model_dir)
        self.groups = layer_groups(config, spec)
        most = self.groups.most_whole(config.max_seq_len, config.most_at_once, config.block_size)
        if most > config.num_kv_blocks:
            raise ConfigError(
                f"num_kv_blocks={config.num_kv_blocks} is not valid: one sequence of max_seq_len={config.max_seq_len} "
                f"needs {most} blocks of {config.block_size}; raise it or lower max_seq_len"
            )
        self.ranks, checkpoint = gather_ranks(config, checkpoint)
        try:
            self.runner = load_runner(config, checkpoint, self.ranks)
        except BaseException:
            self.ranks.close()
            raise
        self.model = self.runner.model
        self.kernels = self.model.kernels
        self.blocks = BlockManager(
            self.groups.num_blocks(config.num_kv_blocks),
            config.block_size,
            config.enable_kv_cache_reuse,
            self.groups.windows,
            self.groups.num_blocks(config.num_host_kv_blocks),
            stride=self.kernels.stride,
        )
        self.scheduler = Scheduler(config, self.blocks, self.runner.row_cost)
        self.siblings = Siblings(config.block_size)
        self.guided = Guided(self.tokens, spec.vocab_size)
        self.sequences: dict[Any, Sequence] = {}
        self.info = ModelInfo(
            vocab_size=spec.vocab_size,
            max_seq_len=config.max_seq_len,
            end_ids=spec.end_ids,
            model_dir=config.model_dir,
            description=self._describe(),
        )
        self._counts: Counter[str] = Counter()
        """Of EngineStats' fields those that steps add to."""
        self._flight: Flight | None = None
        self._fetched_ns, self._waited = 0, True
        self.failed_steps = 0
        """Steps in a row that failed as a whole."""

    def _describe(self) -> str:
        spec, config = self.model.spec, self.config
        ranks = config.tensor_parallel_size
        where = config.device if ranks == 1 else f"{config.device}, shared by {ranks} ranks"
        freed = ", given back behind windows" if self.blocks.has_windows else ""
        return (
            f"{spec.architecture} with {spec.num_layers} layers, {self.kernels.describe(spec)} on "
            f"{where}, {config.num_kv_blocks} KV blocks of {config.block_size} tokens{freed}, "
            f"{config.batch_scheduler_policy}{self.runner.describe()}"
        )

    @property
    def busy(self) -> bool:
        return bool(self.sequences)

    def add(self, key: Any, request: GenerationRequest, arrival_ns: int | None = None) -> None:
        """Queues a request under a key that names its outputs.

        Raises:
            RequestError: INVALID_ARG if it can never run, UNAVAILABLE if the queue is full.
        """
        self._validate(request)
        limit = self.config.max_queue_size
        if limit and self._num_waiting >= limit:
            raise QueueFull(
                f"the queue is full: max_queue_size={limit} requests wait already, try again later"
            )
        arrival = arrival_ns or time.monotonic_ns()
        sequence = Sequence.start(key, request, self.info.end_ids, self.tokens, arrival)
        self.runner.check(sequence)
        if not self.guided.hold(sequence):
            self._queue(sequence)
        self.sequences[key] = sequence

    def _queue(self, sequence: Sequence) -> None:
        if not self.siblings.hold(sequence):
            self.scheduler.add(sequence)

    @property
    def _num_waiting(self) -> int:
        return len(self.scheduler.waiting) + len(self.siblings) + len(self.guided)

    def _validate(self, request: GenerationRequest) -> None:
        length, limit = len(request.prompt_ids), self.config.max_seq_len

        def require(ok: bool, message: str) -> None:
            if not ok:
                raise RequestError(Code.INVALID_ARG, message)

        require(length > 0, "the prompt is empty: it must have at least one token")
        require(request.max_tokens > 0, f"max_tokens is {request.max_tokens}: it must be > 0")
        require(
            length + request.max_tokens <= limit,
            f"the prompt has {length} tokens and max_tokens is {request.max_tokens}: together they must not "
            f"exceed max_seq_len={limit}",
        )
        vocab = self.info.vocab_size
        for token in (min(request.prompt_ids), max(request.prompt_ids)):
            require(
                0 <= token < vocab,
                f"prompt token {token} is outside the vocabulary: ids must be in 0..{vocab - 1}",
            )
        require(all(request.bad_ids), "bad_ids holds a word of no tokens: leave it out")
        require(request.min_tokens >= 0, f"min_tokens is {request.min_tokens}: it must be >= 0")

    def cancel(self, key: Any) -> RequestOutput | None:
        """Stops a request; returns its last output, or None if it has ended already."""
        sequence = self.sequences.get(key)
        if sequence is None:
            return None
        self._retire(sequence)
        if not self.busy:
            self._finish()  # nobody will ask for another step
        return sequence.end(FinishReason.CANCELLED)

    def step(self) -> Outputs:
        """Launches one step; returns what became of which request since the last call.

        With lag (see above) that is the step launched by the last call, otherwise the one launched by this.
        What fails for one request ends that one with INTERNAL; a step that fails as a whole, all that took part in it.
        """
        outputs = self._expire() + self._guide()
        if self._flight is not None and self._awaits(self._flight):
            outputs += self._finish() + self._fetch()
        self.scheduler.waiting.extendleft(reversed(self.siblings.release()))
        chunks = self.scheduler.schedule()
        if failed := self._finish():
            # Some of them may be in the planned step, too: the next call plans it again.
            return outputs + failed
        self._count(chunks)
        launched = None
        if chunks:
            try:
                launched = self._launch(chunks)
                self.failed_steps = 0
            except RankLost:
                raise
            except Exception as error:
                outputs += self._launch_again(chunks, error)
        elif self._flight is None and self.guided and not outputs:
            self.guided.wait(IDLE_S)
        outputs += self._fetch()
        self._flight = launched
        if not self.runner.lags:
            outputs += self._fetch()
        elif not self.busy:
            self._finish()  # nobody will ask for another step
        return outputs

    def _awaits(self, flight: Flight) -> bool:
        """Whether the tokens in flight have to be known before the next step is launched."""
        if self.scheduler.speculation is None:
            return False
        return any(chunk.guesses for chunk in flight.chunks) or self.scheduler.expects_guesses()

    def _launch(self, chunks: list[Chunk]) -> Flight:
        start, work = time.monotonic_ns(), NOTHING
        if self.scheduler.times is not None:
            for chunk in chunks:
                work += chunk.work
        sampling = [chunk.sequence for chunk in chunks for _ in range(chunk.num_sampled)]
        self._move()
        ticket = self.runner.launch(chunks, sampling)
        for chunk in chunks:
            chunk.sequence.num_scored += chunk.scored
            chunk.sequence.computed(self.blocks, chunk.num_tokens)
            if chunk.samples:
                chunk.sequence.num_pending += 1
        return Flight(chunks, ticket, work, start)

    def _move(self) -> None:
        """Queues the copies of KV blocks that the scheduler has caused."""
        moves = self.blocks.take_moves()
        if moves is None:
            return
        try:
            self.runner.move(moves)
        except RankLost:
            raise
        except Exception as error:  # who knows which of them were made
            self.blocks.forget_all()
            raise MovesFailed(f"KV blocks could not be copied: {type(error).__name__}: {error}") from error

    def _finish(self) -> Outputs:
        """Queues what of the step in flight depends on the tokens of the step before, which have been fetched."""
        try:
            self.runner.finish()
        except RankLost:
            raise
        except Exception as error:
            flight, self._flight = self._flight, None
            self.failed_steps += 1
            return self._fail(flight.chunks if flight else [], error)
        return []

    def _guide(self) -> Outputs:
        """Queues requests whose grammar is ready, and refuses those whose guide makes none."""
        outputs: Outputs = []
        if not self.guided:
            return outputs
        ready, failed = self.guided.release()
        for sequence in ready:
            self._queue(sequence)
        for sequence, error in failed:
            self._retire(sequence)
            output = sequence.end(FinishReason.ERROR)
            output.error = error
            outputs.append((sequence.key, output))
        return outputs

    def _launch_again(self, chunks: list[Chunk], error: Exception) -> Outputs:
        """After a step that failed: each request alone, which shows whose fault it was.

        Nothing has changed yet: a step counts as computed once it was launched, and writes the same keys and values
        again. A device that runs ahead keeps state of its own, and there the step fails for all.
        """
        outputs: Outputs = []
        guilty = isinstance(error, SamplingFailed)
        if self.runner.lags or len(chunks) == 1 or isinstance(error, MovesFailed):
            outputs = self._fail(chunks, error)
        else:
            for chunk in chunks:
                try:
                    self._flight = self._launch([chunk])
                except Exception as own:
                    outputs += self._fail([chunk], own)
                    guilty |= isinstance(own, SamplingFailed)
                else:
                    outputs += self._fetch()
                    guilty = True
        self.failed_steps = 0 if guilty else self.failed_steps + 1
        return outputs

    def _fetch(self) -> Outputs:
        """Fetches the tokens of the step in flight, if there is one."""
        flight, self._flight = self._flight, None
        if flight is None:
            return []
        try:
            sampled = flight.ticket()
            self._follow(flight.chunks, sampled)
            self.runner.prepare()
        except RankLost:
            raise
        except Exception as error:
            self.failed_steps += 1
            return self._fail(flight.chunks, error)
        outputs: Outputs = []
        now, at = time.monotonic_ns(), 0
        self._time(flight, now)
        scores_at = sum(chunk.num_sampled for chunk in flight.chunks)
        for chunk in flight.chunks:
            if chunk.scored:
                told = sampled[scores_at : scores_at + chunk.scored]
                chunk.sequence.output.hear([(token.log_prob, token.top) for token in told])
                scores_at += chunk.scored
            if not chunk.samples:
                continue
            sequence, first, at = chunk.sequence, at, at + chunk.num_sampled
            sequence.num_pending -= 1
            if sequence.finish_reason is not None:
                continue  # it has ended while this step was in flight
            try:
                if chunk.guesses:
                    outputs += self._take(chunk, sampled[first:at], now)
                elif (output := self._append(sequence, sampled[first], now)) is not None:
                    outputs.append((sequence.key, output))
            except Exception as error:  # in its text or its words: the others have theirs
                outputs += self._fail([chunk], error)
                continue
            if sequence.finish_reason is not None:
                self._retire(sequence)
        return outputs

    @staticmethod
    def _follow(chunks: list[Chunk], sampled: list[Sampled]) -> None:
        """Grammars take their answers' tokens, all at once. No guided answer has guesses."""
        taken: list[tuple[Grammar, int]] = []
        at = 0
        for chunk in chunks:
            sequence = chunk.sequence
            if sequence.grammar is not None and chunk.samples and sequence.finish_reason is None:
                token = sampled[at].token_id
                if token >= 0 and token not in sequence.end_ids:
                    taken.append((sequence.grammar, token))
            at += chunk.num_sampled
        if taken:
            take(taken)

    def _time(self, flight: Flight, now_ns: int) -> None:
        """Tells the scheduler how long a step has taken: since its launch, or since the step before it if later.

        Where the host came late to one of the two, but not to both, it took less or more.
        """
        if self.scheduler.times is not None:
            began = flight.launched_ns >= self._fetched_ns or self._waited
            begin_ns = max(flight.launched_ns, self._fetched_ns)
            prompts = any(chunk.num_tokens - len(chunk.guesses) > 1 for chunk in flight.chunks)
            self.scheduler.times.observe(
                flight.work, (now_ns - begin_ns) / 1e9, prompts, began == self.runner.waited
            )
        self._fetched_ns, self._waited = now_ns, self.runner.waited

    @staticmethod
    def _append(sequence: Sequence, token: Sampled, now_ns: int) -> RequestOutput | None:
        """Takes a token; where none could be chosen the request ends, and its neighbours go on."""
        if token.token_id < 0:
            output = sequence.end(FinishReason.ERROR)
            output.error = RequestError(Code.INTERNAL, token.error)
            if sequence.grammar is not None and sequence.grammar.problem:
                output.error = RequestError(Code.INVALID_ARG, sequence.grammar.problem)
            elif bans := sequence.request.bans:
                output.error = RequestError(
                    Code.INVALID_ARG,
                    f"{' and '.join(bans)} leave no token here: what they forbid together must be less",
                )
            return output
        return sequence.append(token.token_id, token.log_prob, now_ns, token.top)

    def _take(self, chunk: Chunk, tokens: list[Sampled], now_ns: int) -> Outputs:
        """Appends sampled tokens: the first, and each later one if the token before it was guessed right."""
        sequence, outputs, taken = chunk.sequence, [], 0
        sequence.num_guessed += len(chunk.guesses)
        for token, guess in zip(tokens, (*chunk.guesses, None), strict=True):
            taken += 1
            sequence.num_accepted += token.token_id == guess
            output = self._append(sequence, token, now_ns)
            if output is not None:
                outputs.append((sequence.key, output))
            if sequence.finish_reason is not None or token.token_id != guess:
                break
        sequence.reject(len(tokens) - taken)
        self._counts["guessed_tokens"] += len(chunk.guesses)
        self._counts["accepted_tokens"] += taken - 1
        self._counts["generated_tokens"] += taken - 1
        return outputs

    def _retire(self, sequence: Sequence) -> None:
        if not self.guided.forget(sequence) and not self.siblings.forget(sequence):
            self.scheduler.remove(sequence)
        self.runner.forget(sequence)
        del self.sequences[sequence.key]

    def _fail(self, chunks: list[Chunk], error: Exception) -> Outputs:
        outputs: Outputs = []
        message = f"the engine step failed: {type(error).__name__}: {error}"
        for chunk in chunks:
            sequence = chunk.sequence
            if self.sequences.get(sequence.key) is not sequence:
                continue  # it has ended while this step was in flight
            sequence.finish_reason = FinishReason.ERROR
            self._retire(sequence)
            # Without what it held back: its text may be what failed.
            output = RequestOutput(
                num_input_tokens=sequence.num_prompt,
                num_output_tokens=sequence.output.num_emitted,
                finish_reason=FinishReason.ERROR,
                error=RequestError(Code.INTERNAL, message),
                metrics=sequence.metrics(),
            )
            outputs.append((sequence.key, output))
        return outputs

    def _expire(self) -> Outputs:
        """Refuses requests that have waited longer than ``max_queue_delay_ms`` for their first step."""
        delay = self.config.max_queue_delay_ms
        if not delay or not self.scheduler.waiting:
            return []
        deadline = time.monotonic_ns() - delay * 1_000_000
        outputs: Outputs = []
        for sequence in list(self.scheduler.waiting):
            if sequence.first_scheduled_ns == 0 and sequence.arrival_ns < deadline:
                self._retire(sequence)
                output = sequence.end(FinishReason.ERROR)
                output.error = RequestError(
                    Code.UNAVAILABLE,
                    f"not scheduled within max_queue_delay_ms={delay}: the server is overloaded",
                )
                outputs.append((sequence.key, output))
        return outputs

    def _count(self, chunks: list[Chunk]) -> None:
        counts = self._counts
        counts["scheduled_requests"] = len(chunks)
        counts["context_requests"] = sum(chunk.num_tokens - len(chunk.guesses) > 1 for chunk in chunks)
        counts["iterations"] += bool(chunks)
        counts["generated_tokens"] += sum(chunk.samples for chunk in chunks)

    @property
    def stats(self) -> EngineStats:
        """A snapshot of now."""
        counts = dict(self._counts)
        # Of those that hold all layers each.
        used = -(
            -(self.blocks.num_blocks - self.blocks.num_free) * self.groups.size // self.model.spec.num_layers
        )
        if not self.sequences:
            counts["scheduled_requests"] = counts["context_requests"] = 0
        return EngineStats(
            **counts,
            active_requests=len(self.sequences),
            waiting_requests=self._num_waiting,
            max_requests=self.config.max_batch_size,
            kv_blocks_max=self.config.num_kv_blocks,
            kv_blocks_free=self.config.num_kv_blocks - used,
            kv_blocks_used=used,
            kv_blocks_reused=self.blocks.num_reused,
            **self._host_stats(),
            tokens_per_block=self.config.block_size,
            gpu_memory_bytes=reserved_gpu_memory(),
        )

    def _host_stats(self) -> dict[str, int]:
        host = self.blocks.host
        if self.runner.host is None:
            return {}
        size = self.runner.host.block_bytes
        return {
            "host_kv_bytes_max": host.num_blocks * size,
            "host_kv_bytes_used": len(host.used) * size,
            "host_kv_bytes_saved": host.num_saved * size,
            "host_kv_bytes_restored": host.num_restored * size,
            "host_kv_hits": host.num_hits,
        }

    def watch_blocks(self) -> list[BlockEvent]:
        """Begins to keep what happens to the prefix cache; returns what it holds now."""
        self.blocks.journal = []
        return self.blocks.findable()

    def block_events(self) -> list[BlockEvent]:
        """What has happened since the last call."""
        events = self.blocks.journal
        if not events:
            return []
        self.blocks.journal = []
        return events

    def close(self) -> None:
        """The last call. Other engines have workers to stop, too."""
        self.guided.close()
        self.ranks.close()

    def audit(self) -> None:
        """Raises AssertionError if the block bookkeeping disagrees with the live sequences."""
        self.blocks.check([table for sequence in self.sequences.values() for table in sequence.block_tables])

    def generate(self, requests: list[GenerationRequest]) -> list[RequestOutput]:
        """Runs requests to their end, all in flight together, and returns each one's whole output.

        Raises:
            RequestError: a request was refused or failed.
        """
        whole = [RequestOutput() for _ in requests]
        for number, request in enumerate(requests):
            self.add(number, request)
        while self.busy:
            for number, output in self.step():
                whole[number].extend(output)
        for output in whole:
            if output.error is not None:
                raise output.error
        return whole
