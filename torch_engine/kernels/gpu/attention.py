"""Attention of a step's queries to the KV cache: one token of each sequence, and tiles of prompt chunks.

Shapes as in ``kv_cache.py``; G = H / V query heads share a key/value head.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from flightline.torch_engine.kernels.gpu.activation import FP8_STATIC, Form, known_scale, new_output, to_fp8
from flightline.torch_engine.kernels.gpu.kv_cache import AttentionInput, KVCache
from flightline.torch_engine.kernels.gpu.launch import (
    INTERPRETED,
    LAUNCH,
    begin_in_order,
    begin_kernel,
    cdiv,
    kernel,
    next_power_of_2,
)

_INTERPRETED = tl.constexpr(INTERPRETED)

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
    values, place, known, D: tl.constexpr, BLOCK_D: tl.constexpr, INT8: tl.constexpr, DOT: tl.constexpr,
    LEFT: tl.constexpr,
):  # fmt: skip
    """Even and odd dimensions of the 8-bit rows at ``place``: two of [BLOCK_N, BLOCK_D / 2], transposed if ``LEFT``.

    ``mma``'s product with the values wants them transposed. The loads of the tensor cores transpose 16-bit words but
    not bytes, which would be fetched one by one: so words of two codes travel and are taken apart in registers.
    """
    pair = tl.arange(0, BLOCK_D // 2)
    if LEFT:
        place, pair, known = place[None, :], pair[:, None], known[None, :]
    else:
        place, pair, known = place[:, None], pair[None, :], known[:, None]
    mask = known & (pair < D // 2)
    if _INTERPRETED:
        codes = values + place * D + 2 * pair
        even = tl.load(codes, mask=mask, other=0.0)
        odd = tl.load(codes + 1, mask=mask, other=0.0)
    else:
        words = values.to(tl.pointer_type(tl.int16)) + place * (D // 2) + pair
        words = tl.load(words, mask=mask, other=0)
        even = _pick(words, _EVEN_INT8 if INT8 else _EVEN_FP8)
        odd = _pick(words, _ODD_INT8 if INT8 else _ODD_FP8)
    return even.to(DOT), odd.to(DOT)


@triton.jit
def _add_values(out, fade, p, v, LEFT: tl.constexpr):
    """``out`` faded, and the sum of values ``v`` with weights ``p`` [HEADS, BLOCK_N]; with ``LEFT`` both are
    transposed."""
    if LEFT:
        out = out * fade[None, :] + tl.dot(v, tl.trans(p), input_precision="ieee")
    else:
        out = out * fade[:, None] + tl.dot(p, v, input_precision="ieee")
    return out


@triton.jit
def _attend(
    q, begin, end, table, values, scales, head, scale, softcap,
    V: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, SOFTCAP: tl.constexpr, KV_INT8: tl.constexpr, PAIRS: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Online softmax of the heads ``q`` [HEADS, BLOCK_D] of a token over all keys from ``begin`` to ``end``.

    Up to 8 heads keys and values are the left operands of the products: their tiles have 16 rows, of which such heads
    would fill half and take twice the products and accumulators. As right operands heads need 8 columns.

    Returns the weighted sum of values (not normalised), the heads' maxima and sums.
    """
    LEFT: tl.constexpr = HEADS < 16
    d = tl.arange(0, BLOCK_D)
    top = tl.full([HEADS], float("-inf"), tl.float32)
    total = tl.zeros([HEADS], tl.float32)
    WIDTH: tl.constexpr = BLOCK_D // 2 if PAIRS else BLOCK_D
    out = tl.zeros([WIDTH, HEADS] if LEFT else [HEADS, WIDTH], tl.float32)
    odd = out
    for start in range(begin, end, BLOCK_N):
        n = start + tl.arange(0, BLOCK_N)
        known = n < end
        block = tl.load(table + n // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        place = (block * 2 * V + head) * BLOCK_SIZE + n % BLOCK_SIZE
        mask = known[:, None] & (d < D)[None, :]
        k = tl.load(values + place[:, None] * D + d[None, :], mask=mask, other=0.0).to(DOT)
        if LEFT:
            scores = tl.trans(tl.dot(k, tl.trans(q), input_precision="ieee"))
        else:
            scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        scores *= scale
        if KV_INT8:
            scores *= tl.load(scales + place, mask=known, other=0.0)[None, :]
        if SOFTCAP:  # tanh(u) = 2 sigmoid(2 u) - 1
            scores = softcap * (2.0 * tl.sigmoid(2.0 * scores / softcap) - 1.0)
        scores = tl.where(known[None, :], scores, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        p = tl.exp(scores - higher[:, None])
        fade = tl.exp(top - higher)
        total = total * fade + tl.sum(p, 1)
        place += V * BLOCK_SIZE
        if KV_INT8:
            p *= tl.load(scales + place, mask=known, other=0.0)[None, :]
        p = p.to(DOT)
        if PAIRS:
            v_even, v_odd = _load_pairs(values, place, known, D, BLOCK_D, KV_INT8, DOT, LEFT)
            out = _add_values(out, fade, p, v_even, LEFT)
            odd = _add_values(odd, fade, p, v_odd, LEFT)
        else:
            v = tl.load(values + place[:, None] * D + d[None, :], mask=mask, other=0.0).to(DOT)
            out = _add_values(out, fade, p, tl.trans(v) if LEFT else v, LEFT)
        top = higher
    if LEFT:
        out, odd = tl.trans(out), tl.trans(odd)
    if PAIRS:
        out = tl.join(out, odd).reshape(HEADS, BLOCK_D)
    return out, top, total


@triton.jit
def store_heads(out, unit, target, result, mask, FORM: tl.constexpr):
    """``unit`` is the :func:`known_scale` of the form."""
    if FORM == FP8_STATIC:
        result = to_fp8(result / unit)
    tl.store(out + target, result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def add_sink(sinks, head, top):
    """What the sink of a query head adds to the sum of a row whose largest score is ``top``."""
    return tl.exp(tl.load(sinks + head) - top)


@triton.jit
def _first_key(length, shared, WINDOW: tl.constexpr):
    """Of those that a decode sees which is the ``length``-th token, beyond ``shared`` that are computed elsewhere."""
    return tl.maximum(length - WINDOW, shared) if WINDOW > 0 else shared


@triton.jit
def _piece(length, each, BLOCK_N: tl.constexpr):
    """Keys of each piece but the last of a row of which no piece may have more than ``each``: as many, all as long."""
    return tl.cdiv(tl.cdiv(length, tl.maximum(tl.cdiv(length, each), 1)), BLOCK_N) * BLOCK_N


@kernel(do_not_specialize=["rows", "extra", "keys"])
def _share_kernel(
    positions, prefixes, rows, shares, extra, keys, BLOCK_ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, WINDOW: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Shares ``extra`` programs a head out among the longest rows; ``shares`` as :class:`Shares` has it.

    A piece has as many keys that all rows' pieces beyond their first ones are ``extra`` at the most; they are
    runtime numbers, so that one kernel does for all plans.
    """
    begin_in_order()
    r = tl.arange(0, BLOCK_ROWS)
    length = tl.load(positions + r, mask=r < rows, other=-1) + 1
    shared = 0
    if TILE > 0:
        shared = tl.load(prefixes + r, mask=r < rows, other=0)
    length -= _first_key(length, shared, WINDOW)
    each = tl.maximum(tl.cdiv(tl.sum(length, 0), extra), keys)
    each = tl.cdiv(each, BLOCK_N) * BLOCK_N
    more = tl.maximum(tl.cdiv(length, each) - 1, 0)
    first = tl.cumsum(more, 0) - more
    cut = (more > 0).to(tl.int32)
    tl.store(shares, each)
    tl.store(shares + 1, tl.sum(more, 0))
    tl.store(shares + 2, tl.sum(cut, 0))
    items = shares + 3
    tl.store(items + extra + tl.cumsum(cut, 0) - cut, r, mask=more > 0)
    tl.store(items + 2 * extra + r, first, mask=r < rows)
    for piece in range(tl.max(more, 0)):
        tl.store(items + first + piece, r, mask=piece < more)


@triton.jit
def _add_prefix(
    result, top, total, parts, sums, at, before, heads, known,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Adds the ``before`` results that a row has of shared keys, from number ``at`` on, to what its own keys gave;
    ``heads`` [ROWS] as far as they are ``known``."""
    d = tl.arange(0, BLOCK_D)
    mask = known[:, None] & (d < D)[None, :]
    for piece in tl.range(0, before, num_stages=3):
        place = (at + piece * TILE).to(tl.int64) * H + heads
        logs = tl.load(sums + place, mask=known, other=0.0)
        values = tl.load(parts + place[:, None] * D + d[None, :], mask=mask, other=0.0)
        higher = tl.maximum(top, logs)
        fade, weight = tl.exp(top - higher), tl.exp(logs - higher)
        result = result * fade[:, None] + values * weight[:, None]
        top, total = higher, total * fade + weight
    return result, top, total


@kernel(do_not_specialize=["rows", "most"])
def _decode_kernel(
    qkv, slots, positions, tables, width, values, scales, sinks, out, in_scale, shares, parts, sums, prefixes,
    prefix_parts, prefix_sums, rows, most, scale, v_scale, softcap,
    H: tl.constexpr, V: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HEADS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, CUT: tl.constexpr, TILE: tl.constexpr, WINDOW: tl.constexpr,
    SOFTCAP: tl.constexpr, SINKS: tl.constexpr, KV_INT8: tl.constexpr, PAIRS: tl.constexpr, DOT: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    if CUT:  # the kernel before may be the one that shares the work out, for this one and the one that merges
        begin_in_order()
    program, head = tl.program_id(0), tl.program_id(1)
    G: tl.constexpr = H // V
    row, piece, there = program.to(tl.int64), program * 0, True
    if CUT:
        extra = program - rows
        there = extra < tl.load(shares + 1)
        if extra >= 0:
            row = tl.load(shares + 3 + extra, mask=there, other=0).to(tl.int64)
            piece = extra + 1 - tl.load(shares + 3 + 2 * most + row)
    position = tl.load(positions + row)
    length = position + 1
    shared, at, before = 0, 0, 0
    if TILE > 0:
        shared = tl.load(prefixes + row)
        at, before = tl.load(prefixes + rows + row), tl.load(prefixes + 2 * rows + row)
    begin = _first_key(length, shared, WINDOW)
    end = length
    whole = True
    if CUT:
        each = tl.load(shares)
        whole = begin + each >= length
        each = _piece(length - begin, each, BLOCK_N)
        begin += piece * each
        end = tl.minimum(begin + each, length)
    table = tables + tl.load(slots + row).to(tl.int64) * width
    unit = known_scale(in_scale, FORM)
    if not CUT:
        begin_kernel()
    if there:
        g, d = tl.arange(0, HEADS), tl.arange(0, BLOCK_D)
        mask = (g < G)[:, None] & (d < D)[None, :]
        heads = (head * G + g)[:, None] * D + d[None, :]
        q = tl.load(qkv + row * (H + 2 * V) * D + heads, mask=mask, other=0.0).to(DOT)
        result, top, total = _attend(
            q, begin, end, table, values, scales, head, scale, softcap,
            V, D, BLOCK_D, HEADS, BLOCK_N, BLOCK_SIZE, SOFTCAP, KV_INT8, PAIRS, DOT,
        )  # fmt: skip
        if whole:
            result *= v_scale
            if TILE > 0:
                result, top, total = _add_prefix(
                    result, top, total, prefix_parts, prefix_sums, at, before, head * G + g, g < G, H, D, BLOCK_D, TILE
                )  # fmt: skip
            if SINKS:
                total += add_sink(sinks, head * G + tl.minimum(g, G - 1), top)
            store_heads(out, unit, row * H * D + heads, result / total[:, None], mask, FORM)
        else:
            result = result / total[:, None] * v_scale
            part = program.to(tl.int64) * H + head * G + g
            tl.store(parts + part[:, None] * D + d[None, :], result, mask=mask)
            tl.store(sums + part, top + tl.log(total), mask=g < G)


@triton.jit
def _add_parts(
    result, top, total, parts, sums, part, used, head, known,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Adds the results ``part`` [pieces], as far as they are ``used``, of the ``known`` ones of a row's heads to what
    the others gave: ``result`` [heads, BLOCK_D], ``top`` and ``total`` [heads]."""
    d = tl.arange(0, BLOCK_D)
    place = part.to(tl.int64)[:, None] * H + head[None, :]
    mask = used[:, None] & known[None, :]
    logs = tl.where(known[None, :], tl.load(sums + place, mask=mask, other=float("-inf")), 0.0)
    higher = tl.maximum(top, tl.max(logs, 0))
    weights = tl.exp(logs - higher[None, :])
    mask = mask[:, :, None] & (d < D)[None, None, :]
    values = tl.load(parts + place[:, :, None] * D + d[None, None, :], mask=mask, other=0.0)
    fade = tl.exp(top - higher)
    result = result * fade[:, None] + tl.sum(values * weights[:, :, None], 0)
    return result, higher, total * fade + tl.sum(weights, 0)


@kernel(do_not_specialize=["rows", "most"])
def _merge_kernel(
    positions, sinks, out, in_scale, shares, parts, sums, prefixes, prefix_parts, prefix_sums, rows, most,
    H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, FIRST: tl.constexpr,
    PIECES: tl.constexpr, WINDOW: tl.constexpr, SINKS: tl.constexpr, FORM: tl.constexpr, TILE: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """The pieces of the rows that were cut, ``FIRST`` and then ``PIECES`` at a time, and what these rows share with
    others; their sink joins them here, once. A program has ``HEADS`` heads of a row."""
    # What the kernel before did not write is read while it still runs.
    number = tl.program_id(0)
    there = number < tl.load(shares + 2)
    row = tl.load(shares + 3 + most + number, mask=there, other=0).to(tl.int64)
    shared, before, at = 0, 0, 0
    if TILE > 0:
        shared = tl.load(prefixes + row)
        at, before = tl.load(prefixes + rows + row), tl.load(prefixes + 2 * rows + row)
    length = tl.load(positions + row) + 1
    count = tl.cdiv(length - _first_key(length, shared, WINDOW), tl.load(shares))
    first = tl.load(shares + 3 + 2 * most + row)
    unit = known_scale(in_scale, FORM)
    begin_kernel()
    if there & (count > 1):
        h, d = tl.arange(0, BLOCK_H), tl.arange(0, BLOCK_D)
        head, known = tl.program_id(1) * HEADS + h, h < HEADS
        top = tl.full([BLOCK_H], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_H], tl.float32)
        result = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
        piece = tl.arange(0, FIRST)
        part = tl.where(piece == 0, row, rows + first + piece - 1)
        result, top, total = _add_parts(
            result, top, total, parts, sums, part, piece < count, head, known, H, D, BLOCK_D
        )
        for begin in range(FIRST, count, PIECES):
            more = begin + tl.arange(0, PIECES)
            result, top, total = _add_parts(
                result,
                top,
                total,
                parts,
                sums,
                rows + first + more - 1,
                more < count,
                head,
                known,
                H,
                D,
                BLOCK_D,
            )
        if TILE > 0:
            for begin in range(0, before, PIECES):
                common = begin + tl.arange(0, PIECES)
                result, top, total = _add_parts(
                    result, top, total, prefix_parts, prefix_sums, at + common * TILE, common < before,
                    head, known, H, D, BLOCK_D,
                )  # fmt: skip
        if SINKS:
            total += add_sink(sinks, tl.minimum(head, H - 1), top)
        target = (row * H + head[:, None]) * D + d[None, :]
        store_heads(out, unit, target, result / total[:, None], known[:, None] & (d < D)[None, :], FORM)


LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_rows(values, place, known, D: tl.constexpr, BLOCK_D: tl.constexpr, MASKED: tl.constexpr):
    """Keys or values [keys, BLOCK_D]; unless ``MASKED`` all of them are known."""
    d = tl.arange(0, BLOCK_D)
    at = values + place[:, None] * D + d[None, :]
    if MASKED:
        return tl.load(at, mask=known[:, None] & (d < D)[None, :], other=0.0)
    if D < BLOCK_D:
        return tl.load(at, mask=(place >= 0)[:, None] & (d < D)[None, :], other=0.0)
    return tl.load(at)


@triton.jit
def weigh(
    scores,
    seen,
    top,
    total,
    scale,
    softcap,
    SOFTCAP: tl.constexpr,
    MASKED: tl.constexpr,
    LIFT: tl.constexpr = 0,
):
    """Weights of ``scores`` [rows, keys], where ``seen`` if ``MASKED``, beside what ``top`` and ``total`` [rows] stand
    for: these weights, the factor of earlier ones, and the new maxima and sums. ``scale`` [rows] is of their scores.

    Scores count in units of ln 2, which leaves one multiply-add and one exp2 for each. Weights and sums are
    2 ** ``LIFT`` times as large as they would be.
    """
    if SOFTCAP:  # tanh(u) = 2 sigmoid(2 u) - 1
        scores = softcap * (2.0 * tl.sigmoid(2.0 * scale[:, None] * scores / softcap) - 1.0)
        scale = tl.full(scale.shape, 1.0, tl.float32)
    factor = scale * LOG2_E
    if MASKED:
        scores = tl.where(seen, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * factor)
    base = higher
    if MASKED:
        base = tl.where(higher == float("-inf"), 0.0, higher)  # a row that has seen nothing yet
    fade = tl.exp2(top - base)
    if LIFT > 0:
        base -= LIFT
    p = tl.exp2(scores * factor[:, None] - base[:, None])
    return p, fade, higher, total * fade + tl.sum(p, 1)


@triton.jit
def meet(
    q, out, top, total, begin, end, positions, table, values, scales, head, scale, softcap,
    V: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, KV_INT8: tl.constexpr, DOT: tl.constexpr, STAGES: tl.constexpr,
    MASKED: tl.constexpr,
):  # fmt: skip
    """Online softmax of ``q`` [rows, BLOCK_D] over the blocks of keys from ``begin`` to ``end``, on top of what
    ``out``, ``top`` and ``total`` hold. Unless ``MASKED`` all rows see all of these keys.
    """
    scale = tl.zeros_like(top) + scale
    for start in tl.range(begin, end, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        known = n < end
        if MASKED:
            block = tl.load(table + n // BLOCK_SIZE, mask=known, other=0).to(tl.int64)
        else:
            block = tl.load(table + n // BLOCK_SIZE).to(tl.int64)
        place = (block * 2 * V + head) * BLOCK_SIZE + n % BLOCK_SIZE
        apart = V * BLOCK_SIZE
        k = _load_rows(values, place, n < end, D, BLOCK_D, MASKED).to(DOT)
        if (
            BLOCK_D <= 128
        ):  # under way while scores are computed; of larger heads it would take too many registers
            v = _load_rows(values, place + apart, n < end, D, BLOCK_D, MASKED).to(DOT)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee")
        if KV_INT8:
            unit = tl.load(scales + place, mask=n < end, other=0.0)
            scores *= unit[None, :]
        seen = known
        if MASKED:
            seen = known[None, :] & (n[None, :] <= positions[:, None])
            if WINDOW > 0:
                seen = seen & (n[None, :] > positions[:, None] - WINDOW)
        p, fade, top, total = weigh(scores, seen, top, total, scale, softcap, SOFTCAP, MASKED)
        if KV_INT8:
            unit = tl.load(scales + place + apart, mask=n < end, other=0.0)
            p *= unit[None, :]
        if BLOCK_D > 128:
            v = _load_rows(values, place + apart, n < end, D, BLOCK_D, MASKED).to(DOT)
        out = out * fade[:, None] + tl.dot(p.to(DOT), v, input_precision="ieee")
    return out, top, total


@kernel()
def _prefill_kernel(
    qkv, tiles, tables, width, values, scales, sinks, out, in_scale, scale, v_scale, softcap,
    H: tl.constexpr, V: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_SIZE: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    SINKS: tl.constexpr, KV_INT8: tl.constexpr, DOT: tl.constexpr, FORM: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    begin_kernel()
    # The tiles come longest first, and all heads of one before the next: what is started last is done soon.
    tile, head = tiles + tl.program_id(1) * 4, tl.program_id(0)
    G: tl.constexpr = H // V
    start, count, first = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    slot = tl.load(tile + 3).to(tl.int64)
    r, d = tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    token = r // G
    mask = (token < count)[:, None] & (d < D)[None, :]
    row = start + token
    heads = (head * G + r % G)[:, None] * D + d[None, :]
    q = tl.load(qkv + row[:, None] * (H + 2 * V) * D + heads, mask=mask, other=0.0).to(DOT)
    table = tables + slot * width
    result = tl.zeros([ROWS, BLOCK_D], tl.float32)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    # Every row sees the keys from `low` to `high`, whole blocks; masks are for the window's edge and the diagonal.
    high = (first + 1) // BLOCK_N * BLOCK_N
    low = high * 0
    if WINDOW > 0:
        begin = tl.maximum(first - WINDOW + 1, 0) // BLOCK_N * BLOCK_N
        low = tl.maximum(first + count - WINDOW, 0)
        low = tl.minimum(tl.cdiv(low, BLOCK_N) * BLOCK_N, high)
        low = tl.maximum(low, begin)
        result, top, total = meet(
            q, result, top, total, begin, low, first + token, table, values, scales, head, scale, softcap,
            V, D, BLOCK_D, BLOCK_N, BLOCK_SIZE, WINDOW, SOFTCAP, KV_INT8, DOT, 1, True,
        )  # fmt: skip
        high = tl.maximum(high, low)
    result, top, total = meet(
        q, result, top, total, low, high, first + token, table, values, scales, head, scale, softcap,
        V, D, BLOCK_D, BLOCK_N, BLOCK_SIZE, WINDOW, SOFTCAP, KV_INT8, DOT, STAGES, False,
    )  # fmt: skip
    result, top, total = meet(
        q, result, top, total, high, first + count, first + token, table, values, scales, head, scale, softcap,
        V, D, BLOCK_D, BLOCK_N, BLOCK_SIZE, WINDOW, SOFTCAP, KV_INT8, DOT, 1, True,
    )  # fmt: skip
    if SINKS:  # scores count in units of ln 2 here; rows of nobody have seen nothing
        total += add_sink(sinks, head * G + r % G, tl.where(total == 0.0, 0.0, top / LOG2_E))
    result = result / tl.where(total == 0.0, 1.0, total)[:, None] * v_scale
    store_heads(out, known_scale(in_scale, FORM), row[:, None] * H * D + heads, result, mask, FORM)


@dataclass(frozen=True)
class PrefillPlan:
    """How the attention of prompts is cut up."""

    rows: int
    """Query rows (tokens times heads of a group) of one tile."""
    block: int
    """Keys of one iteration."""
    warps: int
    stages: int
    """Iterations whose loads are under way together."""
    registers: int = 0
    """Of a thread at the most, so that more programs run on a multiprocessor; 0: as many as the compiler likes."""

    def __str__(self) -> str:
        bound = f", {self.registers} registers" if self.registers else ""
        return f"{self.rows} x {self.block}, {self.warps} warps, {self.stages} stages{bound}"

    def tokens(self, group: int) -> int:
        """Of one tile."""
        return self.rows // group

    @property
    def launch(self) -> dict[str, int | bool]:
        """What Triton's compiler is told."""
        bound = {"maxnreg": self.registers} if self.registers and not INTERPRETED else {}
        return {"num_warps": self.warps, "num_stages": self.stages, **bound, **LAUNCH}


SHORT = 256
"""Keys up to which programs of many keys at a time have too little to do."""


def prefill_plan(dtype: torch.dtype, size: int, longest: int) -> PrefillPlan:
    """For any step; ``longest`` is the most keys of a prompt in it, of heads of ``size`` dimensions."""
    if dtype == torch.float32:
        return PrefillPlan(32, 32, 4, 1)
    # Of 32, 64 and 128 keys the fastest on an H200.
    return PrefillPlan(64, 128 if longest > SHORT and size <= 128 else 32, 4, 1)


def usual_prefill_plans(dtype: torch.dtype, size: int) -> list[PrefillPlan]:
    """Candidates for steps with prompts of more than ``SHORT`` keys, with the tiles of :func:`prefill_plan`, whose plan
    is the first."""
    first = prefill_plan(dtype, size, SHORT + 1)
    if dtype == torch.float32 or size > 128:
        return [first]
    return [first, PrefillPlan(first.rows, 64, 4, 3), PrefillPlan(first.rows, 64, 4, 2, registers=168)]


def long_prefill_plans(dtype: torch.dtype, size: int) -> list[PrefillPlan]:
    """Candidates for steps of many tokens of long prompts, the first is what :func:`prefill_plan` says."""
    plans = [prefill_plan(dtype, size, LONG)]
    if dtype == torch.float32:
        return plans
    if size > 128:
        return [*plans, PrefillPlan(64, 64, 8, 1), PrefillPlan(128, 32, 8, 2), PrefillPlan(128, 64, 8, 1)]
    return [
        *plans, PrefillPlan(64, 128, 4, 2), PrefillPlan(64, 64, 4, 3), PrefillPlan(128, 64, 8, 2),
        PrefillPlan(128, 64, 8, 3), PrefillPlan(128, 128, 8, 1), PrefillPlan(128, 128, 8, 2),
    ]  # fmt: skip


LONG = 2048
"""Tokens, with those before, from which on a prompt's attention is worth a plan of its own."""


@dataclass(frozen=True)
class DecodePlan:
    """How the decode attention is cut up."""

    extra: int
    """Programs a key/value head beyond one for each row: the longest rows are cut into pieces for them."""
    keys: int
    """Of a piece, at the least."""
    block: int
    """Keys of one iteration."""
    warps: int


BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
"""Rows of single tokens that graphs are captured for."""


REGISTERS = 128
"""Of a thread of a decode: 16 warps run on a multiprocessor then. Left alone the compiler takes up to 168, for what is
behind the loop, and with 12 warps 64 rows of 4,000 keys are two waves instead of one (165 us and not 131)."""
FEW_KEYS = 64
"""Of a piece where most rows are cut."""


def decode_plan(
    rows: int, kv_heads: int, heads: int, size: int, width: int, multiprocessors: int, longest: int
) -> DecodePlan:
    """Narrow programs when there are plenty of them (little to synchronise: an H200 then reads 75 to 90 % of what its
    memory can); wider ones, and most rows cut, when the device would not be full otherwise. A row that is much longer
    than all others is cut in any case, since everybody waits for it.

    ``heads`` is the query heads of a key/value head, of ``size`` dimensions; ``width`` the bytes of a number in the
    cache; ``longest`` the most keys of a row. Rows of which no graph has as many get the plan of the next larger graph:
    its kernels are compiled already, and compiling others would hold up every answer for a second.
    """
    rows = next((size for size in BATCH_SIZES if size >= rows), rows)
    programs = rows * kv_heads
    accumulators = max(16, next_power_of_2(heads)) * next_power_of_2(size)
    least = next_power_of_2(cdiv(accumulators, 2048))
    wide = 128 if size <= 128 else 64
    if programs <= multiprocessors:
        extra = max(1, (4 * multiprocessors - programs) // kv_heads)
        block, warps = (wide, 4) if width == 1 else (64, 2)
        pieces = rows * (
            cdiv(longest, max(block, FEW_KEYS)) - 1
        )  # more than there can be would only be started
        plan = DecodePlan(max(1, min(extra, pieces)), FEW_KEYS, block, max(warps, least))
    elif programs < 8 * multiprocessors:
        plan = DecodePlan(max(1, 2 * multiprocessors // kv_heads), 2048, wide, max(4, least))
    else:
        plan = DecodePlan(max(1, 4 * multiprocessors // kv_heads), 4096, 64, max(2, least))
    if longest > plan.keys:
        return plan
    if programs >= 8 * multiprocessors:  # one warp has nobody to wait for
        plan = dataclasses.replace(plan, block=32, warps=least)
    elif programs > 4 * multiprocessors:  # all of them at once
        plan = dataclasses.replace(plan, block=64, warps=2 * least)
    return dataclasses.replace(plan, extra=0)


@dataclass(frozen=True)
class PrefixParts:
    """What the rows of a step have of the keys that several of them share (``shared_prefix.py``)."""

    rows: torch.Tensor
    """As of ``kv_cache.SharedPrefixes``."""
    tile: int
    """How far a row's results are apart."""
    values: torch.Tensor
    """[results, H, D] float32: weighted sums of values."""
    sums: torch.Tensor
    """[results, H] float32: logarithms of the sums of the weights; -inf: the row sees none of these keys."""


@dataclass(frozen=True)
class Shares:
    """Who computes which piece of the rows' keys in a step: the same for all layers of one window."""

    table: torch.Tensor
    """int32: keys of a piece, extra pieces, rows that are cut; for each extra piece its row; the rows that are cut; for
    each row the number of its first extra piece."""
    rows: int

    @classmethod
    def of(
        cls, step: AttentionInput, plan: DecodePlan, window: int | None, prefix: PrefixParts | None = None
    ) -> Shares:
        """The step's, which are made where its first layer asks."""
        key = (plan, window, prefix is None)
        if key not in step.shares:
            rows = step.num_decodes
            table = torch.empty(3 + 2 * plan.extra + rows, dtype=torch.int32, device=step.positions.device)
            step.shares[key] = cls(table, rows)
            prefixes, tile = (table, 0) if prefix is None else (prefix.rows, prefix.tile)
            _share_kernel[(1,)](
                step.positions, prefixes, rows, table, plan.extra, plan.keys, next_power_of_2(rows), plan.block,
                window or 0, tile, **LAUNCH,
            )  # fmt: skip
        shares: Shares = step.shares[key]
        return shares


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
    prefill: PrefillPlan | None = None,
    sinks: torch.Tensor | None = None,
    prefix: PrefixParts | None = None,
) -> torch.Tensor:
    """Attention of rotated queries in ``qkv`` [T, (H + 2 V) D] to the cache: [T, H D], plain or e4m3.

    ``sinks`` [H] float32 are scores that join the softmax of each query head, and that no value belongs to.
    ``prefill`` is the plan that the step's tiles were made for; None: :func:`prefill_plan`. ``prefix`` is what decodes
    have already of the keys that they share. Tiles of a step with ``spans`` are left to ``gathered.attend_gathered``.
    """
    _, _, kv_heads, block_size, size = cache.values.shape
    rows, group = qkv.shape[0], num_heads // kv_heads
    out, _ = new_output(rows, num_heads * size, form, qkv)
    in_scale = out if in_scale is None else in_scale
    scales = cache.values if cache.scales is None else cache.scales
    dot = dot_type(qkv.dtype, cache.values.dtype)
    block_d = max(32, next_power_of_2(size))
    shared = {
        "BLOCK_SIZE": block_size, "WINDOW": window or 0, "SOFTCAP": softcap is not None,
        "SINKS": sinks is not None, "KV_INT8": cache.scales is not None, "DOT": dot, "FORM": int(form),
    }  # fmt: skip
    sinks = out if sinks is None else sinks
    softcap = softcap or 1.0
    decodes, extra = step.num_decodes, plan.extra
    tile = 0 if prefix is None else prefix.tile
    if decodes:
        shares = parts = sums = out
        prefixes, prefix_parts, prefix_sums = (
            (out, out, out) if prefix is None else (prefix.rows, prefix.values, prefix.sums)
        )
        if extra:
            shares = Shares.of(step, plan, window, prefix).table
            parts = torch.empty(decodes + extra, num_heads, size, dtype=torch.float32, device=qkv.device)
            sums = torch.empty(decodes + extra, num_heads, dtype=torch.float32, device=qkv.device)
        small = cache.values.element_size() == 1 and size <= 128 and group <= 16
        bounded = {"maxnreg": REGISTERS} if small and not INTERPRETED else {}
        _decode_kernel[(decodes + extra, kv_heads)](
            qkv, step.slots, step.positions, step.tables, step.tables.stride(0), cache.values, scales, sinks,
            out, in_scale, shares, parts, sums, prefixes, prefix_parts, prefix_sums, decodes, extra,
            scale * cache.k_scale, cache.v_scale, softcap,
            num_heads, kv_heads, size, block_d, max(8, next_power_of_2(group)), plan.block,
            CUT=extra > 0, TILE=tile, PAIRS=cache.values.element_size() == 1, **shared,
            num_warps=plan.warps, num_stages=3, **bounded, **LAUNCH,
        )  # fmt: skip
        if extra:
            # Where long rows alone are cut, there is hardly ever one: a thousand programs that find nothing take 7 us.
            # Where most rows are, those of up to 2,048 keys have the first pieces only.
            heads, first, pieces = (group, 8, 8) if plan.keys > FEW_KEYS else (1, 16, 64)
            _merge_kernel[(min(decodes, extra), num_heads // heads)](
                step.positions, sinks, out, in_scale, shares, parts, sums, prefixes, prefix_parts, prefix_sums, decodes,
                extra, num_heads, size, block_d, first, pieces, window or 0, shared["SINKS"], int(form),
                tile, heads, next_power_of_2(heads), **LAUNCH,
            )  # fmt: skip
    if step.tiles is not None and step.spans is None:
        prefill = prefill or prefill_plan(qkv.dtype, size, step.longest)
        _prefill_kernel[(kv_heads, step.tiles.shape[0])](
            qkv, step.tiles, step.tables, step.tables.stride(0), cache.values, scales, sinks,
            out, in_scale, scale * cache.k_scale, cache.v_scale, softcap,
            num_heads, kv_heads, size, block_d, prefill.rows, prefill.block, **shared,
            STAGES=prefill.stages, **prefill.launch,
        )  # fmt: skip
    return out


def dot_type(dtype: torch.dtype, cache: torch.dtype) -> tl.dtype:
    """Operands of the products: fp16 holds 8-bit codes exactly. The interpreter cannot multiply bf16."""
    if INTERPRETED or dtype == torch.float32:
        return tl.float32
    if cache in (torch.int8, torch.float8_e4m3fn) or dtype == torch.float16:
        return tl.float16
    return tl.bfloat16
