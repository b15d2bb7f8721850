"""Runs the scheduler's chunks on a device, directly: launch a step, fetch what it sampled.

:class:`torch_engine.cuda_runner.CudaRunner` has the same two methods, with graphs and a step of lag between them.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from torch_engine.model import Model
from torch_engine.sampling import Sampled, rows_of, sample
from torch_engine.scheduler import Chunk
from torch_engine.sequence import Sequence

Ticket = Callable[[], list[Sampled]]
"""A launched step; calling it waits for the tokens of the sequences that sampled."""


class SamplingFailed(Exception):
    """The step was computed, and then no token could be chosen for one of its sequences."""


class Runner:
    """Computes a step while the caller waits."""

    lags = False
    """Whether the next step may be launched before this one's tokens are fetched."""

    def __init__(self, model: Model, num_blocks: int, block_size: int) -> None:
        self.model = model
        self.caches = model.new_caches(num_blocks, block_size)
        self.steps = model.kernels.steps(block_size)

    def describe(self) -> str:
        return ""

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk], sampling: list[Sequence]) -> Ticket:
        """Runs the step; ``sampling`` names the sequence of each token that is sampled, chunk by chunk."""
        logits = self.model.forward(self.steps.build(chunks), self.caches)
        try:
            sampled = sample(logits, rows_of(chunks), self.model.kernels) if sampling else []
        except Exception as error:
            raise SamplingFailed(f"{type(error).__name__}: {error}") from error
        return lambda: sampled

    def check(self, sequence: Sequence) -> None:
        """Raises RequestError: INVALID_ARG if the device cannot do what a request asks of its tokens. This one can."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self.steps.forget(sequence)
