"""Attention of long prompts over gathered keys in FP8 that computes while it weighs: Hopper only.

The plain kernel (``gathered.py``) computes scores, makes weights of them, and multiplies those with values. While a
warp makes weights, nobody computes for it: Triton's compiler waits at once for a product that its iteration reads.
Here, in Triton's lower language (Gluon), the scores of the next keys and what the weights before give are computed
meanwhile. Two tiles of keys make one iteration, at whose end nothing is under way: numbers that are still being
computed may not change places. Keys and values come by the copy engine, into rings in shared memory.

There is no interpreter for this language. On a GPU the results are compared with those of the usual kernel at load, as
all plans over gathered keys are, and in the tests.
"""

from __future__ import annotations

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from flightline.torch_engine.kernels.gpu import activation, gathered
from flightline.torch_engine.kernels.gpu.activation import Form
from flightline.torch_engine.kernels.gpu.hopper import barrier
from flightline.torch_engine.kernels.gpu.kv_cache import AttentionInput, KVCache
from flightline.torch_engine.kernels.gpu.launch import LAUNCH

SIZE = 128
"""Of the heads that it is for."""
_LIFT, _FP8_MAX = gl.constexpr(gathered.LIFT.value), gl.constexpr(activation.FP8_MAX.value)
_LOG2_E = gl.constexpr(1.4426950408889634)


@gluon.jit
def _fetch(desc, row, column, bars, ring, tile, count, STAGES: gl.constexpr):
    """Tile ``tile`` of ``count`` into its place in the ring; nothing beyond the last."""
    there = tile < count
    bar = bars.index(tile % STAGES)
    mbarrier.expect(bar, desc.block_type.nbytes, pred=there)
    tma.async_copy_global_to_shared(desc, [row, column], bar, ring.index(tile % STAGES), pred=there)


@gluon.jit
def _scores(q, ring, bars, tile, count, SCORES: gl.constexpr, STAGES: gl.constexpr):
    """Of tile ``tile``, being computed; of one beyond the last, whatever."""
    shape: gl.constexpr = [q.shape[0], ring.shape[1]]
    mbarrier.wait(bars.index(tile % STAGES), (tile // STAGES) & 1, pred=tile < count)
    k = ring.index(tile % STAGES).permute((1, 0))
    return warpgroup_mma(q, k, gl.zeros(shape, gl.float32, SCORES), use_acc=False, is_async=True)


@gluon.jit
def _part(p, ring, bars, tile, OUT: gl.constexpr, STAGES: gl.constexpr):
    """What the weights ``p`` and the values of tile ``tile`` give, being computed."""
    shape: gl.constexpr = [p.shape[0], ring.shape[1]]
    mbarrier.wait(bars.index(tile % STAGES), (tile // STAGES) & 1)
    v = ring.index(tile % STAGES).permute((1, 0))
    return warpgroup_mma(p, v, gl.zeros(shape, gl.float32, OUT), use_acc=False, is_async=True)


@gluon.jit
def _weigh(scores, first, last, positions, top, total, factor, OUT: gl.constexpr, MASKED: gl.constexpr):
    """As ``attention.weigh``: weights in FP8 as the left operand of the product with values, in the order of
    ``gathered._order``; then what is left of ``out`` beside them, and new maxima and sums."""
    SCORES: gl.constexpr = scores.type.layout
    ROWS: gl.constexpr = scores.shape[0]
    KEYS: gl.constexpr = scores.shape[1]
    if MASKED:
        n = first + gl.arange(0, KEYS, layout=gl.SliceLayout(0, SCORES))
        seen = (n < last)[None, :] & (n[None, :] <= positions[:, None])
        scores = gl.where(seen, scores, float("-inf"))
    higher = gl.maximum(top, gl.max(scores, 1) * factor)
    base = higher
    if MASKED:
        base = gl.where(higher == float("-inf"), 0.0, higher)
    fade = gl.exp2(top - base)
    p = gl.exp2(scores * factor[:, None] - (base - _LIFT)[:, None])
    total = total * fade + gl.sum(p, 1)
    p = p.reshape([ROWS, KEYS // 16, 2, 4, 2]).permute([0, 1, 3, 2, 4]).reshape([ROWS, KEYS])
    p = gl.convert_layout(p.to(gl.float8e4nv), gl.DotOperandLayout(0, OUT, 4))
    return p, gl.convert_layout(fade, gl.SliceLayout(1, OUT)), higher, total


@gluon.jit
def _ahead_kernel(
    qkv, tiles, offsets, keys, values, room, out, in_scale, scale, v_scale,
    H: gl.constexpr, V: gl.constexpr, D: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr,
    STATIC: gl.constexpr, STAGES: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    gdc_wait()
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_N, 32])
    OUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, D, 32])
    R: gl.constexpr = gl.SliceLayout(1, SCORES)
    B: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [num_warps, 1], [1, 0])
    G: gl.constexpr = H // V
    tile = tiles + gl.program_id(0) * 4
    head = gl.program_id(1)
    start, here, first = gl.load(tile).to(gl.int64), gl.load(tile + 1), gl.load(tile + 2)
    place = gl.load(offsets + gl.load(tile + 3))
    k_row, v_row = head * room + place, head * D
    end = first + here
    count = (end + BLOCK_N - 1) // BLOCK_N
    k_ring = gl.allocate_shared_memory(keys.dtype, [STAGES, BLOCK_N, D], keys.layout)
    v_ring = gl.allocate_shared_memory(values.dtype, [STAGES, D, BLOCK_N], values.layout)
    k_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    v_bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(k_bars.index(i), count=1)
        mbarrier.init(v_bars.index(i), count=1)
    fence_async_shared()
    barrier()
    for i in gl.static_range(STAGES):
        _fetch(keys, k_row + i * BLOCK_N, 0, k_bars, k_ring, i, count, STAGES)
        _fetch(values, v_row, place + i * BLOCK_N, v_bars, v_ring, i, count, STAGES)
    r = gl.arange(0, ROWS, layout=gl.SliceLayout(1, B))
    d = gl.arange(0, D, layout=gl.SliceLayout(0, B))
    row = start + r // G
    there = (r // G < here)[:, None]
    heads = (head * G + r % G)[:, None] * D + d[None, :]
    x = gl.load(qkv + row[:, None] * (H + 2 * V) * D + heads, mask=there, other=0.0).to(gl.float32)
    unit = gl.maximum(gl.max(gl.abs(x), 1), 1e-30) / _FP8_MAX
    x = gl.minimum(gl.maximum(x / unit[:, None], -_FP8_MAX), _FP8_MAX).to(gl.float8e4nv)
    layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, D], gl.float8e4nv)
    q = gl.allocate_shared_memory(gl.float8e4nv, [ROWS, D], layout, x)
    fence_async_shared()
    barrier()
    factor = gl.convert_layout(unit, R) * (scale * _LOG2_E)
    positions = first + gl.arange(0, ROWS, layout=R) // G
    result = gl.zeros([ROWS, D], gl.float32, OUT)
    top = gl.full([ROWS], float("-inf"), gl.float32, R)
    total = gl.zeros([ROWS], gl.float32, R)

    scores = _scores(q, k_ring, k_bars, 0, count, SCORES, STAGES)
    scores = warpgroup_mma_wait(0, deps=(scores,))
    pairs = (first + 1) // BLOCK_N // 2  # of tiles that all rows see whole
    for pair in range(0, pairs):
        t = 2 * pair
        second = _scores(q, k_ring, k_bars, t + 1, count, SCORES, STAGES)
        p, fade, top, total = _weigh(scores, 0, end, positions, top, total, factor, OUT, False)
        part = _part(p, v_ring, v_bars, t, OUT, STAGES)
        second = warpgroup_mma_wait(1, deps=(second,))
        third = _scores(q, k_ring, k_bars, t + 2, count, SCORES, STAGES)
        p, later, top, total = _weigh(second, 0, end, positions, top, total, factor, OUT, False)
        part = warpgroup_mma_wait(1, deps=(part,))
        result = result * fade[:, None] + part
        part = _part(p, v_ring, v_bars, t + 1, OUT, STAGES)
        scores, part = warpgroup_mma_wait(0, deps=(third, part))
        result = result * later[:, None] + part
        barrier()  # all warps have read these tiles
        for i in gl.static_range(2):
            ahead = t + i + STAGES
            _fetch(keys, k_row + ahead * BLOCK_N, 0, k_bars, k_ring, ahead, count, STAGES)
            _fetch(values, v_row, place + ahead * BLOCK_N, v_bars, v_ring, ahead, count, STAGES)
    for t in range(2 * pairs, count):
        following = _scores(q, k_ring, k_bars, t + 1, count, SCORES, STAGES)
        p, fade, top, total = _weigh(scores, t * BLOCK_N, end, positions, top, total, factor, OUT, True)
        part = _part(p, v_ring, v_bars, t, OUT, STAGES)
        scores, part = warpgroup_mma_wait(0, deps=(following, part))
        result = result * fade[:, None] + part
        barrier()
        ahead = t + STAGES
        _fetch(keys, k_row + ahead * BLOCK_N, 0, k_bars, k_ring, ahead, count, STAGES)
        _fetch(values, v_row, place + ahead * BLOCK_N, v_bars, v_ring, ahead, count, STAGES)

    sums = gl.convert_layout(total, gl.SliceLayout(1, OUT))
    result = result / gl.where(sums == 0.0, 1.0, sums)[:, None] * v_scale
    if STATIC:
        result = gl.minimum(gl.maximum(result / gl.load(in_scale), -_FP8_MAX), _FP8_MAX)
    result = gl.convert_layout(result.to(out.dtype.element_ty), B)
    gl.store(out + row[:, None] * H * D + heads, result, mask=there)


def attend_ahead(
    qkv: torch.Tensor,
    cache: KVCache,
    step: AttentionInput,
    num_heads: int,
    scale: float,
    keys: torch.Tensor,
    values: torch.Tensor,
    rows: int,
    block: int,
    stages: int,
    warps: int,
    out: torch.Tensor,
    form: Form,
    in_scale: torch.Tensor | None,
) -> None:
    """As ``gathered.attend_gathered`` over what it has gathered: keys [V, room, D], turned values [V, D, room]; no cap
    on scores and no sinks."""
    kv_heads, room, size = keys.shape
    code = gl.float8e4nv
    at_keys = gl.NVMMASharedLayout.get_default_for([block, size], code)
    at_values = gl.NVMMASharedLayout.get_default_for([size, block], code)
    _ahead_kernel[(step.tiles.shape[0], kv_heads)](  # type: ignore[union-attr]
        qkv, step.tiles, step.offsets,
        TensorDescriptor(keys, [kv_heads * room, size], [size, 1], [block, size], at_keys),
        TensorDescriptor(values, [kv_heads * size, room], [room, 1], [size, block], at_values),
        room, out, out if in_scale is None else in_scale, scale * cache.k_scale, cache.v_scale,
        num_heads, kv_heads, size, rows, block, form == Form.FP8_STATIC, stages, num_warps=warps, **LAUNCH,
    )  # fmt: skip
