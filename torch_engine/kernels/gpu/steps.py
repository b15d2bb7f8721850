"""The tensors of a step on the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flightline.torch_engine.kernels.gpu.attention import prefill_plan
from flightline.torch_engine.kernels.gpu.kv_cache import AttentionInput


@dataclass
class CudaStep:
    """One step's tokens, on the device."""

    ids: torch.Tensor
    """[T] int32; negative: the last token sampled for the row's slot."""
    attention: AttentionInput
    last: torch.Tensor
    """[slots] int32: the last token sampled for each slot."""
    logit_rows: torch.Tensor | None
    """[sampled] int32: rows of the step whose logits are wanted; None = all."""
    logit_slots: torch.Tensor
    """[sampled] int32: their slots in the tables of sampling."""
    holds: torch.Tensor
    """[sampled] int32: 1 where the next token must not be one that ends the output."""
    idle: int = -1
    """Slot of the rows that fill up a captured batch and belong to nobody; negative: there are none."""


@dataclass(frozen=True)
class CudaSequence:
    """Steps of one sequence that is computed alone (``core.steps.SequenceSteps``)."""

    table: torch.Tensor
    """[1, blocks] int32: its KV blocks."""
    tile: int
    """Tokens of one tile of the attention."""

    @classmethod
    def of(cls, blocks: torch.Tensor, dtype: torch.dtype, group: int, size: int) -> CudaSequence:
        """``group`` query heads of ``size`` dimensions share a key/value head."""
        return cls(blocks[None].int(), prefill_plan(dtype, size, 0).tokens(group))

    def prompt(self, ids: torch.Tensor, kept: int) -> CudaStep:
        count = ids.shape[0]
        every = torch.arange(count, dtype=torch.int32, device=ids.device)
        pieces = [(begin, min(self.tile, count - begin), begin, 0) for begin in range(0, count, self.tile)]
        tiles = torch.tensor(pieces, dtype=torch.int32, device=ids.device)
        where = AttentionInput(torch.zeros_like(every), every, self.table, 0, tiles, count)
        rows = every[-kept:]
        nothing = torch.zeros_like(rows)
        return CudaStep(ids.int(), where, nothing, rows, nothing, nothing)

    def token(self, ids: torch.Tensor, position: int) -> CudaStep:
        here = torch.tensor([position], dtype=torch.int32, device=ids.device)
        nothing = torch.zeros_like(here)
        where = AttentionInput(nothing, here, self.table, 1, None)
        return CudaStep(ids[position : position + 1].int(), where, nothing, None, nothing, nothing)
