"""Triton-language kernels of the CUDA path; each runs on a CPU too, under ``TRITON_INTERPRET=1``.

Shapes: T rows (tokens of a step), H query heads, V key/value heads, G = H / V, D head size. The KV cache
of a layer is [blocks, 2, V, block_size, D], so that one head's keys of a block are one contiguous piece.
A sequence is named by its slot, a row of the block tables [slots, width]; lengths, slots and tables are
read from device memory, so that every launch may live in a CUDA graph.

A linear may leave its result as partial sums [S, T, N] in float32, see :func:`skinny_linear`: whoever reads it adds
them up. ``form`` says in which form an activation is written for the linear that reads it: see :class:`Form`.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from enum import IntEnum

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OVERLAPS = not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
"""Whether a kernel may start while the one before it ends (programmatic dependent launch, CUDA's guide §"PDL")."""
LAUNCH = {"launch_pdl": True} if OVERLAPS else {}
HEADS_A_PROGRAM = 8


class Form(IntEnum):
    """How a kernel writes its result."""

    PLAIN = 0
    FP8_STATIC = 1
    """e4m3 codes; one scale, known beforehand."""
    INT8_TOKEN = 2
    """int8 codes and a scale for each row."""
    FP8_TOKEN = 3
    """e4m3 codes and a scale for each row."""


@dataclass
class Activation:
    """Input of a linear layer: values [T, N] in the form it reads."""

    values: torch.Tensor
    scales: torch.Tensor | None = None
    """[T] float32, of the forms that have a scale for each row."""


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


@dataclass
class AttentionInput:
    """Where the rows of a step belong; all int32 on the device."""

    slots: torch.Tensor
    """[T]: the sequence of each row."""
    positions: torch.Tensor
    """[T]: its position in the sequence."""
    tables: torch.Tensor
    """[slots, width]: blocks of each sequence."""
    num_decodes: int
    """The first rows, one of each sequence."""
    tiles: torch.Tensor | None
    """[tiles, 4]: first row, rows, first position, slot, of pieces of the prompt chunks that follow."""
    longest: int = 0
    """Tokens, with those before the chunk, of the longest prompt."""


_FP8_MAX = tl.constexpr(448.0)
_INTERPRETED = tl.constexpr(INTERPRETED)
_OVERLAPS = tl.constexpr(OVERLAPS)


@triton.jit
def _begin():
    """Waits until the kernels before this one have ended, then lets the next one of the stream start its own wait.

    Every kernel calls it, or its two halves, before it reads or writes anything that another one writes.
    """
    if _OVERLAPS:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def _fp8(values):
    """Float32 within ±448, about to be stored as e4m3: the interpreter does not round, so that is done for it."""
    values = tl.clamp(values, -_FP8_MAX, _FP8_MAX)
    if _INTERPRETED:
        exponent = tl.maximum(tl.floor(tl.log2(tl.maximum(tl.abs(values), 1e-9))), -6.0)
        grid = tl.exp2(exponent - 3.0)
        values = tl.floor(values / grid + 0.5) * grid
    return values


@triton.jit
def _emit(values, out, scales, in_scale, row, columns, mask, N: tl.constexpr, FORM: tl.constexpr):
    """Writes one row (or a part of it, in forms without a scale for each row) as the reading linear wants it."""
    target = out + row * N + columns
    if FORM == 0:
        tl.store(target, values.to(out.dtype.element_ty), mask=mask)
    elif FORM == 1:
        codes = _fp8(values / tl.load(in_scale))
        tl.store(target, codes.to(out.dtype.element_ty), mask=mask)
    else:
        limit = 127.0 if FORM == 2 else _FP8_MAX
        scale = tl.maximum(tl.max(tl.abs(values), 0), 1e-12) / limit
        codes = values / scale
        if FORM == 2:
            codes = tl.floor(codes + 0.5)
        else:
            codes = _fp8(codes)
        tl.store(target, codes.to(out.dtype.element_ty), mask=mask)
        tl.store(scales + row, scale)


@triton.jit
def _sum_parts(source, step, mask, PARTS: tl.constexpr):
    """Values of partial sums that lie ``step`` elements apart."""
    values = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        values += tl.load(source + part * step, mask=mask, other=0.0).to(tl.float32)
    return values


def _parts(x: torch.Tensor) -> tuple[int, int]:
    """How many partial sums ``x`` consists of, and how many elements apart they lie."""
    return (x.shape[0], x.stride(0)) if x.dim() == 3 else (1, 0)


@triton.jit
def _embed_kernel(ids, slots, last, table, out, factor, N: tl.constexpr, BLOCK: tl.constexpr):
    _begin()
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
    block = min(triton.next_power_of_2(size), 1024)
    grid = (ids.shape[0], triton.cdiv(size, block))
    _embed_kernel[grid](ids, slots, last, table, out, factor, size, block, **LAUNCH)
    return out


@triton.jit(do_not_specialize=["step"])
def _add_norm_kernel(
    x, delta, step, post, weight, out, scales, in_scale, eps,
    N: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, HAS_POST: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    _begin()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    h = tl.load(x + row * N + columns, mask=mask, other=0.0).to(tl.float32)
    if PARTS > 0:
        d = _sum_parts(delta + row * N + columns, step, mask, PARTS)
        if HAS_POST:
            d = d * tl.rsqrt(tl.sum(d * d, 0) / N + eps)
            d *= tl.load(post + columns, mask=mask, other=0.0).to(tl.float32)
        rounded = (h + d).to(x.dtype.element_ty)
        tl.store(x + row * N + columns, rounded, mask=mask)
        h = rounded.to(tl.float32)
    h = h * tl.rsqrt(tl.sum(h * h, 0) / N + eps)
    h *= tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    _emit(h, out, scales, in_scale, row, columns, mask, N, FORM)


def add_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    post: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    form: Form = Form.PLAIN,
    in_scale: torch.Tensor | None = None,
) -> Activation:
    """``x += norm(delta, post)`` in place (``delta`` itself without ``post``), then the norm of ``x`` [T, N].

    ``delta`` is [T, N] or partial sums.
    """
    rows, size = x.shape
    out, scales = _output(rows, size, form, x)
    block = triton.next_power_of_2(size)
    parts, step = (0, 0) if delta is None else _parts(delta)
    _add_norm_kernel[(rows,)](
        x, x if delta is None else delta, step, weight if post is None else post, weight,
        out, scales, out if in_scale is None else in_scale, eps,
        size, block, parts, post is not None, int(form), num_warps=_warps(block, parts), **LAUNCH,
    )  # fmt: skip
    return Activation(out, scales)


@triton.jit(do_not_specialize=["step"])
def _gate_kernel(
    gate_up, step, out, scales, in_scale,
    N: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, SILU: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    _begin()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    gate = _sum_parts(gate_up + row * 2 * N + columns, step, mask, PARTS)
    up = _sum_parts(gate_up + row * 2 * N + N + columns, step, mask, PARTS)
    if SILU:
        gate = gate * tl.sigmoid(gate)
    else:  # x * (1 + tanh(u)) / 2 = x * sigmoid(2 u)
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    _emit(gate * up, out, scales, in_scale, row, columns, mask, N, FORM)


def gate(
    gate_up: torch.Tensor,
    activation: str,
    dtype: torch.dtype,
    form: Form = Form.PLAIN,
    in_scale: torch.Tensor | None = None,
) -> Activation:
    """``[T, 2 N] -> [T, N]``: activation (``silu`` or ``gelu_tanh``) of the first half times the second.

    ``gate_up`` may be partial sums; ``dtype`` is that of the plain form.
    """
    rows, size = gate_up.shape[-2], gate_up.shape[-1] // 2
    out, scales = _output(rows, size, form, gate_up, dtype)
    parts, step = _parts(gate_up)
    block = triton.next_power_of_2(size)
    if scales is None:
        block = min(block, 1024)
    grid = (rows, triton.cdiv(size, block))
    _gate_kernel[grid](
        gate_up, step, out, scales, out if in_scale is None else in_scale,
        size, block, parts, activation == "silu", int(form), num_warps=_warps(block), **LAUNCH,
    )  # fmt: skip
    return Activation(out, scales)


@triton.jit
def _quantise_kernel(
    x, out, scales, in_scale, N: tl.constexpr, BLOCK: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    _begin()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    values = tl.load(x + row * N + columns, mask=mask, other=0.0).to(tl.float32)
    _emit(values, out, scales, in_scale, row, columns, mask, N, FORM)


def quantise(x: torch.Tensor, form: Form, in_scale: torch.Tensor | None = None) -> Activation:
    """``x`` [T, N], contiguous, in another form."""
    rows, size = x.shape
    out, scales = _output(rows, size, form, x)
    block = triton.next_power_of_2(size)
    _quantise_kernel[(rows,)](
        x, out, scales, out if in_scale is None else in_scale, size, block, int(form),
        num_warps=_warps(block), **LAUNCH,
    )  # fmt: skip
    return Activation(out, scales)


@triton.jit
def _dequantise_kernel(
    sums, scales, weight_scales, bias, out, N: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr
):
    _begin()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    values = tl.load(sums + row * N + columns, mask=mask, other=0).to(tl.float32)
    values *= tl.load(scales + row) * tl.load(weight_scales + columns, mask=mask, other=0.0)
    if BIASED:
        values += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * N + columns, values.to(out.dtype.element_ty), mask=mask)


def dequantise(
    sums: torch.Tensor,
    scales: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Sums of an int8 product times the scales of its rows [T] and columns [N], plus ``bias``: [T, N]."""
    rows, size = scales.shape[0], sums.shape[1]
    out = torch.empty(rows, size, dtype=dtype, device=sums.device)
    block = min(triton.next_power_of_2(size), 1024)
    _dequantise_kernel[(rows, triton.cdiv(size, block))](
        sums,
        scales,
        weight_scales,
        out if bias is None else bias,
        out,
        size,
        block,
        bias is not None,
        **LAUNCH,
    )
    return out


@triton.jit(do_not_specialize=["step"])
def _rotate_write_kernel(
    qkv, step, out, q_norm, k_norm, rope, slots, positions, tables, width, values, scales, k_scale, v_scale, eps,
    H: tl.constexpr, V: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr, KV_INT8: tl.constexpr,
    KV_FP8: tl.constexpr,
):  # fmt: skip
    _begin()
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    d = tl.arange(0, HALF)
    inside = d < D // 2
    mask = (head < H + 2 * V)[:, None] & inside[None, :]
    at = row * (H + 2 * V) * D + head[:, None] * D + d[None, :]
    first = _sum_parts(qkv + at, step, mask, PARTS)
    second = _sum_parts(qkv + at + D // 2, step, mask, PARTS)
    rotates = (head < H + V)[:, None]
    if NORM:
        size = (tl.sum(first * first, 1) + tl.sum(second * second, 1)) / D
        factor = tl.rsqrt(size + eps)[:, None]
        is_q = (head < H)[:, None]
        q_first = tl.load(q_norm + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        k_first = tl.load(k_norm + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        q_second = tl.load(q_norm + D // 2 + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        k_second = tl.load(k_norm + D // 2 + d, mask=inside, other=0.0).to(tl.float32)[None, :]
        first = tl.where(rotates, first * factor * tl.where(is_q, q_first, k_first), first)
        second = tl.where(rotates, second * factor * tl.where(is_q, q_second, k_second), second)
    position = tl.load(positions + row)
    angle = rope + position.to(tl.int64) * D + d
    cos = tl.load(angle, mask=inside, other=0.0)[None, :]
    sin = tl.load(angle + D // 2, mask=inside, other=0.0)[None, :]
    turned_first = tl.where(rotates, first * cos - second * sin, first)
    turned_second = tl.where(rotates, second * cos + first * sin, second)
    is_q = mask & (head < H)[:, None]
    tl.store(out + at, turned_first.to(out.dtype.element_ty), mask=is_q)
    tl.store(out + at + D // 2, turned_second.to(out.dtype.element_ty), mask=is_q)

    slot = tl.load(slots + row).to(tl.int64)
    block = tl.load(tables + slot * width + position // BLOCK_SIZE).to(tl.int64)
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
        turned_first = _fp8(turned_first / unit)
        turned_second = _fp8(turned_second / unit)
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
) -> torch.Tensor:
    """Norms (if given) and rotates queries and keys of ``qkv`` [T, (H + 2 V) D]; writes the cache.

    Returns a tensor of that shape whose queries are rotated: ``qkv`` itself, or one in ``dtype`` if those were partial
    sums. ``rope`` [P, 2, D / 2] float32: cosines, sines.
    """
    _, _, kv_heads, block_size, size = cache.values.shape
    parts, apart = _parts(qkv)
    out = qkv if qkv.dim() == 2 else torch.empty(qkv.shape[1:], dtype=dtype, device=qkv.device)
    grid = (out.shape[0], triton.cdiv(num_heads + 2 * kv_heads, HEADS_A_PROGRAM))
    kind = cache.values.dtype
    _rotate_write_kernel[grid](
        qkv, apart, out, qkv if q_norm is None else q_norm, qkv if k_norm is None else k_norm, rope,
        step.slots, step.positions, step.tables, step.tables.shape[1],
        cache.values, cache.values if cache.scales is None else cache.scales, cache.k_scale, cache.v_scale, eps,
        num_heads, kv_heads, size, triton.next_power_of_2(size // 2), HEADS_A_PROGRAM,
        block_size, parts, q_norm is not None, kind == torch.int8, kind == torch.float8_e4m3fn, **LAUNCH,
    )  # fmt: skip
    return out


PREFETCH = 256
"""Bytes of each of its rows of the weight that a program asks for while the kernel before it still runs. Measured on an
H200 at one row: 256 bytes 376 tok/s, 512 360, 1024 351."""
SKINNY_ROWS = 16
"""Most rows of :func:`skinny_linear`."""


@dataclass(frozen=True)
class SkinnyPlan:
    """How the weight of a skinny product is cut up."""

    block_n: int
    block_k: int
    splits: int
    """Pieces of the inner dimension, each with a partial sum of its own: enough programs to fill the device."""
    warps: int
    stages: int


def skinny_plans(outputs: int, inputs: int, multiprocessors: int) -> list[SkinnyPlan]:
    """Plans worth timing for a weight [outputs, inputs]."""
    plans = []
    for block_n, block_k, warps, stages in (
        (16, 512, 4, 4), (32, 256, 4, 5), (64, 128, 4, 6), (64, 256, 4, 4), (128, 128, 4, 5),
    ):  # fmt: skip
        if outputs % block_n or inputs % block_k:
            continue
        for waves in (2, 4):
            splits = 1
            while splits < 8 and outputs // block_n * splits < waves * multiprocessors:
                splits *= 2
            plan = SkinnyPlan(block_n, block_k, splits, warps, stages)
            if inputs % (splits * block_k) == 0 and plan not in plans:
                plans.append(plan)
    return plans


@triton.jit
def _prefetch(rows, BYTES: tl.constexpr):
    """Brings the first bytes of each row [N, 1] (pointers to single bytes) into the L2."""
    if _OVERLAPS and BYTES >= 128:
        lines = rows + tl.arange(0, BYTES // 128)[None, :] * 128
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines.to(tl.int64)], dtype=tl.int32, is_pure=False,
            pack=1,
        )  # fmt: skip


@triton.jit(do_not_specialize=["rows"])
def _skinny_kernel(
    x, weight, x_scale, weight_scale, out, rows,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, PREFETCH: tl.constexpr,
):  # fmt: skip
    if _OVERLAPS:
        cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    EACH: tl.constexpr = K // SPLITS
    weights = weight + n.to(tl.int64)[:, None] * K + split * EACH + k[None, :]
    _prefetch(weight + n.to(tl.int64)[:, None] * K + split * EACH, PREFETCH)
    if _OVERLAPS:
        cuda.gdc_wait()
    inputs = x + m[:, None] * K + split * EACH + k[None, :]
    mask = (m < rows)[:, None]
    scale = tl.load(x_scale) * tl.load(weight_scale)
    if BLOCK_N >= 64:  # the weight as the tall operand: the tensor cores of Hopper want 64 rows
        tall = tl.zeros([BLOCK_N, ROWS], tl.float32)
        for start in range(0, EACH, BLOCK_K):
            a = tl.load(inputs + start, mask=mask, other=0.0)
            tall = tl.dot(tl.load(weights + start), tl.trans(a), tall)
        target = out + (split * rows + m)[None, :] * N + n[:, None]
        tl.store(target, tall * scale, mask=(m < rows)[None, :])
    else:
        flat = tl.zeros([ROWS, BLOCK_N], tl.float32)
        for start in range(0, EACH, BLOCK_K):
            a = tl.load(inputs + start, mask=mask, other=0.0)
            flat = tl.dot(a, tl.trans(tl.load(weights + start)), flat)
        target = out + (split * rows + m)[:, None] * N + n[None, :]
        tl.store(target, flat * scale, mask=mask)


def skinny_linear(
    x: torch.Tensor, weight: torch.Tensor, x_scale: torch.Tensor, weight_scale: torch.Tensor, plan: SkinnyPlan
) -> torch.Tensor:
    """``x`` [T <= 16, K] times ``weight`` [N, K], e4m3: partial sums [S, T, N] float32, in a fixed order.

    With few rows a product is bound by reading the weight once; splitting the inner dimension keeps all of the
    device reading, and the sums are added up by the kernel that reads them anyway.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    out = torch.empty(plan.splits, rows, outputs, dtype=torch.float32, device=x.device)
    _skinny_kernel[(outputs // plan.block_n, plan.splits)](
        x, weight, x_scale, weight_scale, out, rows,
        outputs, inputs, SKINNY_ROWS, plan.block_n, plan.block_k, plan.splits,
        min(PREFETCH, 2 ** ((inputs // plan.splits).bit_length() - 1)),
        num_warps=plan.warps, num_stages=plan.stages, **LAUNCH,
    )  # fmt: skip
    return out


_BYTES = "prmt.b32 t, $1, $1, 0x3120; "  # of two words: both low bytes, then both high bytes
_FROM_FP8 = (
    "{ .reg .b32 t; .reg .b16 low, high; " + _BYTES + "mov.b32 {low, high}, t; cvt.rn.f16x2.e4m3x2 $0, %s; }"
)
# The byte + 128 becomes the mantissa of 1024 + byte + 128, from which 1152 is taken.
_FROM_INT8 = (
    "{ .reg .b32 t, c; " + _BYTES + "xor.b32 t, t, 0x80808080; mov.b32 c, 0x64806480; "
    "prmt.b32 t, t, 0x64646464, %s; sub.f16x2 $0, t, c; }"
)
_EVEN_FP8, _ODD_FP8 = tl.constexpr(_FROM_FP8 % "low"), tl.constexpr(_FROM_FP8 % "high")
_EVEN_INT8, _ODD_INT8 = tl.constexpr(_FROM_INT8 % "0x4140"), tl.constexpr(_FROM_INT8 % "0x4342")


@triton.jit
def _pick(words, CODE: tl.constexpr):
    """One byte of each 16-bit word, an int8 or e4m3 code, as fp16; which one is in the PTX."""
    return tl.inline_asm_elementwise(CODE, "=r,r", [words], dtype=tl.float16, is_pure=True, pack=2)


@triton.jit
def _load_pairs(
    values, place, known, D: tl.constexpr, BLOCK_D: tl.constexpr, INT8: tl.constexpr, DOT: tl.constexpr
):
    """Even and odd dimensions of the 8-bit rows at ``place``: two of [BLOCK_N, BLOCK_D / 2].

    ``mma``'s product with the values wants them transposed. The loads of the tensor cores transpose 16-bit words but
    not bytes, which would be fetched one by one: so words of two codes travel and are taken apart in registers.
    """
    pair = tl.arange(0, BLOCK_D // 2)
    mask = known[:, None] & (pair < D // 2)[None, :]
    if _INTERPRETED:
        codes = values + place[:, None] * D + 2 * pair[None, :]
        even = tl.load(codes, mask=mask, other=0.0)
        odd = tl.load(codes + 1, mask=mask, other=0.0)
    else:
        words = values.to(tl.pointer_type(tl.int16)) + place[:, None] * (D // 2) + pair[None, :]
        words = tl.load(words, mask=mask, other=0)
        even = _pick(words, _EVEN_INT8 if INT8 else _EVEN_FP8)
        odd = _pick(words, _ODD_INT8 if INT8 else _ODD_FP8)
    return even.to(DOT), odd.to(DOT)


@triton.jit
def _attend(
    q, begin, end, positions, table, values, scales, head, scale, softcap,
    V: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, KV_INT8: tl.constexpr,
    PAIRS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Online softmax of ``q`` [ROWS, BLOCK_D] over keys ``begin:end``; a row sees keys up to its position.

    Returns the weighted sum of values (not normalised), the row maxima and the row sums.
    """
    d = tl.arange(0, BLOCK_D)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    if PAIRS:
        even = tl.zeros([ROWS, BLOCK_D // 2], tl.float32)
        odd = tl.zeros([ROWS, BLOCK_D // 2], tl.float32)
    else:
        out = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        known = n < end
        block = tl.load(table + n // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        place = (block * 2 * V + head) * BLOCK_SIZE + n % BLOCK_SIZE
        mask = known[:, None] & (d < D)[None, :]
        k = tl.load(values + place[:, None] * D + d[None, :], mask=mask, other=0.0).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if KV_INT8:
            scores *= tl.load(scales + place, mask=known, other=0.0)[None, :]
        if SOFTCAP:  # tanh(u) = 2 sigmoid(2 u) - 1
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        seen = known[None, :] & (n[None, :] <= positions[:, None])
        if WINDOW > 0:
            seen = seen & (n[None, :] > positions[:, None] - WINDOW)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
        p = tl.exp(scores - base[:, None])
        fade = tl.exp(top - base)
        total = total * fade + tl.sum(p, 1)
        place += V * BLOCK_SIZE
        if KV_INT8:
            p *= tl.load(scales + place, mask=known, other=0.0)[None, :]
        if PAIRS:
            v_even, v_odd = _load_pairs(values, place, known, D, BLOCK_D, KV_INT8, DOT)
            even = even * fade[:, None] + tl.dot(p.to(DOT), v_even, input_precision="ieee")
            odd = odd * fade[:, None] + tl.dot(p.to(DOT), v_odd, input_precision="ieee")
        else:
            v = tl.load(values + place[:, None] * D + d[None, :], mask=mask, other=0.0).to(DOT)
            out = out * fade[:, None] + tl.dot(p.to(DOT), v, input_precision="ieee")
        top = higher
    if PAIRS:
        out = tl.join(even, odd).reshape(ROWS, BLOCK_D)
    return out, top, total


@triton.jit
def _store_heads(out, in_scale, target, result, mask, FORM: tl.constexpr):
    if FORM == 1:
        result = _fp8(result / tl.load(in_scale))
    tl.store(out + target, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _span(length, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, WINDOW: tl.constexpr):
    """First key that a decode sees, and how many keys each split takes."""
    first = 0
    if WINDOW > 0:
        first = tl.maximum(length - WINDOW, 0)
    each = tl.cdiv(tl.cdiv(length - first, SPLITS), BLOCK_N) * BLOCK_N
    return first, each


@triton.jit
def _decode_kernel(
    qkv, slots, positions, tables, width, values, scales, out, in_scale, parts, sums, scale, v_scale, softcap,
    H: tl.constexpr, V: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, SPLITS: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, KV_INT8: tl.constexpr, PAIRS: tl.constexpr, DOT: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    _begin()
    row = tl.program_id(0).to(tl.int64)
    head, split = tl.program_id(1), tl.program_id(2)
    G: tl.constexpr = H // V
    position = tl.load(positions + row)
    length = position + 1
    first, each = _span(length, SPLITS, BLOCK_N, WINDOW)
    begin = first + split * each
    if begin < length:
        slot = tl.load(slots + row).to(tl.int64)
        g, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
        mask = (g < G)[:, None] & (d < D)[None, :]
        heads = (head * G + g)[:, None] * D + d[None, :]
        q = tl.load(qkv + row * (H + 2 * V) * D + heads, mask=mask, other=0.0).to(DOT)
        result, top, total = _attend(
            q, begin, tl.minimum(begin + each, length), position + g * 0, tables + slot * width,
            values, scales, head, scale, softcap,
            V, D, BLOCK_D, ROWS, BLOCK_N, BLOCK_SIZE, WINDOW, SOFTCAP, KV_INT8, PAIRS, DOT,
        )  # fmt: skip
        result = result / total[:, None] * v_scale
        if SPLITS == 1:
            _store_heads(out, in_scale, row * H * D + heads, result, mask, FORM)
        else:
            part = (row * H + head * G + g) * SPLITS + split
            tl.store(parts + part[:, None] * D + d[None, :], result, mask=mask)
            tl.store(sums + part, top + tl.log(total), mask=g < G)


@triton.jit
def _merge_kernel(
    positions, out, in_scale, parts, sums,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    WINDOW: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    _begin()
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(positions + row) + 1
    first, each = _span(length, SPLITS, BLOCK_N, WINDOW)
    split, d = tl.arange(0, SPLITS), tl.arange(0, BLOCK_D)
    used = first + split * each < length
    part = (row * H + head) * SPLITS + split
    logs = tl.load(sums + part, mask=used, other=float("-inf"))
    weights = tl.exp(logs - tl.max(logs, 0))
    mask = used[:, None] & (d < D)[None, :]
    values = tl.load(parts + part[:, None] * D + d[None, :], mask=mask, other=0.0)
    result = tl.sum(values * weights[:, None], 0) / tl.sum(weights, 0)
    _store_heads(out, in_scale, (row * H + head) * D + d, result, d < D, FORM)


@triton.jit
def _prefill_kernel(
    qkv, tiles, tables, width, values, scales, out, in_scale, scale, v_scale, softcap,
    H: tl.constexpr, V: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    KV_INT8: tl.constexpr, PAIRS: tl.constexpr, DOT: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    _begin()
    tile = tiles + tl.program_id(0) * 4
    head = tl.program_id(1)
    G: tl.constexpr = H // V
    start, count, first = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    slot = tl.load(tile + 3).to(tl.int64)
    r, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    token = r // G
    mask = (token < count)[:, None] & (d < D)[None, :]
    row = start + token
    heads = (head * G + r % G)[:, None] * D + d[None, :]
    q = tl.load(qkv + row[:, None] * (H + 2 * V) * D + heads, mask=mask, other=0.0).to(DOT)
    begin = 0
    if WINDOW > 0:
        begin = tl.maximum(first - WINDOW + 1, 0)
    result, _, total = _attend(
        q, begin, first + count, first + token, tables + slot * width,
        values, scales, head, scale, softcap,
        V, D, BLOCK_D, ROWS, BLOCK_N, BLOCK_SIZE, WINDOW, SOFTCAP, KV_INT8, PAIRS, DOT,
    )  # fmt: skip
    result = result / tl.where(total == 0.0, 1.0, total)[:, None] * v_scale
    _store_heads(out, in_scale, row[:, None] * H * D + heads, result, mask, FORM)


def prefill_rows(dtype: torch.dtype) -> int:
    """Query rows (tokens times heads of a group) of one tile."""
    return 32 if dtype == torch.float32 else 64


def tile_tokens(dtype: torch.dtype, group: int) -> int:
    """Tokens of one tile of :func:`attend`."""
    return prefill_rows(dtype) // group


@dataclass(frozen=True)
class DecodePlan:
    """How the decode attention is cut up."""

    splits: int
    """Pieces of a sequence's keys, each a program of its own."""
    block: int
    """Keys of one iteration."""
    warps: int


def decode_plan(rows: int, kv_heads: int, heads: int, size: int, multiprocessors: int) -> DecodePlan:
    """Programs of one warp when there are plenty of them (nothing to synchronise: an H200 then reads 75 to 90 % of
    what its memory can); wider ones, and the keys split, when the device would not be full otherwise.

    ``heads`` is the query heads of a key/value head, of ``size`` dimensions.
    """
    programs = rows * kv_heads
    splits = max(splits for splits in (1, 4, 16, 64) if splits <= max(4 * multiprocessors // programs, 1))
    accumulators = max(16, triton.next_power_of_2(heads)) * triton.next_power_of_2(size)
    least = triton.next_power_of_2(triton.cdiv(accumulators, 2048))
    if splits > 1:
        return DecodePlan(splits, 64, max(2, least))
    if programs < 8 * multiprocessors:
        return DecodePlan(1, 128 if size <= 128 else 64, max(4, least))
    return DecodePlan(1, 32, least)


def attend(
    qkv: torch.Tensor,
    cache: KVCache,
    step: AttentionInput,
    num_heads: int,
    scale: float,
    window: int | None,
    softcap: float | None,
    plan: DecodePlan,
    form: Form = Form.PLAIN,
    in_scale: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention of rotated queries in ``qkv`` [T, (H + 2 V) D] to the cache: [T, H D], plain or e4m3."""
    _, _, kv_heads, block_size, size = cache.values.shape
    rows, group = qkv.shape[0], num_heads // kv_heads
    out, _ = _output(rows, num_heads * size, form, qkv)
    in_scale = out if in_scale is None else in_scale
    scales = cache.values if cache.scales is None else cache.scales
    dot = _dot_type(qkv.dtype, cache.values.dtype)
    block_d = max(32, triton.next_power_of_2(size))
    shared = {
        "BLOCK_SIZE": block_size, "WINDOW": window or 0, "SOFTCAP": softcap is not None,
        "KV_INT8": cache.scales is not None, "DOT": dot, "FORM": int(form),
    }  # fmt: skip
    softcap = softcap or 1.0
    decodes, splits = step.num_decodes, plan.splits
    if decodes:
        parts, sums = out, out
        if splits > 1:
            parts = torch.empty(decodes, num_heads, splits, size, dtype=torch.float32, device=qkv.device)
            sums = torch.empty(decodes, num_heads, splits, dtype=torch.float32, device=qkv.device)
        _decode_kernel[(decodes, kv_heads, splits)](
            qkv, step.slots, step.positions, step.tables, step.tables.shape[1], cache.values, scales,
            out, in_scale, parts, sums, scale * cache.k_scale, cache.v_scale, softcap,
            num_heads, kv_heads, size, block_d, max(16, triton.next_power_of_2(group)), plan.block,
            SPLITS=splits, PAIRS=cache.values.element_size() == 1, **shared,
            num_warps=plan.warps, num_stages=3, **LAUNCH,
        )  # fmt: skip
        if splits > 1:
            _merge_kernel[(decodes, num_heads)](
                step.positions, out, in_scale, parts, sums, num_heads, size, block_d, plan.block,
                splits, window or 0, int(form), **LAUNCH,
            )  # fmt: skip
    if step.tiles is not None:
        block = 128 if step.longest > 256 else 32  # of 32, 64 and 128 keys the fastest on an H200
        if qkv.dtype == torch.float32 or block_d > 128:
            block = 32
        _prefill_kernel[(step.tiles.shape[0], kv_heads)](
            qkv, step.tiles, step.tables, step.tables.shape[1], cache.values, scales,
            out, in_scale, scale * cache.k_scale, cache.v_scale, softcap,
            num_heads, kv_heads, size, block_d, prefill_rows(qkv.dtype), block,
            PAIRS=False, **shared, num_warps=4, num_stages=1, **LAUNCH,
        )  # fmt: skip
    return out


@triton.jit
def _argmax_part_kernel(
    logits, column_scales, holds, ends, tops, places, N: tl.constexpr, PARTS: tl.constexpr,
    EACH: tl.constexpr, BLOCK: tl.constexpr, SCALED: tl.constexpr, ENDS: tl.constexpr,
):  # fmt: skip
    _begin()
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
                values = tl.where(columns == tl.load(ends + number), float("-inf"), values)
        place = tl.where(values > best, columns, place)
        best = tl.maximum(best, values)
    top = tl.max(best, 0)
    tl.store(tops + row * PARTS + part, top)
    tl.store(places + row * PARTS + part, tl.min(tl.where(best == top, place, 2147483647), 0))


@triton.jit
def _argmax_merge_kernel(tops, places, slots, last, tokens, PARTS: tl.constexpr):
    _begin()
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    values = tl.load(tops + row * PARTS + part)
    place = tl.load(places + row * PARTS + part)
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
) -> None:
    """Most likely token of each row of ``logits`` [R, N], the first of equals; none of ``ends`` where ``holds`` is set.

    ``holds`` is [R] int32, ``ends`` [E] int32; without one of them every token may be chosen. Writes the token to
    ``tokens`` [R] int32, -1 where no logit is finite, and to ``last[slots[row]]``, where :func:`embed` finds it.
    """
    rows, size = logits.shape
    block = 1024
    parts = max(4, min(64, triton.next_power_of_2(triton.cdiv(size, block))))
    each = triton.cdiv(triton.cdiv(size, parts), block) * block
    tops = torch.empty(rows, parts, dtype=torch.float32, device=logits.device)
    places = torch.empty(rows, parts, dtype=torch.int32, device=logits.device)
    scales = tops if column_scales is None else column_scales
    _argmax_part_kernel[(rows, parts)](
        logits, scales, places if holds is None else holds, places if ends is None else ends, tops, places,
        size, parts, each, block, column_scales is not None,
        0 if holds is None or ends is None else len(ends), **LAUNCH,
    )  # fmt: skip
    _argmax_merge_kernel[(rows,)](tops, places, slots, last, tokens, parts, num_warps=1, **LAUNCH)


@triton.jit(do_not_specialize=["count"])
def _scatter_kernel(target, updates, count, BLOCK: tl.constexpr):
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = n < count
    tl.store(target + tl.load(updates + n, mask=mask), tl.load(updates + count + n, mask=mask), mask=mask)


def scatter(target: torch.Tensor, updates: torch.Tensor) -> None:
    """``target.view(-1)[updates[0]] = updates[1]``; ``updates`` [2, count] int32."""
    count = updates.shape[1]
    _scatter_kernel[(triton.cdiv(count, 256),)](target, updates, count, 256)


def _output(
    rows: int, size: int, form: Form, like: torch.Tensor, plain: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dtype = {
        Form.PLAIN: plain or like.dtype, Form.FP8_STATIC: torch.float8_e4m3fn,
        Form.INT8_TOKEN: torch.int8, Form.FP8_TOKEN: torch.float8_e4m3fn,
    }[form]  # fmt: skip
    scales = None
    if form in (Form.INT8_TOKEN, Form.FP8_TOKEN):
        scales = torch.empty(rows, dtype=torch.float32, device=like.device)
    return torch.empty(rows, size, dtype=dtype, device=like.device), scales


def _warps(block: int, parts: int = 1) -> int:
    """Of a program that reads a row; sums of many parts wait for memory, which more threads hide better."""
    return min(32, max(1, block // (512 if parts == 1 else 128)))


def _dot_type(dtype: torch.dtype, cache: torch.dtype) -> tl.dtype:
    """Operands of the products: fp16 holds 8-bit codes exactly. The interpreter cannot multiply bf16."""
    if INTERPRETED or dtype == torch.float32:
        return tl.float32
    if cache in (torch.int8, torch.float8_e4m3fn) or dtype == torch.float16:
        return tl.float16
    return tl.bfloat16
