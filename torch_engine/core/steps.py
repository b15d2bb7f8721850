"""The tensors of a step: which tokens are computed, and where their keys and values live."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable
from collections.abc import Sequence as Seq
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
    blocks: list[torch.Tensor]
    """For each group of layers int64: the blocks of the context, from the first one that its window reaches on."""
    begins: list[int]
    """For each group: the position of the first token in its blocks."""


@dataclass
class StepInput:
    """One step's tokens and where their keys and values live. Single-token chunks (decodes) come first."""

    token_ids: torch.Tensor
    """[T] int64."""
    positions: torch.Tensor
    """[T] int64."""
    slots: list[torch.Tensor]
    """For each group of layers (``core/layer_groups.py``) [T] int64: block * block_size + offset of each token's keys
    and values."""
    decode_blocks: list[torch.Tensor]
    """For each group [decodes, longest table] int64, from the first block on that its window reaches; beyond
    a decode's own blocks its last one again."""
    decode_begins: list[torch.Tensor]
    """For each group [decodes] int64: the position of the first token in these blocks."""
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

    The sequences' block tables are rows of one array that stays from step to step: written is only what is new. What is
    behind a window by now stays there, and nobody reads it.

    Args:
        windows: of each group of layers, as ``LayerGroups`` has them.
    """

    def __init__(self, block_size: int, device: torch.device, windows: Seq[int | None] = (None,)) -> None:
        self._block_size = block_size
        self._windows = tuple(windows)
        self._device = None if device.type == "cpu" else device
        self._tables = np.zeros((16, len(self._windows), 16), dtype=np.int64)
        self._known: dict[Sequence, tuple[int, list[list[int]], int]] = {}
        """Each sequence's row, its block tables and how many blocks of each are in the row."""
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
            if known is None or known[1] is not sequence.block_tables or known[2] != len(known[1][0]):
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

    def _update(self, sequence: Sequence) -> tuple[int, list[list[int]], int]:
        """Brings the sequence's row up to date."""
        tables, length = sequence.block_tables, sequence.num_blocks
        row, known, first = self._known.get(sequence) or (-1, [], 0)
        if row < 0:
            if not self._free:
                self._grow(2 * len(self._tables), self._tables.shape[2])
            row = self._free.pop()
        if known is not tables:  # a sequence that lost its blocks has a new list
            first = 0
        if length > self._tables.shape[2]:
            self._grow(len(self._tables), 2 * length)
        for group, table in enumerate(tables):
            self._tables[row, group, first:length] = table[first:]
        self._known[sequence] = row, tables, length
        return self._known[sequence]

    def _grow(self, rows: int, width: int) -> None:
        old = self._tables
        self._tables = np.zeros((rows, old.shape[1], width), dtype=np.int64)
        self._tables[: old.shape[0], :, : old.shape[2]] = old
        self._free += range(old.shape[0], rows)


class TensorSteps(StepBuilder[StepInput]):
    """Steps as tensors, for kernels in plain PyTorch."""

    def _step(
        self, tokens: NDArray[np.int64], columns: NDArray[np.int64], decodes: int, sampled: int
    ) -> StepInput:
        rows, begins, counts, samples = columns.T
        contexts = begins + counts
        positions, row_of, logit_rows, prefills = begins, rows, None, []
        if decodes < len(columns):
            ends = np.cumsum(counts)
            positions, row_of = _runs(begins, counts), np.repeat(rows, counts)
            prefills = [
                self._chunk(*each)
                for each in zip(
                    *(values[decodes:].tolist() for values in (ends, counts, contexts, rows)), strict=True
                )
            ]
            logit_rows = self._tensor(_runs(ends - samples, samples))
        elif sampled < len(columns):
            logit_rows = self._tensor(np.flatnonzero(samples))
        block, offset = np.divmod(positions, self._block_size)
        every = range(len(self._windows))
        decoding = [self._decodes(rows[:decodes], contexts[:decodes], group) for group in every]
        return StepInput(
            token_ids=self._tensor(tokens),
            positions=self._tensor(positions),
            slots=[
                self._tensor(self._tables[row_of, group, block] * self._block_size + offset)
                for group in every
            ],
            decode_blocks=[blocks for blocks, _ in decoding],
            decode_begins=[firsts for _, firsts in decoding],
            decode_lengths=self._tensor(contexts[:decodes]),
            prefills=prefills,
            logit_rows=logit_rows,
        )

    def _decodes(
        self, rows: NDArray[np.int64], contexts: NDArray[np.int64], group: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What decodes read of a group's blocks, and the positions where that begins."""
        used, window = -(-contexts // self._block_size), self._windows[group]
        first = np.zeros_like(rows)
        if window is not None:
            first = np.maximum(contexts - window, 0) // self._block_size
        places = first[:, None] + np.arange(int((used - first).max(initial=0)))
        blocks = self._tables[rows[:, None], group, np.minimum(places, used[:, None] - 1)]
        return self._tensor(blocks), self._tensor(first * self._block_size)

    def _chunk(self, end: int, count: int, context: int, row: int) -> PrefillChunk:
        size, blocks, begins = self._block_size, [], []
        for group, window in enumerate(self._windows):
            first = 0 if window is None else max(context - count + 1 - window, 0) // size
            blocks.append(self._tensor(self._tables[row, group, first : -(-context // size)].copy()))
            begins.append(first * size)
        return PrefillChunk(end - count, end, context, blocks, begins)

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
    """:class:`SequenceSteps` as tensors. All layers have the same blocks."""

    blocks: torch.Tensor
    """[blocks] int64: those of the KV cache that the sequence has, in its order."""
    block_size: int

    def prompt(self, ids: torch.Tensor, kept: int) -> StepInput:
        count = ids.shape[0]
        every = torch.arange(count)
        return StepInput(
            token_ids=ids,
            positions=every,
            slots=[self._slots(every)],
            decode_blocks=[torch.zeros(0, 0, dtype=torch.int64)],
            decode_begins=[torch.zeros(0, dtype=torch.int64)],
            decode_lengths=torch.zeros(0, dtype=torch.int64),
            prefills=[PrefillChunk(0, count, count, [self._holding(count)], [0])],
            logit_rows=every[-kept:],
        )

    def token(self, ids: torch.Tensor, position: int) -> StepInput:
        here = torch.tensor([position])
        return StepInput(
            token_ids=ids[here],
            positions=here,
            slots=[self._slots(here)],
            decode_blocks=[self._holding(position + 1)[None]],
            decode_begins=[torch.zeros_like(here)],
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
