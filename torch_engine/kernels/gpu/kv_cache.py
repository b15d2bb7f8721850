"""The KV cache, and what is written to it: rotated keys, and values.

Shapes: T rows (tokens of a step), H query heads, V key/value heads, D head size. The cache of a layer is
[blocks, 2, V, block_size, D], so that one head's keys of a block are one contiguous piece. A sequence is named by its
slot, a row of the block tables [slots, width]; lengths, slots and tables are read from device memory, so that every
launch may live in a CUDA graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from flightline.torch_engine.kernels.gpu.activation import parts_of, sum_parts, to_fp8
from flightline.torch_engine.kernels.gpu.launch import LAUNCH, begin_kernel, cdiv, kernel, next_power_of_2

HEADS_A_PROGRAM = 8


@dataclass
class KVCache:
    """One layer's keys and values: bf16/fp16/fp32, e4m3, or int8 with a scale per token and head."""

    values: torch.Tensor
    """[blocks, 2, V, block_size, D]."""
    scales: torch.Tensor | None
    """[blocks, 2, V, block_size] float32; only of int8."""
    k_scale: float = 1.0
    """Of e4m3: a key is its code times this, as the checkpoint's calibration found it."""
    v_scale: float = 1.0

    @property
    def num_bytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.values, self.scales) if t is not None)


@dataclass(frozen=True)
class SharedPrefixes:
    """Keys that several decodes of a step share, and who computes them; all int32 on the device."""

    rows: torch.Tensor
    """[3, decodes]: keys that the row shares with others, whole blocks before its own token (0: none); the number of
    its first result; how many it has, a tile of rows apart."""
    members: torch.Tensor
    """[decodes]: the rows that share, group by group."""
    items: torch.Tensor
    """[items, 4]: first of ``members``, how many, first key, end of the keys; what a program computes for each head."""


@dataclass
class AttentionInput:
    """Where the rows of a step belong; all int32 on the device."""

    slots: torch.Tensor
    """[T]: the sequence of each row."""
    positions: torch.Tensor
    """[T]: its position in the sequence."""
    tables: torch.Tensor
    """[slots, width], or [slots, groups, width] where layers have tables of their own: blocks of each sequence."""
    num_decodes: int
    """The first rows, one of each sequence."""
    tiles: torch.Tensor | None
    """[tiles, 4]: first row, rows, first position, slot, of pieces of the prompt chunks that follow."""
    longest: int = 0
    """Tokens, with those before the chunk, of the longest prompt."""
    long: bool = False
    """The tiles are those of the plan for long prompts (``CudaKernels.long_prefill``)."""
    prefixes: SharedPrefixes | None = None
    """Of the decodes."""
    spans: torch.Tensor | None = None
    """[prompts, 4]: slot, keys, where these begin in the scratch memory, 0; the tiles' keys are laid there first
    (``gathered.py``). None: they are read where they are."""
    offsets: torch.Tensor | None = None
    """[slots]: where the keys of a slot with a span begin."""
    most: int = 0
    """Keys that a decode sees at most; 0: as many as a table has room for."""

    def __post_init__(self) -> None:
        self.shares: dict[Hashable, Any] = {}
        """What the attention's layers share (``attention.Shares``)."""

    def of(self, group: int) -> AttentionInput:
        """For layers of that group: with their tables alone."""
        if self.tables.dim() == 2:
            return self
        key = "group", group
        if key not in self.shares:
            self.shares[key] = own = dataclasses.replace(self, tables=self.tables[:, group])
            own.shares = self.shares
        found: AttentionInput = self.shares[key]
        return found


@triton.jit
def _row_means(
    qkv, step, QUERIES: tl.constexpr, KEYS: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr
):
    """Mean squares of all queries of a row, and of all its keys."""
    columns = tl.arange(0, BLOCK)
    values = sum_parts(qkv + columns, step, columns < QUERIES + KEYS, PARTS)
    queries = tl.sum(tl.where(columns < QUERIES, values * values, 0.0), 0) / QUERIES
    keys = tl.sum(tl.where(columns < QUERIES, 0.0, values * values), 0) / KEYS
    return queries, keys


@kernel(do_not_specialize=["step"])
def _row_means_kernel(
    qkv, step, means, RANKS: tl.constexpr, WIDTH: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
    BLOCK: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    queries, keys = _row_means(qkv + row * WIDTH, step, QUERIES, KEYS, BLOCK, PARTS)
    tl.store(means + 2 * row, queries / RANKS)
    tl.store(means + 2 * row + 1, keys / RANKS)


def row_means(qkv: torch.Tensor, num_heads: int, kv_heads: int, size: int, ranks: int) -> torch.Tensor:
    """Of ``qkv`` [T, (H + 2 V) D] of one of ``ranks``: mean squares of its queries and of its keys, [T, 2] float32.

    They are divided by ``ranks``, so that all ranks' together are those of the whole model's heads; also where several
    ranks have the same key head, since all have equally many.
    """
    rows, width = qkv.shape[-2:]
    means = torch.empty(rows, 2, dtype=torch.float32, device=qkv.device)
    parts, step = parts_of(qkv)
    together = (num_heads + kv_heads) * size
    _row_means_kernel[(rows,)](
        qkv, step, means, ranks, width, num_heads * size, kv_heads * size, next_power_of_2(together), parts,
        **LAUNCH,
    )  # fmt: skip
    return means


@kernel(do_not_specialize=["step"])
def _rotate_write_kernel(
    qkv, step, out, q_norm, k_norm, means, rope, slots, positions, tables, width, values, scales, k_scale, v_scale, eps,
    H: tl.constexpr, V: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, ROW: tl.constexpr, MEANS: tl.constexpr,
    KV_INT8: tl.constexpr, KV_FP8: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HALF)
    inside = d < D // 2
    # Where the row belongs and how it is turned was there before the kernel before started.
    position = tl.load(positions + row)
    angle = rope + position.to(tl.int64) * D + d
    cos = tl.load(angle, mask=inside, other=0.0)[None, :]
    sin = tl.load(angle + D // 2, mask=inside, other=0.0)[None, :]
    slot = tl.load(slots + row).to(tl.int64)
    block = tl.load(tables + slot * width + position // BLOCK_SIZE).to(tl.int64)
    begin_kernel()
    mask = (head < H + 2 * V)[:, None] & inside[None, :]
    at = row * (H + 2 * V) * D + head[:, None] * D + d[None, :]
    first = sum_parts(qkv + at, step, mask, PARTS)
    second = sum_parts(qkv + at + D // 2, step, mask, PARTS)
    rotates = (head < H + V)[:, None]
    if ROW > 0:
        if MEANS:
            q_mean, k_mean = tl.load(means + 2 * row), tl.load(means + 2 * row + 1)
        else:  # each program of a row adds up all of it, which is less than a pass of its own
            q_mean, k_mean = _row_means(qkv + row * (H + 2 * V) * D, step, H * D, V * D, ROW, PARTS)
        q_factor, k_factor = tl.rsqrt(q_mean + eps), tl.rsqrt(k_mean + eps)
        is_q = mask & (head < H)[:, None]
        is_k = mask & (head >= H)[:, None] & rotates
        q_weight = q_norm + head[:, None] * D + d[None, :]
        k_weight = k_norm + (head - H)[:, None] * D + d[None, :]
        q_first = q_factor * tl.load(q_weight, mask=is_q, other=0.0).to(tl.float32)
        k_first = k_factor * tl.load(k_weight, mask=is_k, other=0.0).to(tl.float32)
        q_second = q_factor * tl.load(q_weight + D // 2, mask=is_q, other=0.0).to(tl.float32)
        k_second = k_factor * tl.load(k_weight + D // 2, mask=is_k, other=0.0).to(tl.float32)
        first = tl.where(rotates, first * (q_first + k_first), first)
        second = tl.where(rotates, second * (q_second + k_second), second)
    elif NORM:
        size = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D
        factor = tl.rsqrt(size + eps)[:, None]
        is_q = (head < H)[:, None]
        q_first = tl.load(q_norm + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        k_first = tl.load(k_norm + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        q_second = tl.load(q_norm + D // 2 + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        k_second = tl.load(k_norm + D // 2 + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        first = tl.where(rotates, first * factor * tl.where(is_q, q_first, k_first), first)
        second = tl.where(rotates, second * factor * tl.where(is_q, q_second, k_second), second)
    turned_first = tl.where(rotates, first * cos - second * sin, first)
    turned_second = tl.where(rotates, second * cos + first * sin, second)
    is_q = mask & (head < H)[:, None]
    tl.store(out + at, turned_first.to(out.dtype.element_ty), mask=is_q)
    tl.store(out + at + D // 2, turned_second.to(out.dtype.element_ty), mask=is_q)

    # Key heads come before value heads in qkv and in the cache: one index counts both.
    place = (block * 2 * V + head - H) * BLOCK_SIZE + position % BLOCK_SIZE
    is_kv = mask & (head >= H)[:, None]
    if KV_INT8:
        amax = tl.maximum(tl.max(tl.abs(turned_first), 1), tl.max(tl.abs(turned_second), 1))
        scale = tl.maximum(amax, 1e-12) / 127.0
        tl.store(scales + place, scale, mask=(head >= H) & (head < H + 2 * V))
        turned_first = tl.floor(turned_first / scale[:, None] + 0.5)
        turned_second = tl.floor(turned_second / scale[:, None] + 0.5)
    if KV_FP8:
        unit = tl.where(rotates, k_scale, v_scale)
        turned_first = to_fp8(turned_first / unit)
        turned_second = to_fp8(turned_second / unit)
    target = values + place[:, None] * D + d[None, :]
    tl.store(target, turned_first.to(values.dtype.element_ty), mask=is_kv)
    tl.store(target + D // 2, turned_second.to(values.dtype.element_ty), mask=is_kv)


def rotate_write(
    qkv: torch.Tensor,
    cache: KVCache,
    step: AttentionInput,
    rope: torch.Tensor,
    num_heads: int,
    q_norm: torch.Tensor | None = None,
    k_norm: torch.Tensor | None = None,
    eps: float = 0.0,
    dtype: torch.dtype | None = None,
    norms_row: bool = False,
    means: torch.Tensor | None = None,
) -> torch.Tensor:
    """Norms (if given) and rotates queries and keys of ``qkv`` [T, (H + 2 V) D]; writes the cache.

    The norms are of each head (weights [D]), or with ``norms_row`` of all heads of a row (weights [H D] and [V D]);
    where other ranks have some of those, ``means`` are all ranks' :func:`row_means` together.

    Returns a tensor of that shape whose queries are rotated: ``qkv`` itself, or one in ``dtype`` if those were partial
    sums, or if every program reads what another one would write. ``rope`` [P, 2, D / 2] float32: cosines, sines.
    """
    _, _, kv_heads, block_size, size = cache.values.shape
    parts, apart = parts_of(qkv)
    if qkv.dim() == 2:
        out = torch.empty_like(qkv) if norms_row and means is None else qkv
    else:
        out = torch.empty(qkv.shape[1:], dtype=dtype, device=qkv.device)
    grid = (out.shape[0], cdiv(num_heads + 2 * kv_heads, HEADS_A_PROGRAM))
    kind = cache.values.dtype
    together = next_power_of_2((num_heads + kv_heads) * size) if norms_row else 0
    _rotate_write_kernel[grid](
        qkv, apart, out, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm,
        qkv if means is None else means, rope,
        step.slots, step.positions, step.tables, step.tables.stride(0),
        cache.values, cache.values if cache.scales is None else cache.scales, cache.k_scale, cache.v_scale, eps,
        num_heads, kv_heads, size, next_power_of_2(size // 2), HEADS_A_PROGRAM,
        block_size, parts, q_norm is not None, together, means is not None,
        kind == torch.int8, kind == torch.float8_e4m3fn, **LAUNCH,
    )  # fmt: skip
    return out


@kernel(do_not_specialize=["count"])
def _scatter_kernel(target, updates, count, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = n < count
    tl.store(target + tl.load(updates + n, mask=mask), tl.load(updates + count + n, mask=mask), mask=mask)


def scatter(target: torch.Tensor, updates: torch.Tensor) -> None:
    """``target.view(-1)[updates[0]] = updates[1]``; ``updates`` [2, count] int32."""
    count = updates.shape[1]
    _scatter_kernel[(cdiv(count, 256),)](target, updates, count, 256)
