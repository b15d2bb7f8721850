"""The engine: add requests, call :meth:`Engine.step` as long as there is work, read what comes out.

Single-threaded and synchronous; ``torch_engine.server`` puts a process and a socket around it.
"""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from torch_engine import kernels
from torch_engine.blocks import BlockManager
from torch_engine.config import EngineConfig
from torch_engine.families import load_spec
from torch_engine.kernels.pytorch import PrefillChunk, StepInput
from torch_engine.model import Model
from torch_engine.request import (
    Code,
    EngineStats,
    FinishReason,
    GenerationRequest,
    ModelInfo,
    RequestError,
    RequestOutput,
)
from torch_engine.sampling import sample
from torch_engine.scheduler import Chunk, Scheduler
from torch_engine.sequence import Sequence
from torch_engine.text import TokenBytes
from torch_engine.weights import Checkpoint

Outputs = list[tuple[Any, RequestOutput]]
"""Request keys, each with what became of its request."""


class Engine:
    """In-flight batching over one model on one device.

    Raises on construction:
        ConfigError, UnsupportedModel, UnsupportedTokenizer: the configuration or checkpoint cannot run.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        spec = load_spec(config.model_dir)
        self.tokens = TokenBytes.from_dir(config.model_dir)
        self.kernels = kernels.choose(config)
        with torch.inference_mode():
            self.model = Model(Checkpoint(config.model_dir, spec), self.kernels, config.max_seq_len)
            self.caches = self.model.new_caches(config.num_kv_blocks, config.block_size)
        self.blocks = BlockManager(config.num_kv_blocks, config.block_size, config.enable_kv_cache_reuse)
        self.scheduler = Scheduler(config, self.blocks)
        self.sequences: dict[Any, Sequence] = {}
        self.info = ModelInfo(
            vocab_size=spec.vocab_size,
            max_seq_len=config.max_seq_len,
            end_ids=spec.end_ids,
            model_dir=config.model_dir,
            description=self._describe(),
        )
        self._stats = EngineStats()

    def _describe(self) -> str:
        spec, config = self.model.spec, self.config
        weights = f"FP8 weights, computed in {config.compute_dtype}" if spec.fp8 else config.compute_dtype
        return (
            f"{spec.architecture} with {spec.num_layers} layers, {weights}, {self.kernels.describe()} on "
            f"{config.device}, {config.num_kv_blocks} KV blocks of "
            f"{config.block_size} tokens, {config.batch_scheduler_policy}"
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
        if limit and len(self.scheduler.waiting) >= limit:
            raise RequestError(
                Code.UNAVAILABLE,
                f"the queue is full: max_queue_size={limit} requests wait already, try again later",
            )
        arrival = arrival_ns or time.time_ns()
        sequence = Sequence.start(key, request, self.info.end_ids, self.tokens, arrival)
        self.sequences[key] = sequence
        self.scheduler.add(sequence)

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
        bad = next((token for token in request.prompt_ids if not 0 <= token < vocab), None)
        require(bad is None, f"prompt token {bad} is outside the vocabulary: ids must be in 0..{vocab - 1}")
        require(request.min_tokens >= 0, f"min_tokens is {request.min_tokens}: it must be >= 0")

    def cancel(self, key: Any) -> RequestOutput | None:
        """Stops a request; returns its last output, or None if it has ended already."""
        sequence = self.sequences.pop(key, None)
        if sequence is None:
            return None
        self.scheduler.remove(sequence)
        return sequence.end(FinishReason.CANCELLED)

    def step(self) -> Outputs:
        """Runs one step; returns what became of which request.

        A failing step ends the requests that took part in it with INTERNAL, no others.
        """
        outputs = self._expire()
        chunks = self.scheduler.schedule()
        self._count(chunks)
        if not chunks:
            return outputs
        try:
            sampled = self._run(chunks)
        except Exception as error:
            return outputs + self._fail(chunks, error)
        for chunk in chunks:
            samples = chunk.samples
            chunk.sequence.computed(self.blocks, chunk.num_tokens)
            if samples:
                token = sampled[chunk.sequence]
                output = chunk.sequence.append(token.token_id, token.log_prob)
                if output is not None:
                    outputs.append((chunk.sequence.key, output))
                if chunk.sequence.finish_reason is not None:
                    self._retire(chunk.sequence)
        return outputs

    @torch.inference_mode()
    def _run(self, chunks: list[Chunk]) -> dict:
        step = build_step(chunks, self.config.block_size, self.kernels.device)
        logits = self.model.forward(step, self.caches)
        sampling = [chunk.sequence for chunk in chunks if chunk.samples]
        return (
            dict(zip(sampling, sample(logits, sampling, self.kernels.argmax), strict=True))
            if sampling
            else {}
        )

    def _retire(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        del self.sequences[sequence.key]

    def _fail(self, chunks: list[Chunk], error: Exception) -> Outputs:
        outputs: Outputs = []
        for chunk in chunks:
            self._retire(chunk.sequence)
            output = chunk.sequence.end(FinishReason.ERROR)
            output.error = RequestError(
                Code.INTERNAL, f"the engine step failed: {type(error).__name__}: {error}"
            )
            outputs.append((chunk.sequence.key, output))
        return outputs

    def _expire(self) -> Outputs:
        """Refuses requests that have waited longer than ``max_queue_delay_ms`` for their first step."""
        delay = self.config.max_queue_delay_ms
        if not delay or not self.scheduler.waiting:
            return []
        deadline = time.time_ns() - delay * 1_000_000
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
        self._stats = replace(
            self._stats,
            scheduled_requests=len(chunks),
            context_requests=sum(chunk.num_tokens > 1 for chunk in chunks),
            iterations=self._stats.iterations + bool(chunks),
            generated_tokens=self._stats.generated_tokens + sum(chunk.samples for chunk in chunks),
        )

    @property
    def stats(self) -> EngineStats:
        """A snapshot of now."""
        return replace(
            self._stats,
            active_requests=len(self.sequences),
            scheduled_requests=self._stats.scheduled_requests if self.sequences else 0,
            context_requests=self._stats.context_requests if self.sequences else 0,
            waiting_requests=len(self.scheduler.waiting),
            max_requests=self.config.max_batch_size,
            kv_blocks_max=self.blocks.num_blocks,
            kv_blocks_free=self.blocks.num_free,
            kv_blocks_used=self.blocks.num_blocks - self.blocks.num_free,
            kv_blocks_reused=self.blocks.num_reused,
            tokens_per_block=self.config.block_size,
        )

    def audit(self) -> None:
        """Raises AssertionError if the block bookkeeping disagrees with the live sequences."""
        self.blocks.check([sequence.block_table for sequence in self.sequences.values()])

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


def build_step(chunks: list[Chunk], block_size: int, device: torch.device) -> StepInput:
    """The tensors of one step; ``chunks`` has the single-token ones first."""
    tokens: list[int] = []
    positions: list[np.ndarray] = []
    slots: list[np.ndarray] = []
    prefills: list[PrefillChunk] = []
    rows: list[int] = []
    decodes: list[Chunk] = []
    for chunk in chunks:
        sequence, begin = chunk.sequence, chunk.sequence.num_computed
        end, start = begin + chunk.num_tokens, len(tokens)
        tokens += sequence.tokens[begin:end]
        position = np.arange(begin, end)
        table = np.asarray(sequence.block_table)
        positions.append(position)
        slots.append(table[position // block_size] * block_size + position % block_size)
        if chunk.num_tokens == 1:
            decodes.append(chunk)
        else:
            used = torch.from_numpy(table[: -(-end // block_size)]).to(device)
            prefills.append(PrefillChunk(start, len(tokens), end, used))
        if chunk.samples:
            rows.append(len(tokens) - 1)
    lengths = np.array([chunk.sequence.num_computed + 1 for chunk in decodes], dtype=np.int64)
    longest = -(-int(lengths.max(initial=0)) // block_size)
    tables = np.zeros((len(decodes), longest), dtype=np.int64)
    for row, chunk in enumerate(decodes):
        count = -(-int(lengths[row]) // block_size)
        tables[row, :count] = chunk.sequence.block_table[:count]

    def tensor(values: np.ndarray | list[int]) -> torch.Tensor:
        return torch.as_tensor(np.asarray(values, dtype=np.int64), device=device)

    return StepInput(
        token_ids=tensor(tokens),
        positions=tensor(np.concatenate(positions)),
        slots=tensor(np.concatenate(slots)),
        decode_blocks=tensor(tables),
        decode_lengths=tensor(lengths),
        prefills=prefills,
        logit_rows=tensor(rows),
    )
