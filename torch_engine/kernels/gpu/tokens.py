"""Token ids on the device: the embeddings of those that go in, and the likeliest ones that come out."""

from __future__ import annotations

from typing import Protocol

import torch
import triton.language as tl

from flightline.torch_engine.kernels.gpu.launch import (
    LAUNCH,
    begin_in_order,
    begin_kernel,
    cdiv,
    kernel,
    next_power_of_2,
)
from flightline.torch_engine.parallel.group import Alone


class Stacking(Protocol):
    """Ranks that put what they have side by side: a ``Group``, or an ``Exchange``."""

    size: int

    def stack(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` of each rank, in their order: [ranks, *x.shape]."""


@kernel()
def _embed_kernel(ids, slots, last, table, out, factor, N: tl.constexpr, BLOCK: tl.constexpr):
    begin_in_order()  # a step's inputs are there for all its kernels
    row = tl.program_id(0).to(tl.int64)
    token = tl.load(ids + row)
    if token < 0:
        token = tl.load(last + tl.load(slots + row))
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    values = tl.load(table + token.to(tl.int64) * N + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * N + columns, (values * factor).to(out.dtype.element_ty), mask=mask)


def embed(
    ids: torch.Tensor, slots: torch.Tensor, last: torch.Tensor, table: torch.Tensor, factor: float
) -> torch.Tensor:
    """Embeddings [T, N] of ``ids`` [T]; a negative id means the token last sampled for the row's slot."""
    size = table.shape[1]
    out = torch.empty(ids.shape[0], size, dtype=table.dtype, device=table.device)
    block = min(next_power_of_2(size), 1024)
    grid = (ids.shape[0], cdiv(size, block))
    _embed_kernel[grid](ids, slots, last, table, out, factor, size, block, **LAUNCH)
    return out


@kernel()
def _argmax_part_kernel(
    logits, column_scales, holds, ends, tops, places, FIRST, N: tl.constexpr, PARTS: tl.constexpr,
    EACH: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    begin_kernel()
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    goes_on = False
    if ENDS > 0:
        goes_on = tl.load(holds + row) != 0
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(part * EACH, part * EACH + EACH, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        mask = columns < N
        values = tl.load(logits + row * N + columns, mask=mask, other=float("-inf")).to(tl.float32)
        if SCALED:
            values *= tl.load(column_scales + columns, mask=mask, other=1.0)
        if goes_on:
            for number in tl.static_range(ENDS):
                values = tl.where(FIRST + columns == tl.load(ends + number), float("-inf"), values)
        place = tl.where(values > best, columns, place)
        best = tl.maximum(best, values)
    top = tl.max(best, 0)
    tl.store(tops + row * PARTS + part, top)
    tl.store(places + row * PARTS + part, FIRST + tl.min(tl.where(best == top, place, 2147483647 - FIRST), 0))


@kernel(do_not_specialize=["step"])
def _argmax_merge_kernel(
    tops, places, slots, last, tokens, step, RANKS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK)
    mask = part < RANKS * PARTS
    at = (part // PARTS) * step + row * PARTS + part % PARTS
    values = tl.load(tops + at, mask=mask, other=float("-inf"))
    place = tl.load(places + at, mask=mask, other=2147483647)
    top = tl.max(values, 0)
    token = tl.min(tl.where(values == top, place, 2147483647), 0)
    none = top == float("-inf")  # NaN is never the highest either
    tl.store(tokens + row, tl.where(none, -1, token))
    tl.store(last + tl.load(slots + row), tl.where(none, 0, token))


def argmax(
    logits: torch.Tensor,
    slots: torch.Tensor,
    last: torch.Tensor,
    tokens: torch.Tensor,
    column_scales: torch.Tensor | None = None,
    holds: torch.Tensor | None = None,
    ends: torch.Tensor | None = None,
    first: int = 0,
    group: Stacking | None = None,
) -> None:
    """Most likely token of each row of ``logits`` [R, N], the first of equals; none of ``ends`` where ``holds`` is set.

    ``holds`` is [R] int32, ``ends`` [E] int32; without one of them every token may be chosen. Writes the token to
    ``tokens`` [R] int32, -1 where no logit is finite, and to ``last[slots[row]]``, where :func:`embed` finds it.

    The logits are those of the tokens from ``first`` on; what each rank of ``group`` has of them is compared, and all
    write the same token.
    """
    rows, size = logits.shape
    group = group or Alone()
    block = 1024
    parts = max(4, min(64, next_power_of_2(cdiv(size, block))))
    each = cdiv(cdiv(size, parts), block) * block
    best = torch.empty(2, rows, parts, dtype=torch.float32, device=logits.device)
    places = best[1].view(torch.int32)
    scales = best if column_scales is None else column_scales
    _argmax_part_kernel[(rows, parts)](
        logits, scales, places if holds is None else holds, places if ends is None else ends, best[0], places, first,
        size, parts, each, block, column_scales is not None,
        0 if holds is None or ends is None else len(ends), **LAUNCH,
    )  # fmt: skip
    everyone = group.stack(best)  # bits: a place is not a number here
    _argmax_merge_kernel[(rows,)](
        everyone[0, 0], everyone[0, 1].view(torch.int32), slots, last, tokens, 2 * rows * parts,
        group.size, parts, next_power_of_2(group.size * parts), num_warps=1, **LAUNCH,
    )  # fmt: skip


@kernel()
def _remember_kernel(tokens, slots, last):
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    tl.store(last + tl.load(slots + row), tl.maximum(tl.load(tokens + row), 0))


def remember(tokens: torch.Tensor, slots: torch.Tensor, last: torch.Tensor) -> None:
    """Puts ``tokens`` [R], which another rank has chosen, where :func:`embed` finds them."""
    _remember_kernel[(tokens.shape[0],)](tokens, slots, last, num_warps=1, **LAUNCH)
