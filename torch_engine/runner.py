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
        self.caches = model.new_caches(num_blocks, block_size)
        self.steps = StepBuilder(block_size, model.kernels.device)

    def describe(self) -> str:
        return ""

    @torch.inference_mode()
    def launch(self, chunks: list[Chunk], sampling: list[Sequence]) -> Ticket:
        """Runs the step; ``sampling`` names the sequence of each token that is sampled, chunk by chunk."""
        logits = self.model.forward(self.steps.build(chunks), self.caches)
        sampled = sample(logits, sampling, self.model.kernels.argmax) if sampling else []
        return lambda: sampled

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended."""
        self.steps.forget(sequence)


class StepBuilder:
    """The tensors of one step after the other.

    The sequences' block tables are rows of one array that stays from step to step: written is only what is new.
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = None if device.type == "cpu" else device
        self._tables = np.zeros((16, 16), dtype=np.int64)
        self._known: dict[Sequence, tuple[int, list[int], int]] = {}
        """Each sequence's row, its block table and how many of its blocks are in the row."""
        self._free = list(range(len(self._tables)))

    def build(self, chunks: list[Chunk]) -> StepInput:
        """``chunks`` has the single-token ones first."""
        tokens: list[int] = []
        columns: list[tuple[int, int, int, int]] = []
        decodes = 0
        for chunk in chunks:
            sequence, count, samples, guesses = chunk
            begin = sequence.num_computed
            known = self._known.get(sequence)
            if known is None or known[1] is not sequence.block_table or known[2] != len(known[1]):
                known = self._update(sequence)
            columns.append((known[0], begin, count, 1 + len(guesses) if samples else 0))
            if count == 1:
                decodes += 1
                tokens.append(sequence.tokens[begin])
            else:
                tokens += chunk.inputs
        rows, begins, counts, samples = np.array(columns).T
        contexts = begins + counts
        used = -(-contexts // self._block_size)
        longest = int(used[:decodes].max(initial=0))
        positions, row_of, logit_rows, prefills = begins, rows, None, []
        if decodes < len(chunks):
            ends = np.cumsum(counts)
            positions, row_of = _runs(begins, counts), np.repeat(rows, counts)
            prefills = [
                PrefillChunk(end - count, end, context, self._tensor(self._tables[row, :width].copy()))
                for end, count, context, row, width in zip(
                    *(each[decodes:].tolist() for each in (ends, counts, contexts, rows, used)), strict=True
                )
            ]
            logit_rows = self._tensor(_runs(ends - samples, samples))
        elif not samples.all():
            logit_rows = self._tensor(np.flatnonzero(samples))
        block, offset = np.divmod(positions, self._block_size)
        return StepInput(
            token_ids=self._tensor(np.array(tokens)),
            positions=self._tensor(positions),
            slots=self._tensor(self._tables[row_of, block] * self._block_size + offset),
            decode_blocks=self._tensor(self._tables[rows[:decodes], :longest]),
            decode_lengths=self._tensor(contexts[:decodes]),
            prefills=prefills,
            logit_rows=logit_rows,
        )

    def forget(self, sequence: Sequence) -> None:
        """Gives its row away."""
        known = self._known.pop(sequence, None)
        if known is not None:
            self._free.append(known[0])

    def _update(self, sequence: Sequence) -> tuple[int, list[int], int]:
        """Brings the sequence's row up to date."""
        table = sequence.block_table
        row, known, first = self._known.get(sequence) or (-1, [], 0)
        if row < 0:
            if not self._free:
                self._grow(2 * len(self._tables), self._tables.shape[1])
            row = self._free.pop()
        if known is not table:  # a sequence that lost its blocks has a new list
            first = 0
        if len(table) > self._tables.shape[1]:
            self._grow(len(self._tables), 2 * len(table))
        self._tables[row, first : len(table)] = table[first:]
        self._known[sequence] = row, table, len(table)
        return self._known[sequence]

    def _grow(self, rows: int, width: int) -> None:
        old = self._tables
        self._tables = np.zeros((rows, width), dtype=np.int64)
        self._tables[: old.shape[0], : old.shape[1]] = old
        self._free += range(old.shape[0], rows)

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor if self._device is None else tensor.to(self._device)


def _runs(begins: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Neighbouring numbers, ``counts[i]`` of them from ``begins[i]`` on, one run after the other."""
    before = np.cumsum(counts) - counts
    return np.repeat(begins - before, counts) + np.arange(int(counts.sum()))
