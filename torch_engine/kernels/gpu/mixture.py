"""A mixture of experts: routing, and products with the weights of those experts that were hit.

Shapes: T rows, N hidden size, I inner size of an expert, E experts, C of them chosen for each row; a pair is one row
and one of its experts, number ``row * C + place``.

A few rows: each pair is a program's own row, four launches after the norm (router, choice, gate and up product, gate;
the down product adds up a row's experts itself). Many rows: the pairs are sorted by expert into blocks of one expert
each, on the device. Grids depend on T alone, so that a CUDA graph can hold them. Rows that pad a captured batch choose
expert -1, whose weights nobody reads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl

from flightline.torch_engine.kernels.gpu.activation import Activation, Form, parts_of, sum_parts, to_fp8
from flightline.torch_engine.kernels.gpu.grouped import GroupedCodes, Kind, rows_product, size_of
from flightline.torch_engine.kernels.gpu.launch import LAUNCH, begin_kernel, cdiv, kernel, next_power_of_2
from flightline.torch_engine.kernels.gpu.linear import CudaLinear, PlainLinear, quantise
from flightline.torch_engine.kernels.gpu.norm import gate
from flightline.torch_engine.kernels.gpu.steps import CudaStep
from flightline.torch_engine.model.mixture import MixtureSpec

PAST = tl.constexpr(-2)
"""Expert of a block beyond the last one."""

# Routing -------------------------------------------------------------------------------------------------------------


@kernel(do_not_specialize=["rows"])
def _router_kernel(
    x, weight, out, rows,
    E: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    begin_kernel()
    m = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    e = tl.program_id(1) * BLOCK_E + tl.arange(0, BLOCK_E)
    split = tl.program_id(2)
    k = tl.arange(0, BLOCK_K)
    EACH: tl.constexpr = (K + SPLITS - 1) // SPLITS
    sums = tl.zeros([ROWS, BLOCK_E], tl.float32)
    for start in range(0, EACH, BLOCK_K):
        here = split * EACH + start + k
        inside = (start + k < EACH) & (here < K)
        a = tl.load(
            x + m.to(tl.int64)[:, None] * K + here[None, :], (m < rows)[:, None] & inside[None, :], 0.0
        )
        b = tl.load(weight + e[:, None] * K + here[None, :], (e < E)[:, None] & inside[None, :], 0.0)
        # Float32 where the weights are: never tensor floats, whose ten bits choose other experts.
        sums = tl.dot(a.to(b.dtype), tl.trans(b), sums, input_precision="ieee")
    target = out + (split * rows + m).to(tl.int64)[:, None] * E + e[None, :]
    tl.store(target, sums, (m < rows)[:, None] & (e < E)[None, :])


MOST_ROUTERS = 256
"""Programs of a router's product that its inputs are cut up for."""


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x`` [T, N] times the router's ``weight`` [E, N]: partial sums [S, T, E] in float32."""
    rows, size = x.shape
    experts = weight.shape[0]
    block_m, block_e = (16, 16) if rows <= 16 else (32, 32)
    programs = cdiv(rows, block_m) * cdiv(experts, block_e)
    splits = max(1, min(8, size // 256, MOST_ROUTERS // programs))
    out = torch.empty(splits, rows, experts, dtype=torch.float32, device=x.device)
    _router_kernel[(cdiv(rows, block_m), cdiv(experts, block_e), splits)](
        x, weight, out, rows, experts, size, block_m, block_e, min(128, next_power_of_2(size)), splits,
        num_warps=4, num_stages=4, **LAUNCH,
    )  # fmt: skip
    return out


@triton.jit
def _first_best(values, places, BLOCK: tl.constexpr):
    """Where the largest value stands; of equal ones the first."""
    return tl.min(tl.where(values == tl.max(values, 0), places, BLOCK - 1), 0)


@kernel(do_not_specialize=["step", "idle"])
def _route_kernel(
    logits, step, bias, correction, slots, idle, ids, weights,
    E: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, CHOSEN: tl.constexpr, PLACES: tl.constexpr,
    BIASED: tl.constexpr, SIGMOID: tl.constexpr, CORRECTED: tl.constexpr, GROUPS: tl.constexpr, BLOCK_G: tl.constexpr,
    KEPT: tl.constexpr, NORMALISE: tl.constexpr, SCALE: tl.constexpr,
):  # fmt: skip
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    e = tl.arange(0, BLOCK)
    mask = e < E
    x = sum_parts(logits + row * E + e, step, mask, PARTS)
    if BIASED:
        x += tl.load(bias + e, mask=mask, other=0.0)
    if SIGMOID:
        scores = tl.sigmoid(x)
    else:
        x = tl.where(mask, x, float("-inf"))
        scores = tl.exp(x - tl.max(x, 0))
        scores = scores / tl.sum(scores, 0)
    choice = scores
    if CORRECTED:
        choice += tl.load(correction + e, mask=mask, other=0.0)
    choice = tl.where(mask, choice, float("-inf"))
    if GROUPS > 1:
        EACH: tl.constexpr = E // GROUPS
        g = tl.arange(0, BLOCK_G)
        worth = tl.full([BLOCK_G], float("-inf"), tl.float32)
        for group in tl.static_range(GROUPS):
            inside = tl.where(e // EACH == group, choice, float("-inf"))
            value = tl.max(inside, 0)
            if EACH > 1:
                value += tl.max(tl.where(e == _first_best(inside, e, BLOCK), float("-inf"), inside), 0)
            worth = tl.where(g == group, value, worth)
        kept = tl.zeros([BLOCK], tl.int32)
        for _ in tl.static_range(KEPT):
            best = _first_best(worth, g, BLOCK_G)
            worth = tl.where(g == best, float("-inf"), worth)
            kept = tl.where(e // EACH == best, 1, kept)
        choice = tl.where(kept == 1, choice, float("-inf"))
    place = tl.arange(0, PLACES)
    chosen = tl.zeros([PLACES], tl.int32)
    parts = tl.zeros([PLACES], tl.float32)
    for i in tl.static_range(CHOSEN):
        best = tl.minimum(_first_best(choice, e, BLOCK), E - 1)
        chosen = tl.where(place == i, best, chosen)
        parts = tl.where(place == i, tl.sum(tl.where(e == best, scores, 0.0), 0), parts)
        choice = tl.where(e == best, float("-inf"), choice)
    if NORMALISE:
        parts = parts / (tl.sum(parts, 0) + 1e-20)
    lives = tl.load(slots + row) != idle
    tl.store(ids + row * CHOSEN + place, tl.where(lives, chosen, -1), mask=place < CHOSEN)
    tl.store(weights + row * CHOSEN + place, tl.where(lives, parts * SCALE, 0.0), mask=place < CHOSEN)


def route(
    logits: torch.Tensor,
    mixture: MixtureSpec,
    correction: torch.Tensor | None,
    slots: torch.Tensor,
    idle: int,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """From partial sums [S, T, E] of the router to the chosen experts, int32, and their weights, float32: each [T, C].

    ``bias`` [E] float32 is the router's. Rows whose slot is ``idle`` choose nobody (-1), with weight 0.
    """
    parts, step = parts_of(logits)
    rows, experts = logits.shape[-2:]
    ids = torch.empty(rows, mixture.chosen, dtype=torch.int32, device=logits.device)
    weights = torch.empty(rows, mixture.chosen, dtype=torch.float32, device=logits.device)
    _route_kernel[(rows,)](
        logits, step, _or(bias, logits), _or(correction, logits), slots, idle, ids, weights,
        experts, next_power_of_2(experts), parts, mixture.chosen, next_power_of_2(mixture.chosen),
        bias is not None, mixture.score == "sigmoid", correction is not None, mixture.groups,
        next_power_of_2(mixture.groups), mixture.kept_groups, mixture.normalise,
        float(mixture.scale), num_warps=1, **LAUNCH,
    )  # fmt: skip
    return ids, weights


BLOCK_ROWS = {8: 16, 16: 16, 32: 32, 96: 64}
"""Rows of a block where an expert has up to so many pairs on average; ``MOST_BLOCK_ROWS`` where it has more. About as
many as the average, so that little is padded; whether twice as many are faster, with which half of the experts do not
read their weights twice, is timed at load."""
MOST_BLOCK_ROWS = 128
FEW_OUTPUTS = (64, 128)
"""Of a program, of few rows: more take fewer instructions a weight, and fill the device worse."""
MOST_PARTS = 12
"""Partial sums of few rows: whoever reads them adds them up one after the other."""


# Few rows: each pair by itself ---------------------------------------------------------------------------------------


@triton.jit
def _row_product(
    x, in_scale, weight, lives, n, split,
    N: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    QUANTISE: tl.constexpr,
):  # fmt: skip
    """One row of K inputs times rows ``n`` of a weight [N, K], of the inputs the ``split``-th of SPLITS pieces:
    [BLOCK_N]; 0 unless it ``lives``.

    The weight is the tall operand of a product with 16 rows, of which 15 are zero: the tensor cores have time.
    """
    m, k = tl.arange(0, 16), tl.arange(0, BLOCK_K)
    tall = tl.zeros([BLOCK_N, 16], tl.float32)
    EACH: tl.constexpr = (K + BLOCK_K * SPLITS - 1) // (BLOCK_K * SPLITS) * BLOCK_K
    end = tl.minimum(K, (split + 1) * EACH)
    for start in range(split * EACH, end, BLOCK_K):
        inside = (start + k < end) & lives
        values = tl.load(x + start + k, inside, 0.0)
        if QUANTISE:
            values = to_fp8(values.to(tl.float32) / tl.load(in_scale))
        w = tl.load(
            weight + n.to(tl.int64)[:, None] * K + (start + k)[None, :],
            (n < N)[:, None] & inside[None, :],
            0.0,
        )
        a = tl.where((m == 0)[:, None], values.to(tl.float32)[None, :], 0.0).to(weight.dtype.element_ty)
        tall = tl.dot(w, tl.trans(a), tall, input_precision="ieee")
    return tl.sum(tall, 1)


@triton.jit
def _row_of_codes(
    x, codes, scales, offsets, expert, lives, n, split,
    N: tl.constexpr, K: tl.constexpr, SPLITS: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    KIND: tl.constexpr, OFFSETS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As :func:`_row_product`, of an expert's codes, whose tiles are as many in each piece."""
    TILES: tl.constexpr = (K + TILE - 1) // TILE // SPLITS
    m = tl.arange(0, 16)
    one, at = (m == 0) & lives, expert * tl.cdiv(K, GROUP) * N
    sums = rows_product(
        x + m * 0, one, codes + expert * size_of(KIND, N, K, TILE), scales + at, offsets + at, n, (n < N) & lives,
        split * TILES, N, K, TILES, GROUP, TILE, KIND, OFFSETS, 16, BLOCK_N,
    )  # fmt: skip
    return tl.sum(tl.where(one[None, :], sums, 0.0), 1)


@kernel()
def _rows_in_kernel(
    x, in_scale, weight, weight_scales, offsets, bias, ids, out,
    N: tl.constexpr, K: tl.constexpr, CHOSEN: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BIASED: tl.constexpr, FP8: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, KIND: tl.constexpr,
    OFFSETS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    begin_kernel()
    pair = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    expert = tl.load(ids + pair).to(tl.int64)
    lives = expert >= 0
    expert = tl.maximum(expert, 0)
    source = x + pair // CHOSEN * K
    if TILE > 0:
        sums = _row_of_codes(
            source, weight, weight_scales, offsets, expert, lives, n, split,
            N, K, SPLITS, GROUP, TILE, KIND, OFFSETS, BLOCK_N,
        )  # fmt: skip
    else:
        sums = _row_product(
            source, in_scale, weight + expert * N * K, lives, n, split, N, K, SPLITS, BLOCK_N, BLOCK_K, FP8
        )
    if FP8:
        sums *= tl.load(in_scale) * tl.load(weight_scales + expert)
    if BIASED and split == 0:
        sums += tl.load(bias + expert * N + n, n < N, 0.0)
    tl.store(out + (split * tl.num_programs(0) + pair) * N + n, sums, n < N)


@kernel(do_not_specialize=["rows"])
def _rows_out_kernel(
    x, in_scale, weight, weight_scales, offsets, bias, ids, shares, out, rows,
    N: tl.constexpr, K: tl.constexpr, CHOSEN: tl.constexpr, EACH: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BIASED: tl.constexpr, FP8: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    KIND: tl.constexpr, OFFSETS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    part = tl.program_id(2)
    split = part % SPLITS
    total = tl.zeros([BLOCK_N], tl.float32)
    for i in range(EACH):
        place = part // SPLITS * EACH + i
        pair = row * CHOSEN + place
        expert = tl.load(ids + pair, place < CHOSEN, -1).to(tl.int64)
        share = tl.load(shares + pair, place < CHOSEN, 0.0)
        lives = expert >= 0
        expert = tl.maximum(expert, 0)
        if TILE > 0:
            sums = _row_of_codes(
                x + pair * K, weight, weight_scales, offsets, expert, lives, n, split,
                N, K, SPLITS, GROUP, TILE, KIND, OFFSETS, BLOCK_N,
            )  # fmt: skip
        else:
            sums = _row_product(
                x + pair * K, in_scale, weight + expert * N * K, lives, n, split, N, K, SPLITS, BLOCK_N, BLOCK_K,
                False,
            )  # fmt: skip
        if FP8:
            sums *= tl.load(in_scale) * tl.load(weight_scales + expert)
        if BIASED and split == 0:
            sums += tl.load(bias + expert * N + n, n < N, 0.0)
        total += sums * share
    tl.store(out + (part * rows + row) * N + n, total, n < N)


# Many rows: blocks of pairs of one expert ----------------------------------------------------------------------------


@kernel(do_not_specialize=["pairs", "blocks"])
def _count_kernel(
    ids, cursors, experts, order, pairs, blocks,
    E: tl.constexpr, BINS: tl.constexpr, BLOCK_M: tl.constexpr, CHUNK: tl.constexpr, EACH: tl.constexpr,
):  # fmt: skip
    """Every program counts all pairs, and says whose ``EACH`` blocks are, whose places it empties."""
    begin_kernel()
    part = tl.program_id(0)
    b, c = tl.arange(0, BINS), tl.arange(0, CHUNK)
    counts = tl.zeros([BINS], tl.int32)
    for start in range(0, pairs, CHUNK):
        expert = tl.load(ids + start + c, start + c < pairs, E + 1)
        counts += tl.histogram(tl.where(expert < 0, E, expert), BINS)
    padded = tl.where(b <= E, (counts + BLOCK_M - 1) // BLOCK_M * BLOCK_M, 0)
    ends = tl.cumsum(padded, 0)
    if part == 0:
        tl.store(cursors + b, ends - padded)
    block = part * EACH + tl.arange(0, EACH)
    first = block * BLOCK_M
    expert = tl.sum((ends[None, :] <= first[:, None]).to(tl.int32), 1)
    expert = tl.where(first >= tl.sum(padded, 0), PAST, tl.where(expert == E, -1, expert))
    tl.store(experts + block, expert, block < blocks)
    places = part * EACH * BLOCK_M + tl.arange(0, EACH * BLOCK_M)
    tl.store(order + places, pairs + tl.zeros([EACH * BLOCK_M], tl.int32), places < blocks * BLOCK_M)


@kernel(do_not_specialize=["pairs"])
def _place_kernel(ids, cursors, order, pairs, E: tl.constexpr, CHUNK: tl.constexpr):
    begin_kernel()
    pair = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    mask = pair < pairs
    expert = tl.load(ids + pair, mask, 0)
    # Which pair comes first within an expert changes no result: each row is computed by itself.
    where = tl.atomic_add(cursors + tl.where(expert < 0, E, expert), 1, mask)
    tl.store(order + where, pair, mask)


COUNTED = 32
"""Blocks of a program of ``_count_kernel``."""


@dataclass(frozen=True)
class Sorted:
    """Pairs by expert, in blocks of ``size`` places; places without a pair hold the number of pairs."""

    order: torch.Tensor
    """[blocks * size] int32: pairs."""
    experts: torch.Tensor
    """[blocks] int32: whose weights a block wants; -1: nobody's, results are 0; -2: the block is empty."""
    size: int


def sort_pairs(ids: torch.Tensor, experts: int, size: int) -> Sorted:
    """Sorts the pairs of ``ids`` [T, C] on the device, without saying to the host how many an expert has."""
    pairs = ids.numel()
    capacity = pairs + min(experts + 1, pairs) * (size - 1)
    blocks = cdiv(capacity, size)
    bins = next_power_of_2(experts + 2)
    order, owners, cursors = (
        torch.empty(count, dtype=torch.int32, device=ids.device) for count in (blocks * size, blocks, bins)
    )
    _count_kernel[(cdiv(blocks, COUNTED),)](
        ids, cursors, owners, order, pairs, blocks, experts, bins, size, 1024, COUNTED, num_warps=8, **LAUNCH
    )
    _place_kernel[(cdiv(pairs, 256),)](ids, cursors, order, pairs, experts, 256, num_warps=4, **LAUNCH)
    return Sorted(order, owners, size)


@kernel(do_not_specialize=["pairs", "rows"])
def _blocks_kernel(
    x, in_scale, weight, weight_scales, offsets, bias, order, experts, shares, out, pairs, rows,
    N: tl.constexpr, K: tl.constexpr, CHOSEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr, BIASED: tl.constexpr, FP8: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    KIND: tl.constexpr, OFFSETS: tl.constexpr, DOWN: tl.constexpr,
):  # fmt: skip
    begin_kernel()
    tiles = (N + BLOCK_N - 1) // BLOCK_N
    block = tl.program_id(0) // tiles
    n = tl.program_id(0) % tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    expert = tl.load(experts + block).to(tl.int64)
    if expert > PAST:
        pair = tl.load(order + block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        lives = pair < pairs
        source = x + (pair if DOWN else pair // CHOSEN) * K
        # -1: nothing is read, and what comes out is 0.
        reads = lives & (expert >= 0)
        owned = (n < N) & (expert >= 0)
        weights = weight + tl.maximum(expert, 0) * N * K + n.to(tl.int64) * K
        k = tl.arange(0, BLOCK_K)
        if TILE > 0:
            at = tl.maximum(expert, 0) * tl.cdiv(K, GROUP) * N
            tall = rows_product(
                source, reads, weight + tl.maximum(expert, 0) * size_of(KIND, N, K, TILE), weight_scales + at,
                offsets + at, n, owned, 0, N, K, (K + TILE - 1) // TILE, GROUP, TILE, KIND, OFFSETS, BLOCK_M, BLOCK_N,
            )  # fmt: skip
            sums = tl.trans(tall)
        elif BLOCK_M < 64:  # the weight as the tall operand: the tensor cores of Hopper want 64 rows
            tall = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            for start in range(0, K, BLOCK_K):
                inside = start + k < K
                a = tl.load(source[:, None] + (start + k)[None, :], reads[:, None] & inside[None, :], 0.0)
                w = tl.load(weights[:, None] + (start + k)[None, :], owned[:, None] & inside[None, :], 0.0)
                tall = tl.dot(w, tl.trans(a), tall, input_precision="ieee")
            sums = tl.trans(tall)
        else:
            sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            for start in range(0, K, BLOCK_K):
                inside = start + k < K
                a = tl.load(source[:, None] + (start + k)[None, :], reads[:, None] & inside[None, :], 0.0)
                w = tl.load(weights[:, None] + (start + k)[None, :], owned[:, None] & inside[None, :], 0.0)
                sums = tl.dot(a, tl.trans(w), sums, input_precision="ieee")
        if FP8:
            sums *= tl.load(in_scale) * tl.load(weight_scales + tl.maximum(expert, 0))
        if BIASED:
            sums += tl.load(bias + tl.maximum(expert, 0) * N + n, n < N, 0.0)[None, :]
        target = pair
        if DOWN:  # a row's results one after the other are partial sums for the next norm
            sums *= tl.load(shares + pair, lives, 0.0)[:, None]
            target = pair % CHOSEN * rows + pair // CHOSEN
        mask = lives[:, None] & (n < N)[None, :]
        tl.store(out + target[:, None] * N + n[None, :], sums.to(out.dtype.element_ty), mask)


# The routed MLP ------------------------------------------------------------------------------------------------------


@kernel(do_not_specialize=["step"])
def _shared_kernel(
    x, gate_weight, delta, step, out,
    N: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, GATED: tl.constexpr
):  # fmt: skip
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    values = sum_parts(delta + row * N + columns, step, mask, PARTS)
    if GATED:
        h = tl.load(x + row * N + columns, mask=mask, other=0.0).to(tl.float32)
        values *= tl.sigmoid(tl.sum(h * tl.load(gate_weight + columns, mask=mask, other=0.0), 0))
    tl.store(out + row * N + columns, values.to(out.dtype.element_ty), mask=mask)


TENSORS = ("weight", "scales", "input_scale", "offsets", "bias")
"""Of :class:`Experts`, with a place for each expert."""


@dataclass(frozen=True)
class Experts:
    """One linear of all experts; of the three ways in which its weights may be kept, each uses what it needs."""

    weight: torch.Tensor
    """[E, N, K] in the compute dtype or e4m3; of codes with scales along their inputs [E, K / tile, N, bytes]."""
    outputs: int
    inputs: int
    scales: torch.Tensor | None = None
    """float32, of e4m3 whose inputs are e4m3 too: [E]; of such codes [E, G, N] in any type."""
    input_scale: torch.Tensor | None = None
    """float32: the one of all experts, since a row is rounded once for all of its; [1] or, while they are read, [E]."""
    cut: tuple[int, int, int, int] = (0, 0, 0, 0)
    """GROUP, TILE, KIND and OFFSETS of such codes, as the kernels have them; a tile of 0 says that there are none."""
    offsets: torch.Tensor | None = None
    """[E, G, N]."""
    bias: torch.Tensor | None = None
    """[E, N] float32."""

    @classmethod
    def of_codes(cls, codes: GroupedCodes, outputs: int, inputs: int) -> Experts:
        """Of a single expert."""
        cut = codes.group, codes.tile, int(codes.kind), int(codes.offset_kind)
        return cls(codes.codes[None], outputs, inputs, codes.scales[None], None, cut, codes.offsets[None])

    def with_bias(self, bias: torch.Tensor | None) -> Experts:
        """A single expert with ``bias`` [N]."""
        return self if bias is None else replace(self, bias=bias.float().to(self.weight.device)[None])

    def room(self, count: int) -> Experts:
        """Room for ``count`` experts like this one."""
        return self._each(lambda tensor: tensor.new_empty(count, *tensor.shape[1:]))

    def put(self, number: int, expert: Experts) -> bool:
        """Writes a single expert to its place; False if it is kept in another way."""
        if expert._kind() != self._kind():
            return False
        for name in TENSORS:
            if (tensor := getattr(self, name)) is not None:
                tensor[number] = getattr(expert, name)[0]
        return True

    def done(self) -> Experts:
        """When all are there."""
        return self if self.input_scale is None else replace(self, input_scale=self.input_scale.amax())

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Experts:
        tensors = ((name, getattr(self, name)) for name in TENSORS)
        changed: dict[str, Any] = {name: change(each) for name, each in tensors if each is not None}
        return replace(self, **changed)

    def _kind(self) -> tuple[object, ...]:
        tensors = (getattr(self, name) for name in TENSORS)
        return self.cut, *(None if each is None else (each.dtype, each.shape[1:]) for each in tensors)

    @property
    def fp8(self) -> bool:
        return self.input_scale is not None


@dataclass(frozen=True)
class Shared:
    """The expert that works for every row."""

    gate_up: CudaLinear
    down: CudaLinear
    gate: torch.Tensor | None
    """[N] float32."""


class CudaMixture:
    """A routed MLP."""

    def __init__(
        self,
        mixture: MixtureSpec,
        router: torch.Tensor,
        correction: torch.Tensor | None,
        gate_up: Experts,
        down: Experts,
        shared: Shared | None,
        activation: str,
        dtype: torch.dtype,
        router_bias: torch.Tensor | None,
        multiprocessors: int,
    ) -> None:
        """``router`` [E, N] in the compute dtype if that holds it exactly, else float32; its bias [E] in float32."""
        self.mixture, self.correction = mixture, correction
        self.router, self.router_bias = PlainLinear(router, None), router_bias
        self.gate_up, self.down, self.shared = gate_up, down, shared
        self.activation, self.dtype, self.multiprocessors = activation, dtype, multiprocessors
        self.few_outputs = FEW_OUTPUTS[0]
        """Of a program that computes a pair by itself."""
        self.block_rows = dict(BLOCK_ROWS)

    def __call__(self, x: Activation, step: CudaStep) -> torch.Tensor:
        """``[T, N]`` -> partial sums [S, T, N], in a fixed order."""
        values = x.values
        ids, shares = route(
            router_logits(values, self.router.weight),
            self.mixture,
            self.correction,
            step.attention.slots,
            step.idle,
            self.router_bias,
        )
        few = ids.numel() <= self.mixture.experts
        out = self._few(values, ids, shares) if few else self._many(values, ids, shares)
        if self.shared is not None:
            self._add_shared(values, self.shared, out[-1])
        return out

    def _gate(self, wide: torch.Tensor) -> torch.Tensor:
        form = Form.FP8_STATIC if self.down.fp8 else Form.PLAIN
        return gate(wide, self.activation, self.dtype, form, self.down.input_scale, self.mixture.clamp).values

    def _room(self, parts: int, rows: int, size: int, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        parts += self.shared is not None
        return torch.empty(parts, rows, size, dtype=dtype, device=x.device)

    def try_few(self) -> None:
        """Computes a row of zeros with the first experts, to be timed."""
        device, chosen = self.router.weight.device, self.mixture.chosen
        x = torch.zeros(1, self.gate_up.inputs, dtype=self.dtype, device=device)
        ids = torch.arange(chosen, dtype=torch.int32, device=device)[None]
        self._few(x, ids, torch.ones(1, chosen, device=device))

    def try_many(self, routes: torch.Tensor) -> None:
        """Computes rows of zeros with the experts ``routes`` [T, C] int32, to be timed."""
        x = torch.zeros(len(routes), self.gate_up.inputs, dtype=self.dtype, device=routes.device)
        self._many(x, routes, torch.ones(routes.shape, device=routes.device))

    def _few(self, x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        rows, chosen = ids.shape
        one, two = self.gate_up, self.down
        wide_n, size, inner = one.outputs, one.inputs, two.inputs
        block_n, block_k = self.few_outputs, 256 if one.fp8 else 128
        programs = ids.numel() * cdiv(wide_n, block_n)
        pieces = self._pieces(programs, one, block_k, MOST_PARTS)
        wide = torch.empty(pieces, ids.numel(), wide_n, dtype=torch.float32, device=x.device)
        _rows_in_kernel[(ids.numel(), cdiv(wide_n, block_n), pieces)](
            x, _or(one.input_scale, x), one.weight, _or(one.scales, x), _or(one.offsets, x), _or(one.bias, x), ids,
            wide, wide_n, size, chosen, block_n, min(block_k, next_power_of_2(size)),
            one.bias is not None, one.fp8, *one.cut, pieces,
            num_warps=4, num_stages=4, **LAUNCH,
        )  # fmt: skip
        read = self._gate(wide)
        # As many pieces as fill the device; each adds up some of a row's experts.
        splits = min(chosen, 4 if rows <= 4 else 2)
        each = cdiv(chosen, splits)
        splits = cdiv(chosen, each)
        programs = rows * cdiv(size, block_n) * splits
        pieces = self._pieces(programs, two, block_k, MOST_PARTS // splits)
        out = self._room(splits * pieces, rows, size, x, torch.float32)
        _rows_out_kernel[(rows, cdiv(size, block_n), splits * pieces)](
            read, _or(two.input_scale, x), two.weight, _or(two.scales, x), _or(two.offsets, x), _or(two.bias, x), ids,
            shares, out, rows,
            size, inner, chosen, each, block_n, min(block_k, next_power_of_2(inner)),
            two.bias is not None, two.fp8, *two.cut, pieces,
            num_warps=4, num_stages=4, **LAUNCH,
        )  # fmt: skip
        return out

    def rows_of_block(self, pairs: int) -> int:
        """Where there are so many pairs of a row and an expert."""
        each = pairs / self.mixture.experts
        return next((rows for most, rows in self.block_rows.items() if each <= most), MOST_BLOCK_ROWS)

    def _pieces(self, programs: int, linear: Experts, block_k: int, most: int) -> int:
        """Into how many pieces the inputs of so many programs are cut, so that the device has enough of them."""
        tile = linear.cut[1]
        tiles = cdiv(linear.inputs, tile or block_k)
        pieces = 1
        for more in range(2, min(most, tiles) + 1):
            if programs * pieces >= 3 * self.multiprocessors:
                break
            if tiles % more == 0:
                pieces = more
        return pieces

    def _many(self, x: torch.Tensor, ids: torch.Tensor, shares: torch.Tensor) -> torch.Tensor:
        rows, chosen = ids.shape
        one, two = self.gate_up, self.down
        wide_n, size = one.outputs, one.inputs
        pairs = ids.numel()
        sorted_ = sort_pairs(ids, self.mixture.experts, self.rows_of_block(pairs))
        read = quantise(x, Form.FP8_STATIC, one.input_scale).values if one.fp8 else x
        wide = torch.empty(pairs, wide_n, dtype=self.dtype, device=x.device)
        self._blocks(read, one, sorted_, shares, wide, rows, False)
        out = self._room(chosen, rows, size, x, self.dtype)
        self._blocks(self._gate(wide), two, sorted_, shares, out, rows, True)
        return out

    def _blocks(
        self,
        x: torch.Tensor,
        linear: Experts,
        sorted_: Sorted,
        shares: torch.Tensor,
        out: torch.Tensor,
        rows: int,
        down: bool,
    ) -> None:
        outputs, inputs = linear.outputs, linear.inputs
        block_n, warps, stages = block_plan(linear, sorted_.size)
        block_n = min(block_n, next_power_of_2(outputs))
        block_k = min(128 if linear.fp8 else 64, next_power_of_2(inputs))
        _blocks_kernel[(len(sorted_.experts) * cdiv(outputs, block_n),)](
            x, _or(linear.input_scale, x), linear.weight, _or(linear.scales, x), _or(linear.offsets, x),
            _or(linear.bias, x), sorted_.order, sorted_.experts, shares, out, shares.numel(), rows,
            outputs, inputs, self.mixture.chosen, sorted_.size, block_n, block_k,
            linear.bias is not None, linear.fp8, *linear.cut, down,
            num_warps=warps, num_stages=stages, **LAUNCH,
        )  # fmt: skip

    def _add_shared(self, x: torch.Tensor, shared: Shared, out: torch.Tensor) -> None:
        reader, writer = shared.gate_up, shared.down
        read = Activation(x) if reader.form == Form.PLAIN else quantise(x, reader.form, reader.input_scale)
        wide = reader(read)
        delta = writer(gate(wide, self.activation, self.dtype, writer.form, writer.input_scale))
        parts, step = parts_of(delta)
        rows, size = x.shape
        block = next_power_of_2(size)
        _shared_kernel[(rows,)](
            x, _or(shared.gate, x), delta, step, out, size, block, parts, shared.gate is not None,
            num_warps=min(16, max(1, block // 512)), **LAUNCH,
        )  # fmt: skip


def block_plan(linear: Experts, size: int) -> tuple[int, int, int]:
    """Outputs, warps and stages of a program for blocks of ``size`` rows: of those tried the fastest on an H200, where
    FP8 in blocks reads 3.7 to 3.8 TB/s with 32 rows and 128 experts (2.2 to 2.4 with 128 outputs and 4 warps)."""
    _, tile, kind, _ = linear.cut
    few = size < 64
    if tile and kind == Kind.E4M3:
        return (64, 2, 4) if few else (128, 8, 3)
    if tile and kind == Kind.FLOATS and not few:
        return (128, 4, 4) if size == 64 else (256, 8, 3)
    return 128, 4 if few else 8, 4


def _or(tensor: torch.Tensor | None, other: torch.Tensor) -> torch.Tensor:
    """Something to point to where a kernel does not look."""
    return other if tensor is None else tensor
