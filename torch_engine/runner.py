"""Runs the scheduler's chunks on a device, directly: launch a step, fetch what it sampled.

:class:`torch_engine.cuda_runner.CudaRunner` has the same two methods, with graphs and a step of lag between them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from torch_engine.kernels.pytorch import PrefillChunk, StepInput
from torch_engine.model import Model
from torch_engine.sampling import Sampled, sample
from torch_engine.scheduler import Chunk
from torch_engine.sequence import Sequence

Ticket = Callable[[], list[Sampled]]
"""A launched step; calling it waits for the tokens of the sequences that sampled."""


class Runner:
    """Computes a step while the caller waits."""

    lags = False
    """Whether the next step may be launched before this one's tokens are fetched."""

    def __init__(self, model: Model, num_blocks: int, block_size: int) -> None:
        self.model = model
        self.block_size = block_size
        self.caches = model.new_caches(num_blocks, block_size)

    def describe(self) -> str:
        return ""

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk], sampling: list[Sequence]) -> Ticket:
        """Runs the step; ``sampling`` names the sequence of each token that is sampled, chunk by chunk."""
        kernels = self.model.kernels
        logits = self.model.forward(build_step(chunks, self.block_size, kernels.device), self.caches)
        sampled = sample(logits, sampling, kernels.argmax) if sampling else []
        return lambda: sampled

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""


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
        tokens += chunk.inputs
        position = np.arange(begin, end)
        table = np.asarray(sequence.block_table)
        positions.append(position)
        slots.append(table[position // block_size] * block_size + position % block_size)
        if chunk.num_tokens == 1:
            decodes.append(chunk)
        else:
            used = torch.from_numpy(table[: -(-end // block_size)]).to(device)
            prefills.append(PrefillChunk(start, len(tokens), end, used))
        rows += range(len(tokens) - chunk.num_sampled, len(tokens))
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
