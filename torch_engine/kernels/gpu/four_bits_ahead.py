"""Products of many rows with weights of 4-bit codes, whose numbers are made while others are multiplied: Hopper only.

The plain kernel (``four_bits.py``) makes a tile's numbers, multiplies, and waits for that before it makes the next: its
compiler cannot tell which registers a product still reads. Here, in Triton's lower language (Gluon), the numbers of one
half of a tile are made while the other half is multiplied. Words and rows come by the copy engine, into rings in shared
memory; words, which no kernel writes, before the kernel in front has ended.

There is no interpreter for this language: results are compared on a GPU, in the tests.
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

from flightline.torch_engine.kernels.gpu.hopper import barrier
from flightline.torch_engine.kernels.gpu.launch import LAUNCH, cdiv

TILE = 128
"""Inputs of a tile, of which a word has one of each quarter."""
_TILE, _HALF, _WIDTH = gl.constexpr(TILE), gl.constexpr(TILE // 2), gl.constexpr(TILE // 4)
_LESS_128 = gl.constexpr(0xC300 - 0x10000)
"""-128 as bfloat16: or-ing the code that means zero into its last bits subtracts that, too (``four_bits.py``)."""


def assembly(half: int) -> str:
    """PTX that takes two quarters out of two words, as ``four_bits.assembly`` does all of them."""
    quarters = [
        f"shr.b32 codes, $2, {4 * quarter}; lop3.b32 codes, codes, 0x000f000f, 0x43004300, 0xea; "
        f"fma.rn.bf16x2 ${at}, codes, one, $3;"
        for at, quarter in enumerate((2 * half, 2 * half + 1))
    ]
    return f"{{ .reg .b32 codes, one; mov.b32 one, 0x3f803f80; {' '.join(quarters)} }}"


_LOWER, _UPPER = gl.constexpr(assembly(0)), gl.constexpr(assembly(1))


@gluon.jit
def _numbers(words, marks, SCALE: gl.constexpr, MINIMA: gl.constexpr, ASSEMBLY: gl.constexpr):
    """Half a tile [N, 64] in bfloat16: codes of ``words`` [N, 32] less the code that means zero, times the scale, plus
    the minimum, of which ``marks`` [N] have two each."""
    A: gl.constexpr = words.type.layout
    N: gl.constexpr = words.shape[0]
    scale = marks.to(gl.int16).to(SCALE, bitcast=True).to(gl.float32)[:, None]
    upper = (marks >> 16).to(gl.int16)
    if MINIMA:
        moved = gl.full([N], _LESS_128, gl.int16, gl.SliceLayout(1, A)).to(gl.bfloat16, bitcast=True)
    else:
        moved = (upper | _LESS_128).to(gl.bfloat16, bitcast=True)
    moved, _ = gl.broadcast(moved[:, None], words)
    first, second = gl.inline_asm_elementwise(
        ASSEMBLY, "=r,=r,r,r", [words, moved], dtype=(gl.bfloat16, gl.bfloat16), is_pure=True, pack=2
    )
    first, second = first.to(gl.float32) * scale, second.to(gl.float32) * scale
    if MINIMA:
        minimum = upper.to(SCALE, bitcast=True).to(gl.float32)[:, None]
        first, second = first + minimum, second + minimum
    both = gl.join(first.to(gl.bfloat16), second.to(gl.bfloat16)).permute([0, 2, 1]).reshape([N, _HALF])
    return gl.convert_layout(both, A, assert_trivial=True)


@gluon.jit
def _ask_words(words, line, slot, there, bytes_, bars, ring):
    """Those of a tile, which begin at ``line``, if it is ``there``; says how many bytes there will be with its rows."""
    mbarrier.expect(bars.index(slot), bytes_, pred=there)
    tma.async_copy_global_to_shared(words, [line, 0], bars.index(slot), ring.index(slot), pred=there)


@gluon.jit
def _ask_rows(x, row, column, slot, there, bars, ring):
    """Both halves of a tile, which begins at ``column``, of the rows."""
    for half in gl.static_range(2):
        place = ring.index(2 * slot + half)
        tma.async_copy_global_to_shared(x, [row, column + half * _HALF], bars.index(slot), place, pred=there)


@gluon.jit
def _four_bit_ahead_kernel(
    x, words, marks, bias, out, apart,
    N: gl.constexpr, K: gl.constexpr, GROUP: gl.constexpr, SCALE: gl.constexpr, MINIMA: gl.constexpr,
    BIASED: gl.constexpr, ROWS: gl.constexpr, BLOCK_N: gl.constexpr, SPLITS: gl.constexpr, STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    gdc_launch_dependents()
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, ROWS, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, SUMS, 2)
    COUNT: gl.constexpr = K // SPLITS // _TILE
    BYTES: gl.constexpr = words.block_type.nbytes + 2 * x.block_type.nbytes
    split = gl.program_id(1)
    at_n, row, first = gl.program_id(0) * BLOCK_N, gl.program_id(2) * ROWS, split * (K // SPLITS)
    w_ring = gl.allocate_shared_memory(words.dtype, [STAGES, BLOCK_N, _WIDTH], words.layout)
    x_ring = gl.allocate_shared_memory(x.dtype, [2 * STAGES, ROWS, _HALF], x.layout)
    bars = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(bars.index(i), count=1)
    fence_async_shared()
    barrier()
    line = first // _TILE * N + at_n
    for i in gl.static_range(STAGES):
        _ask_words(words, line + i * N, i, i < COUNT, BYTES, bars, w_ring)
    mark = marks + at_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, A))
    lower = gl.load(mark + first // GROUP * N)
    upper = gl.load(mark + (first + _HALF) // GROUP * N)
    gdc_wait()
    for i in gl.static_range(STAGES):
        _ask_rows(x, row, first + i * _TILE, i, i < COUNT, bars, x_ring)
    sums = gl.zeros([BLOCK_N, ROWS], gl.float32, SUMS)
    mbarrier.wait(bars.index(0), 0)
    word = w_ring.index(0).load(A)
    a = _numbers(word, lower, SCALE, MINIMA, _LOWER)
    for t in range(COUNT):
        slot = t % STAGES
        sums = warpgroup_mma(a, x_ring.index(2 * slot).permute((1, 0)), sums, is_async=True)
        barrier()  # all warps have read the tile before this
        ahead = t - 1 + STAGES
        there = (t > 0) & (ahead < COUNT)
        _ask_words(words, line + ahead * N, ahead % STAGES, there, BYTES, bars, w_ring)
        _ask_rows(x, row, first + ahead * _TILE, ahead % STAGES, there, bars, x_ring)
        b = _numbers(word, upper, SCALE, MINIMA, _UPPER)
        sums = warpgroup_mma(b, x_ring.index(2 * slot + 1).permute((1, 0)), sums, is_async=True)
        # Marks of the next tile, or of the last once more.
        k = first + gl.minimum(t + 1, COUNT - 1) * _TILE
        lower = gl.load(mark + k // GROUP * N)
        upper = gl.load(mark + (k + _HALF) // GROUP * N)
        # An operand is named where it is waited for: so its registers are nobody else's until then.
        sums, a = warpgroup_mma_wait(1, deps=(sums, a))
        after = (t + 1) % STAGES
        mbarrier.wait(bars.index(after), (t + 1) // STAGES & 1, pred=t + 1 < COUNT)
        word = w_ring.index(after).load(A)
        a = _numbers(word, lower, SCALE, MINIMA, _LOWER)
        sums, b = warpgroup_mma_wait(0, deps=(sums, b))
    if BIASED and split == 0:
        n = at_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, SUMS))
        sums += gl.load(bias + n).to(gl.float32)[:, None]
    barrier()  # the rings are read no more: this may lie where they did
    turned = gl.allocate_shared_memory(out.dtype, [ROWS, BLOCK_N], out.layout)
    turned.permute((1, 0)).store(sums.to(out.dtype))
    fence_async_shared()
    barrier()
    tma.async_copy_shared_to_global(out, [split * apart + row, at_n], turned)
    tma.store_wait(0)


def product_ahead(
    x: torch.Tensor,
    words: torch.Tensor,
    marks: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    group: int,
    scale: gl.dtype,
    minima: bool,
    rows: int,
    block_n: int,
    splits: int,
    stages: int,
    warps: int,
) -> None:
    """``x`` [T, K] in bfloat16 times a weight [N, K], as ``four_bits.FourBitLinear`` has it in tiles of ``TILE`` inputs
    and groups of whole halves of that. A program has ``rows`` rows, and ``out`` has room for those of all programs:
    [R, N], or [S, R, N] of partial sums."""
    tiles, outputs, width = words.shape
    inputs = tiles * TILE
    of_rows = gl.NVMMASharedLayout.get_default_for([rows, TILE // 2], gl.bfloat16)
    of_words = gl.NVMMASharedLayout.get_default_for([block_n, width], gl.int16)
    flat = out.view(-1, outputs)
    kind = gl.bfloat16 if out.dtype == torch.bfloat16 else gl.float32
    of_out = gl.NVMMASharedLayout.get_default_for([rows, block_n], kind)
    _four_bit_ahead_kernel[(outputs // block_n, splits, cdiv(len(x), rows))](
        TensorDescriptor(x, [len(x), inputs], [inputs, 1], [rows, TILE // 2], of_rows),
        TensorDescriptor(words, [tiles * outputs, width], [width, 1], [block_n, width], of_words),
        marks, flat if bias is None else bias,
        TensorDescriptor(flat, [*flat.shape], [outputs, 1], [rows, block_n], of_out), len(flat) // splits,
        outputs, inputs, group, scale, minima, bias is not None, rows, block_n, splits, stages,
        num_warps=warps, **LAUNCH,
    )  # fmt: skip
