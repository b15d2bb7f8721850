"""Attention of long prompts over keys and values that are first laid side by side, in the form of the products.

A cache block holds 16 tokens: each iteration of a prompt's attention looks its blocks up, and turns 8-bit codes into
the operands of the tensor cores, for every tile of the prompt again. Here both happen once a layer and step; then whole
tiles of keys come by the device's copy engine (tensor descriptors), and nothing is converted between two products.
It costs the scratch memory, and a pass over the context, which pays where many tokens attend to it.

Of a cache in FP8 keys stay as they are, and queries become FP8 too, with a scale for each head of a token: their
product has twice the rate then. It makes the error that the keys' rounding leaves in a score 1.4 times as large.
Weights and values are multiplied in fp16, or in FP8 as well (``turned`` scratch memory), as vLLM does:

* e4m3 holds 2 ** -9 to 448, so weights are 2 ** 8 times as large there; those below 2 ** -18 of the largest are lost.
* The tensor cores add products of FP8 to what they have with some 14 bits; the sum over all keys is kept in float32
  beside them.
* They want values in the order of keys, not of dimensions, so values are turned round when they are gathered. And they
  want four neighbouring keys of a row in a thread, where the product before leaves two of them in one and two in the
  next; so keys change places within each 16, alike for weights and values (:func:`_order`): no thread asks another.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from flightline.torch_engine.kernels.gpu.activation import FP8_MAX, Form, known_scale, to_fp8
from flightline.torch_engine.kernels.gpu.attention import (
    LOG2_E,
    PrefillPlan,
    add_sink,
    dot_type,
    store_heads,
    weigh,
)
from flightline.torch_engine.kernels.gpu.kv_cache import AttentionInput, KVCache
from flightline.torch_engine.kernels.gpu.launch import (
    INTERPRETED,
    LAUNCH,
    OVERLAPS,
    WAITS_LATER,
    begin_kernel,
    cdiv,
    kernel,
)

_INTERPRETED = tl.constexpr(INTERPRETED)
ALIGNED = 128
"""Each prompt's keys start at a multiple of it in the scratch memory, and are filled up with zeros."""
LEAST_TOKENS = 256
"""Of a step's prompts: laying their context out takes as long as about 50 tokens' attention to it, and saves a third of
all tokens'."""
LEAST_PAIRS = 6_000_000
"""Of a step that a CUDA graph could run: tokens times those that they see. The attention of so many takes 5 ms less on
an H200 with an 8B model, about what the host needs longer than the device where it launches each kernel by itself."""
LONGEST_BESIDE = 16_000
"""Keys of a prompt from which on any of its chunks is worth it, in a step of a graph, too: each tile meets them block
after block. The last 48 tokens of 30,000 took 56 ms."""
MOST_KEYS = 131_072
"""In the scratch memory."""
MOST_SHARE = 0.01
"""Of the device's memory that it may have."""
STEPS = 2
"""Whole steps of prompts that it has room for besides the longest prompt, of which a step may have the end."""
FETCHES = INTERPRETED or OVERLAPS
"""Whether the device has the copy engine: both came with Hopper."""
LIFT = tl.constexpr(8)
"""Of weights in FP8: their largest is 2 ** 8."""
SIZES = (64, 128, 256)
"""Of heads whose rows a tensor descriptor can fetch."""


def padded(keys: int) -> int:
    """Room in the scratch memory."""
    return -(-keys // ALIGNED) * ALIGNED


@dataclass(frozen=True)
class GatheredScratch:
    """Keys and values of one layer, all layers' after each other: each [V, keys, D], values [V, D, keys] if turned."""

    keys: torch.Tensor
    values: torch.Tensor

    @property
    def room(self) -> int:
        """Keys that there is room for."""
        return self.keys.shape[1]

    @property
    def turned(self) -> bool:
        """Whether values are FP8 in the order of keys."""
        return self.values.dtype == torch.float8_e4m3fn

    @classmethod
    def new(cls, cache: KVCache, dtype: torch.dtype, keys: int, turned: bool = False) -> GatheredScratch:
        """For prompts of ``keys`` tokens together, or fewer where the device is small, of a model in ``dtype``.

        ``turned`` is for a cache in FP8.
        """
        _, _, kv_heads, _, size = cache.values.shape
        device = cache.values.device
        kind = torch.float32 if INTERPRETED else dtype if cache.values.element_size() > 1 else torch.float16
        fp8 = cache.values.dtype == torch.float8_e4m3fn
        of_keys = torch.float8_e4m3fn if fp8 else kind
        keys = min(keys, MOST_KEYS)
        if device.type == "cuda":
            most = MOST_SHARE * torch.cuda.get_device_properties(device).total_memory
            keys = min(keys, int(most) // (kv_heads * size * (kind.itemsize + of_keys.itemsize)))
        shape = (kv_heads, padded(keys), size)
        of_values = torch.float8_e4m3fn if turned else kind
        values = torch.empty(kv_heads * padded(keys) * size, dtype=of_values, device=device)
        return cls(
            torch.empty(shape, dtype=of_keys, device=device),
            values.view(kv_heads, size, -1) if turned else values.view(shape),
        )


@dataclass(frozen=True)
class GatheredPlan:
    """How long prompts are computed over keys that lie side by side."""

    tile: PrefillPlan
    scratch: GatheredScratch
    ahead: bool = False
    """By ``gathered_ahead``."""

    @property
    def keys(self) -> int:
        return self.scratch.room

    @property
    def fp8(self) -> bool:
        """Whether scores are products of FP8."""
        return self.scratch.keys.dtype == torch.float8_e4m3fn

    def __str__(self) -> str:
        both = ", scores and weights in FP8" if self.scratch.turned else ", scores in FP8" if self.fp8 else ""
        return f"{self.tile}{', scores ahead' if self.ahead else ''}{both}"


@triton.jit
def _order(j):
    """Which key of each 16 is the ``j``-th for the product of weights and values."""
    return (j & -16) | ((j >> 1) & 1) << 3 | ((j >> 2) & 3) << 1 | (j & 1)


@triton.jit
def _ordered(p, ROWS: tl.constexpr, BLOCK_N: tl.constexpr):
    """Columns as :func:`_order` has them: a thread's are the same ones."""
    p = tl.reshape(p, (ROWS, BLOCK_N // 16, 2, 4, 2))
    return tl.reshape(tl.permute(p, (0, 1, 3, 2, 4)), (ROWS, BLOCK_N))


@kernel()
def _gather_kernel(
    tables, width, spans, cache, scales, keys_out, values_out, room,
    V: tl.constexpr, D: tl.constexpr, BLOCK_SIZE: tl.constexpr, KEYS: tl.constexpr, KV_INT8: tl.constexpr,
    TURNED: tl.constexpr,
):  # fmt: skip
    begin_kernel()
    first, head = tl.program_id(0) * KEYS, tl.program_id(1)
    span = spans + tl.program_id(2) * 4
    slot, keys, offset = tl.load(span).to(tl.int64), tl.load(span + 1), tl.load(span + 2)
    if first < keys:
        j, d = tl.arange(0, KEYS), tl.arange(0, D)
        for part in tl.static_range(2):
            n = first + (_order(j) if TURNED and part == 1 else j)
            known = n < keys
            block = tl.load(tables + slot * width + n // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
            row = ((block * 2 + part) * V + head) * BLOCK_SIZE + n % BLOCK_SIZE
            codes = tl.load(cache + row[:, None] * D + d[None, :], mask=known[:, None], other=0.0)
            if KV_INT8:
                codes = codes.to(tl.float32) * tl.load(scales + row, mask=known, other=0.0)[:, None]
            out = keys_out if part == 0 else values_out
            if TURNED and part == 1:
                target = (head * D + d).to(tl.int64)[None, :] * room + offset + first + j[:, None]
            else:
                target = (head * room + offset + first + j).to(tl.int64)[:, None] * D + d[None, :]
            tl.store(out + target, codes.to(out.dtype.element_ty))


@triton.jit
def _to_fp8(q):
    """[rows, D] as e4m3, and the scale of each row, as far as the range goes."""
    q = q.to(tl.float32)
    unit = tl.maximum(tl.max(tl.abs(q), 1), 1e-30) / FP8_MAX
    q = to_fp8(q / unit[:, None])
    return (q if _INTERPRETED else q.to(tl.float8e4nv)), unit


@triton.jit
def _advance(
    q, out, top, total, begin, end, last, positions, head, place, room, keys, values, scale, softcap,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_N: tl.constexpr, SOFTCAP: tl.constexpr, FP8: tl.constexpr,
    TURNED: tl.constexpr, LATER: tl.constexpr, STAGES: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """As ``attention.meet``, over keys of ``head`` that start at ``place``; ``last`` is the end of those that there
    are, and ``scale`` [rows] belongs to the queries. ``LATER``: what weights and values give is added when the next
    scores are asked for, so that the tensor cores have both to do; that takes registers."""
    part, faded = tl.zeros_like(out), tl.full(top.shape, 1.0, tl.float32)
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        k = keys.load([head * room + place + start, 0])
        if TURNED:
            v = values.load([head * D, place + start])
        else:
            v = values.load([head * room + place + start, 0])
        if FP8 and _INTERPRETED:  # it cannot multiply FP8
            k = k.to(tl.float32)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if LATER:
            out = out * faded[:, None] + part
        n = start + tl.arange(0, BLOCK_N)
        seen = n < last
        if MASKED:
            seen = seen[None, :] & (n[None, :] <= positions[:, None])
        p, fade, top, total = weigh(
            scores, seen, top, total, scale, softcap, SOFTCAP, MASKED, LIFT if TURNED else 0
        )
        if TURNED:
            p = _ordered(p, ROWS, BLOCK_N)  # at most 2 ** LIFT: no clamp
            if _INTERPRETED:
                p, v = to_fp8(p), v.to(tl.float32)
            v = tl.trans(v)
        if LATER:
            part, faded = tl.dot(p.to(v.dtype), v, input_precision="ieee"), fade
        else:
            out = out * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
    if LATER:
        out = out * faded[:, None] + part
    return out, top, total


@kernel()
def _gathered_kernel(
    qkv, tiles, offsets, keys, values, room, sinks, out, in_scale, scale, v_scale, softcap,
    H: tl.constexpr, V: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, FP8: tl.constexpr, TURNED: tl.constexpr, LATER: tl.constexpr,
    DOT: tl.constexpr, FORM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    begin_kernel()
    tile = tiles + tl.program_id(0) * 4
    head = tl.program_id(1)
    G: tl.constexpr = H // V
    start, count, first = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    place = tl.load(offsets + tl.load(tile + 3))
    r, d = tl.arange(0, ROWS), tl.arange(0, D)
    token = r // G
    mask = (token < count)[:, None]
    row = start + token
    heads = (head * G + r % G)[:, None] * D + d[None, :]
    q = tl.load(qkv + row[:, None] * (H + 2 * V) * D + heads, mask=mask, other=0.0)
    scales = tl.full([ROWS], 1.0, tl.float32) * scale
    if FP8:
        q, unit = _to_fp8(q)
        scales *= unit
    else:
        q = q.to(DOT)
    result = tl.zeros([ROWS, D], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    end = first + count
    edge = (first + 1) // BLOCK_N * BLOCK_N
    result, top, total = _advance(
        q, result, top, total, 0, edge, end, first + token, head, place, room, keys, values, scales, softcap,
        ROWS, D, BLOCK_N, SOFTCAP, FP8, TURNED, LATER, STAGES, False,
    )  # fmt: skip
    result, top, total = _advance(
        q, result, top, total, edge, end, end, first + token, head, place, room, keys, values, scales, softcap,
        ROWS, D, BLOCK_N, SOFTCAP, FP8, TURNED, LATER, STAGES, True,
    )  # fmt: skip
    if SINKS:  # rows of nobody have seen nothing
        sink = add_sink(sinks, head * G + r % G, tl.where(total == 0.0, 0.0, top / LOG2_E))
        total += sink * 2**LIFT if TURNED else sink
    result = result / tl.where(total == 0.0, 1.0, total)[:, None] * v_scale
    store_heads(out, known_scale(in_scale, FORM), row[:, None] * H * D + heads, result, mask, FORM)


def gather(cache: KVCache, step: AttentionInput, scratch: GatheredScratch) -> None:
    """Lays the keys and values of the step's ``spans`` side by side."""
    assert step.spans is not None
    _, _, kv_heads, block_size, size = cache.values.shape
    grid = (cdiv(step.longest, ALIGNED), kv_heads, len(step.spans))
    _gather_kernel[grid](
        step.tables, step.tables.stride(0), step.spans, cache.values,
        cache.values if cache.scales is None else cache.scales, scratch.keys, scratch.values, scratch.room,
        kv_heads, size, block_size, ALIGNED, cache.scales is not None, scratch.turned, num_warps=8, **LAUNCH,
    )  # fmt: skip


def attend_gathered(
    qkv: torch.Tensor,
    cache: KVCache,
    step: AttentionInput,
    num_heads: int,
    scale: float,
    softcap: float | None,
    plan: GatheredPlan,
    out: torch.Tensor,
    form: Form = Form.PLAIN,
    in_scale: torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
) -> None:
    """Attention of the step's tiles, without a window, into the rows of ``out`` [T, H D] that they have; the rest as of
    ``attention.attend``."""
    assert step.tiles is not None and step.offsets is not None
    scratch, tile = plan.scratch, plan.tile
    gather(cache, step, scratch)
    if plan.ahead:
        from flightline.torch_engine.kernels.gpu.gathered_ahead import attend_ahead

        assert softcap is None and sinks is None
        sizes = (tile.rows, tile.block, tile.stages, tile.warps)
        attend_ahead(
            qkv, cache, step, num_heads, scale, scratch.keys, scratch.values, *sizes, out, form, in_scale
        )
        return
    kv_heads, room, size = scratch.keys.shape
    rows, turned = [kv_heads * room, size], [kv_heads * size, room]
    keys = TensorDescriptor(scratch.keys, rows, [size, 1], [tile.block, size])
    if scratch.turned:
        values = TensorDescriptor(scratch.values, turned, [room, 1], [size, tile.block])
    else:
        values = TensorDescriptor(scratch.values, rows, [size, 1], [tile.block, size])
    _gathered_kernel[(step.tiles.shape[0], kv_heads)](
        qkv, step.tiles, step.offsets, keys, values, room, out if sinks is None else sinks,
        out, out if in_scale is None else in_scale,
        scale * cache.k_scale, cache.v_scale, softcap or 1.0,
        num_heads, kv_heads, size, tile.rows, tile.block, softcap is not None, sinks is not None,
        plan.fp8, scratch.turned, scratch.turned and not tile.registers,
        dot_type(qkv.dtype, cache.values.dtype), int(form), tile.stages,
        **tile.launch,
    )  # fmt: skip


def ahead_plans(scratch: GatheredScratch, softcap: float | None, sinks: bool) -> list[GatheredPlan]:
    """Candidates of ``gathered_ahead``, on a device with Hopper's tensor cores."""
    fits = scratch.turned and scratch.keys.shape[2] == 128 and softcap is None and not sinks
    tiles = [PrefillPlan(64, 64, 4, 4), PrefillPlan(128, 64, 8, 4)] if fits and WAITS_LATER else []
    return [GatheredPlan(tile, scratch, ahead=True) for tile in tiles]


def gathered_plans(dtype: torch.dtype, size: int) -> list[PrefillPlan]:
    """Candidates; none where heads have another size, or products are of float32."""
    if size not in SIZES or (dtype == torch.float32 and not INTERPRETED):
        return []
    if size > 128:
        return [PrefillPlan(64, 64, 4, 2), PrefillPlan(128, 64, 8, 2)]
    return [  # one program on a multiprocessor, two that compute while others wait, and three
        PrefillPlan(128, 128, 8, 3), PrefillPlan(64, 128, 4, 2), PrefillPlan(64, 64, 4, 3),
        PrefillPlan(128, 64, 8, 3, registers=128), PrefillPlan(64, 64, 4, 2, registers=168),
    ]  # fmt: skip
