"""The tensors of a step: which tokens are computed, and where their keys and values live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from flightline.torch_engine.core.scheduler import Chunk
from flightline.torch_engine.core.sequence import Sequence


@dataclass(frozen=True)
class PrefillChunk:
    """Tokens ``start:end`` of the step belong to one sequence and see its first ``context`` tokens."""

    start: int
    end: int
    context: int
    blocks: torch.Tensor
    """[blocks of the context] int64."""


@dataclass
class StepInput:
    """One step's tokens and where their keys and values live. Single-token chunks (decodes) come first."""

    token_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64."""
    slots: torch.Tensor
    """[T] int64: block * block_size + offset of each token's keys and values."""
    decode_blocks: torch.Tensor
    """[decodes, longest table] int64, padded with block 0."""
    decode_lengths: torch.Tensor
    """[decodes] int64: tokens that each decode sees, itself included."""
    prefills: list[PrefillChunk]
    logit_rows: torch.Tensor | None
    """[sampled] int64: rows of the step whose logits are wanted, in ascending order; None = all."""

    def __post_init__(self) -> None:
        self.made: dict[Hashable, Any] = {}
        """What an implementation makes once a step and its layers share: attention masks, for example."""

    @property
    def num_decodes(self) -> int:
        return self.decode_lengths.shape[0]


StepT_co = TypeVar("StepT_co", covariant=True)


class StepBuilder(ABC, Generic[StepT_co]):
    """The tensors of one step after the other, in the form that an implementation of the kernels takes.

    The sequences' block tables are rows of one array that stays from step to step: written is only what is new.
    """

    def __init__(self, block_size: int, device: torch.device) -> None:
        self._block_size = block_size
        self._device = None if device.type == "cpu" else device
        self._tables = np.zeros((16, 16), dtype=np.int64)
        self._known: dict[Sequence, tuple[int, list[int], int]] = {}
        """Each sequence's row, its block table and how many of its blocks are in the row."""
        self._free = list(range(len(self._tables)))

    def build(self, chunks: list[Chunk]) -> StepT_co:
        """The step of ``chunks``, which has the single-token ones first."""
        tokens: list[int] = []
        columns: list[int] = []
        decodes = sampled = 0
        for chunk in chunks:
            sequence, count, wanted = chunk.sequence, chunk.num_tokens, chunk.num_rows
            begin = sequence.num_computed
            known = self._known.get(sequence)
            if known is None or known[1] is not sequence.block_table or known[2] != len(known[1]):
                known = self._update(sequence)
            columns += (known[0], begin, count, wanted)
            sampled += wanted
            if count == 1:
                decodes += 1
                tokens.append(sequence.tokens[begin])
            else:
                tokens += chunk.inputs
        return self._step(np.array(tokens), np.array(columns).reshape(-1, 4), decodes, sampled)

    @abstractmethod
    def _step(
        self, tokens: NDArray[np.int64], columns: NDArray[np.int64], decodes: int, sampled: int
    ) -> StepT_co:
        """From each chunk's row in the tables, tokens before, tokens, and tokens sampled, ``sampled`` in all."""

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


class TensorSteps(StepBuilder[StepInput]):
    """Steps as tensors, for kernels in plain PyTorch."""

    def _step(
        self, tokens: NDArray[np.int64], columns: NDArray[np.int64], decodes: int, sampled: int
    ) -> StepInput:
        rows, begins, counts, samples = columns.T
        contexts = begins + counts
        used = -(-contexts // self._block_size)
        longest = int(used[:decodes].max(initial=0))
        positions, row_of, logit_rows, prefills = begins, rows, None, []
        if decodes < len(columns):
            ends = np.cumsum(counts)
            positions, row_of = _runs(begins, counts), np.repeat(rows, counts)
            prefills = [
                PrefillChunk(end - count, end, context, self._tensor(self._tables[row, :width].copy()))
                for end, count, context, row, width in zip(
                    *(each[decodes:].tolist() for each in (ends, counts, contexts, rows, used)), strict=True
                )
            ]
            logit_rows = self._tensor(_runs(ends - samples, samples))
        elif sampled < len(columns):
            logit_rows = self._tensor(np.flatnonzero(samples))
        block, offset = np.divmod(positions, self._block_size)
        return StepInput(
            token_ids=self._tensor(tokens),
            positions=self._tensor(positions),
            slots=self._tensor(self._tables[row_of, block] * self._block_size + offset),
            decode_blocks=self._tensor(self._tables[rows[:decodes], :longest]),
            decode_lengths=self._tensor(contexts[:decodes]),
            prefills=prefills,
            logit_rows=logit_rows,
        )

    def _tensor(self, values: NDArray[np.int64]) -> torch.Tensor:
        tensor = torch.from_numpy(np.ascontiguousarray(values))
        return tensor if self._device is None else tensor.to(self._device)


class SequenceSteps(Protocol[StepT_co]):
    """Steps of one sequence that is computed alone."""

    def prompt(self, ids: torch.Tensor, kept: int) -> StepT_co:
        """The step of the prompt ``ids`` [T], for the logits of its last ``kept`` tokens (0: of all)."""

    def token(self, ids: torch.Tensor, position: int) -> StepT_co:
        """The step that decodes the token at ``position`` of ``ids`` [T], over the KV cache of those before it."""


@dataclass(frozen=True)
class TensorSequence:
    """:class:`SequenceSteps` as tensors."""

    blocks: torch.Tensor
    """[blocks] int64: those of the KV cache that the sequence has, in its order."""
    block_size: int

    def prompt(self, ids: torch.Tensor, kept: int) -> StepInput:
        count = ids.shape[0]
        every = torch.arange(count)
        return StepInput(
            token_ids=ids,
            positions=every,
            slots=self._slots(every),
            decode_blocks=torch.zeros(0, 0, dtype=torch.int64),
            decode_lengths=torch.zeros(0, dtype=torch.int64),
            prefills=[PrefillChunk(0, count, count, self._holding(count))],
            logit_rows=every[-kept:],
        )

    def token(self, ids: torch.Tensor, position: int) -> StepInput:
        here = torch.tensor([position])
        return StepInput(
            token_ids=ids[here],
            positions=here,
            slots=self._slots(here),
            decode_blocks=self._holding(position + 1)[None],
            decode_lengths=here + 1,
            prefills=[],
            logit_rows=None,
        )

    def _holding(self, tokens: int) -> torch.Tensor:
        """The blocks of the first ``tokens`` tokens."""
        return self.blocks[: -(-tokens // self.block_size)]

    def _slots(self, positions: torch.Tensor) -> torch.Tensor:
        return self.blocks[positions // self.block_size] * self.block_size + positions % self.block_size


def _runs(begins: NDArray[np.int64], counts: NDArray[np.int64]) -> NDArray[np.int64]:
    """Neighbouring numbers, ``counts[i]`` of them from ``begins[i]`` on, one run after the other."""
    before = np.cumsum(counts) - counts
    runs: NDArray[np.int64] = np.repeat(begins - before, counts) + np.arange(int(counts.sum()))
    return runs
