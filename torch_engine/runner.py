"""Runs the scheduler's chunks on a device, directly: launch a step, fetch what it sampled.

On a GPU ``cuda_runner.py`` does the same, with graphs and a step of lag between the two.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol

import torch

from flightline.torch_engine.core.blocks import Moves
from flightline.torch_engine.core.grammar import know
from flightline.torch_engine.core.layer_groups import LayerGroups
from flightline.torch_engine.core.sampling import (
    Sampled,
    rows_of,
    sample,
    score,
    scored_rows,
    split_rows,
    told_scores,
)
from flightline.torch_engine.core.scheduler import Chunk
from flightline.torch_engine.core.sequence import Sequence
from flightline.torch_engine.host_blocks import HostBlocks
from flightline.torch_engine.model.decoder import Model
from flightline.torch_engine.model.kernel_interface import CacheT, HostKernels, Kernels, LinearT, StepT
from flightline.torch_engine.parallel.ranks import Ranks, Single

Ticket = Callable[[], list[Sampled]]
"""A launched step; calling it waits for the tokens of the sequences that sampled, and gives behind those what is told
of prompts' tokens (``Chunk.scored``), chunk by chunk."""


class SamplingFailed(Exception):
    """The step was computed, and then no token could be chosen for one of its sequences."""


def host_blocks(
    kernels: Kernels[LinearT, CacheT, StepT], caches: list[CacheT], num_blocks: int
) -> HostBlocks | None:
    """So many blocks in host memory for these caches' content; None: none were asked for."""
    if not num_blocks:
        return None
    return HostBlocks([tensor for cache in caches for tensor in kernels.cache_tensors(cache)], num_blocks)


def described(host: HostBlocks | None) -> str:
    """For the log, after a comma; or nothing."""
    return (
        ""
        if host is None
        else f", {host.num_blocks * host.block_bytes >> 20} MiB of KV blocks in host memory"
    )


class StepRunner(Protocol):
    """What the engine asks of a device."""

    lags: bool
    """Whether the next step may be launched before this one's tokens are fetched."""
    row_cost: float
    """Time of one row more in a step, in times of what a step takes however few rows it has (reading the weights)."""
    host: HostBlocks | None
    """KV blocks in host memory, where there are any."""
    waited: bool
    """Whether the last fetched tokens were still being computed when they were asked for; otherwise when they were
    ready is not known."""

    @property
    def model(self) -> Model[Any, Any, Any]:
        """On kernels that the engine does not know."""

    def describe(self) -> str:
        """What it has reserved, for the log, after a comma; or nothing."""

    def move(self, moves: Moves) -> None:
        """Copies KV blocks to host memory and back, after the steps launched before and before the next one."""

    def launch(self, chunks: list[Chunk], sampling: list[Sequence]) -> Ticket:
        """Runs the step; ``sampling`` names the sequence of each token that is sampled, chunk by chunk."""

    def prepare(self) -> None:
        """Begins what :meth:`finish` will do: the tokens of the step before are known. Their texts are not yet."""

    def finish(self) -> None:
        """Queues what of the launched step had to wait for the tokens of the step before, if it has not been."""

    def check(self, sequence: Sequence) -> None:
        """Raises RequestError: INVALID_ARG if the device cannot do what a request asks of its tokens."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""

    def follow(self, told: Any) -> None:
        """Runs this rank's part of a step, or of moves, that rank 0 has told."""


class Runner(Generic[LinearT, CacheT, StepT]):
    """Computes a step while the caller waits."""

    lags = False
    row_cost = 1 / 3
    waited = True

    def __init__(
        self,
        model: Model[LinearT, CacheT, StepT],
        kernels: HostKernels[LinearT, CacheT, StepT],
        num_blocks: int,
        block_size: int,
        ranks: Ranks | None = None,
        groups: LayerGroups | None = None,
        num_host_blocks: int = 0,
    ) -> None:
        """``num_blocks`` and ``num_host_blocks`` that hold all layers each, as ``EngineConfig`` counts them."""
        groups = groups or LayerGroups.one(len(model.layers))
        self.model = model
        self.ranks = ranks or Single()
        self.kernels = kernels
        self.caches = model.new_caches(groups.num_blocks(num_blocks), block_size, groups)
        self.steps = kernels.steps(block_size, groups.windows)
        self.host = host_blocks(kernels, self.caches, groups.num_blocks(num_host_blocks))
        self.ranks.meet({"blocks": num_blocks})

    def describe(self) -> str:
        return described(self.host)

    @torch.inference_mode()
    def move(self, moves: Moves) -> None:
        """Copies KV blocks to host memory and back."""
        assert self.host is not None
        self.ranks.tell(moves)
        self.host.move(moves)
        self.ranks.done()

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk], sampling: list[Sequence]) -> Ticket:
        """Runs the step; ``sampling`` names the sequence of each token that is sampled, chunk by chunk."""
        step = self.steps.build(chunks)
        self.ranks.tell(step)
        try:
            logits = self.model.forward(step, self.caches)
        except Exception as error:
            self.ranks.lost(error)
            raise
        self.ranks.done()
        try:
            told: list[Sampled] = []
            if asked := scored_rows(chunks):
                choosing, telling = split_rows(chunks)
                told = told_scores(score(logits[telling], asked), asked)
                logits = logits[choosing]
            know([sequence.grammar for sequence in sampling if sequence.grammar is not None])
            sampled = sample(logits, rows_of(chunks), self.kernels) if sampling else []
        except Exception as error:
            raise SamplingFailed(f"{type(error).__name__}: {error}") from error
        return lambda: sampled + told

    def prepare(self) -> None:
        """As :meth:`finish`."""

    def finish(self) -> None:
        """Queues what of the launched step had to wait for the tokens of the step before. Nothing has to here."""

    def check(self, sequence: Sequence) -> None:
        """This device can do whatever a request asks of its tokens."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self.steps.forget(sequence)

    def follow(self, told: StepT | Moves) -> None:
        if isinstance(told, Moves):
            assert self.host is not None
            self.host.move(told)
        else:
            self.model.forward(told, self.caches)
