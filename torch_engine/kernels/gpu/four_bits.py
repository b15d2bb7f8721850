"""Products with weights of 4-bit codes, which become numbers where the tensor cores read them.

A word of 16 bits holds four codes, one of each quarter of a tile's inputs. Words are as wide as the numbers that they
become, so a tile of words is laid out over the threads as the tensor cores want their operand, and so is each quarter
that is taken out of it: no number moves between threads. What a group has lies in one mark, read ahead like the words.

Shapes: T rows, K inputs, N outputs, G groups of inputs.
"""

from __future__ import annotations

import dataclasses

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from flightline.torch_engine.kernels.gpu.grouped import (
    MOST_SPLITS,
    CodedLinear,
    GroupedPlan,
    Scratch,
    plans_of,
)
from flightline.torch_engine.kernels.gpu.launch import (
    INTERPRETED,
    LAUNCH,
    OVERLAPS,
    WAITS_LATER,
    begin_kernel,
    cdiv,
    kernel,
    prefetch,
    settled,
)
from flightline.torch_engine.model.coded import Coded

QUARTERS = 4
WIDEST = 128
"""Most inputs of a tile."""
NARROWEST = 64
"""A quarter has at least the 16 inputs of one instruction of the tensor cores."""
SHAPES = ((64, 4, 5), (64, 2, 5), (128, 4, 4), (32, 2, 5), (16, 1, 4))
WIDE_SHAPES = ((128, 4, 4), (256, 8, 3), (64, 4, 4), (32, 2, 5), (16, 1, 4))
MANY_SHAPES = ((128, 8, 3), (64, 4, 4))
"""Outputs of a program, warps and stages: for up to ``MOST_OF_FEW`` rows, for more, and for ``MANY_ROWS`` a program."""
SCALED_SHAPES = ((128, 8, 3), (256, 8, 3))
"""For ``MANY_ROWS``, or twice as many where outputs are not more, of weights that are scaled before the product: more
work for each weight, which so many rows share, and one sum that nobody has to wait for."""
AHEAD_SHAPES = ((128, 256, 8, 3), (256, 128, 8, 4))
"""Outputs, rows, warps and stages of a program of ``four_bits_ahead``, of which a multiprocessor has one."""
MOST_OF_FEW = 16
MANY_ROWS = 128
PREFETCHED = 4
"""Most tiles of its weight that a program asks for while the kernel before it still runs: as many bytes of a row as the
FP8 products ask for (``linear.PREFETCH``)."""

_OVERLAPS = tl.constexpr(OVERLAPS)
_ASSEMBLY = tl.constexpr(not INTERPRETED)


# Codes to numbers ----------------------------------------------------------------------------------------------------


def assembly(bfloat16: bool) -> str:
    """PTX that takes two words apart: their codes plus a negative number each, as pairs of numbers, quarter by quarter.

    Or-ing a code into the last bits of 128 (1024 in float16) makes that number plus the code, for two codes in one
    instruction. The number that is added, of $5, takes that away again, and the code that means zero. All of these are
    whole numbers that the type holds, so nothing is rounded.
    """
    kind, moved, one = (
        ("bf16x2", "0x43004300", "0x3f803f80") if bfloat16 else ("f16x2", "0x64006400", "0x3c003c00")
    )
    quarters = [
        f"shr.b32 codes, $4, {4 * quarter}; lop3.b32 codes, codes, 0x000f000f, {moved}, 0xea; "
        f"fma.rn.{kind} ${quarter}, codes, one, $5;"
        for quarter in range(QUARTERS)
    ]
    return f"{{ .reg .b32 codes, one; mov.b32 one, {one}; {' '.join(quarters)} }}"


BFLOAT16, FLOAT16 = tl.constexpr(assembly(True)), tl.constexpr(assembly(False))
LESS_128, LESS_1024 = tl.constexpr(0xC300 - 0x10000), tl.constexpr(0xE400 - 0x10000)
"""-128 as bfloat16 and -1024 as float16, as bits: or-ing a zero into the last ones subtracts it, too."""


@triton.jit
def _numbers(words, zeros, like: tl.constexpr):
    """Four quarters [N, W], in ``like``: the codes of ``words`` less ``zeros`` [N], both int16."""
    if _ASSEMBLY and like == tl.bfloat16:
        moved = (zeros | LESS_128).to(like, bitcast=True)
        result = tl.inline_asm_elementwise(
            BFLOAT16, "=r,=r,=r,=r,r,r", [words, tl.broadcast_to(moved[:, None], words.shape)],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    elif _ASSEMBLY and like == tl.float16:
        moved = (zeros | LESS_1024).to(like, bitcast=True)
        result = tl.inline_asm_elementwise(
            FLOAT16, "=r,=r,=r,=r,r,r", [words, tl.broadcast_to(moved[:, None], words.shape)],
            dtype=(tl.float16, tl.float16, tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        wide, less = words.to(tl.int32), zeros.to(tl.int32)[:, None]
        result = (
            ((wide & 15) - less).to(like),
            ((wide >> 4 & 15) - less).to(like),
            ((wide >> 8 & 15) - less).to(like),
            ((wide >> 12 & 15) - less).to(like),
        )
    return result


@triton.jit
def _halves(marks, SCALE: tl.constexpr):
    """Scales in float32, and the upper halves of ``marks`` as integers."""
    if marks.dtype == tl.int32:
        lower, upper = marks.to(tl.int16), (marks >> 16).to(tl.int16)
    else:
        lower, upper = marks.to(tl.int32), (marks >> 32).to(tl.int32)
    return lower.to(SCALE, bitcast=True).to(tl.float32), upper


# Kernels -------------------------------------------------------------------------------------------------------------


@triton.constexpr_function
def _asked_for(tiles: int) -> int:
    """Of so many tiles: a power of two."""
    return 1 << (min(PREFETCHED, tiles).bit_length() - 1)


@kernel(do_not_specialize=["rows"])
def _four_bit_product_kernel(
    x, words, marks, bias, out, rows,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr,
    MINIMA: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    SCALED: tl.constexpr,
):  # fmt: skip
    if _OVERLAPS:
        cuda.gdc_launch_dependents()
    WIDTH: tl.constexpr = TILE // 4
    RUN: tl.constexpr = 4 if GROUP >= TILE else GROUP // WIDTH  # quarters of a tile that lie in one group
    EACH: tl.constexpr = K // SPLITS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m, w = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, WIDTH)
    mask = (m < rows)[:, None]
    first = words + (split * EACH // 4) * N
    ahead = tl.arange(0, _asked_for(EACH // TILE))[:, None] * WIDTH * N
    prefetch(first + tl.program_id(0) * BLOCK_N * WIDTH + ahead, BLOCK_N * WIDTH * 2)
    if _OVERLAPS:
        cuda.gdc_wait()
    like: tl.constexpr = x.dtype.element_ty
    ours = first + n[:, None] * WIDTH + w[None, :]
    inputs = x + m[:, None] * K + split * EACH + w[None, :]
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for k in range(0, EACH, TILE):
        word = tl.load(ours + k // 4 * N)
        for begin in tl.static_range(0, 4, RUN):
            group = (split * EACH + k + begin * WIDTH) // GROUP
            scale, offset = _halves(tl.load(marks + group * N + n), SCALE)
            quarters = _numbers(word, tl.zeros([BLOCK_N], tl.int16) if MINIMA else offset.to(tl.int16), like)
            if SCALED:
                for quarter in tl.static_range(begin, begin + RUN):
                    a = tl.trans(tl.load(inputs + k + quarter * WIDTH, mask=mask, other=0.0))
                    numbers = quarters[quarter].to(tl.float32) * scale[:, None]
                    if MINIMA:
                        numbers += offset.to(SCALE, bitcast=True).to(tl.float32)[:, None]
                    total = tl.dot(numbers.to(like), a, total, input_precision="ieee")
            else:
                part = tl.zeros([BLOCK_N, ROWS], tl.float32)
                sums = tl.zeros([BLOCK_N, ROWS], tl.float32)
                for quarter in tl.static_range(begin, begin + RUN):
                    a = tl.trans(tl.load(inputs + k + quarter * WIDTH, mask=mask, other=0.0))
                    part = tl.dot(quarters[quarter], a, part, input_precision="ieee")
                    if MINIMA:
                        sums = tl.dot(tl.full([BLOCK_N, WIDTH], 1.0, like), a, sums, input_precision="ieee")
                # The scale is applied to the sums, which are fewer than the weights.
                total += part * scale[:, None]
                if MINIMA:
                    total += sums * offset.to(SCALE, bitcast=True).to(tl.float32)[:, None]
        if SCALED:
            total = settled(total)
    if BIASED and split == 0:
        total += tl.load(bias + n).to(tl.float32)[:, None]
    target = out + (split * rows + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(target, total, mask=(m < rows)[None, :])


@kernel()
def _four_bit_write_out_kernel(
    words, marks, out,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, SCALE: tl.constexpr,
    MINIMA: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin_kernel()
    WIDTH: tl.constexpr = TILE // 4
    tile = tl.program_id(0)
    n, w = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, WIDTH)
    word = tl.load(words + tile * N * WIDTH + n[:, None] * WIDTH + w[None, :]).to(tl.int32)
    for quarter in tl.static_range(4):
        k = tile * TILE + quarter * WIDTH
        scale, offset = _halves(tl.load(marks + k // GROUP * N + n), SCALE)
        codes = word >> 4 * quarter & 15
        if MINIMA:
            minimum = offset.to(SCALE, bitcast=True).to(tl.float32)
            values = codes.to(tl.float32) * scale[:, None] + minimum[:, None]
        else:
            values = (codes - offset.to(tl.int32)[:, None]).to(tl.float32) * scale[:, None]
        tl.store(out + n.to(tl.int64)[:, None] * K + k + w[None, :], values.to(out.dtype.element_ty))


# The linear ----------------------------------------------------------------------------------------------------------


def tile_of(coded: Coded) -> int | None:
    """Inputs of a tile, each quarter of which lies in one group; None if none fits, or the codes are no whole ones."""
    if coded.bits != 4 or coded.e2m1:
        return None
    outputs, inputs = coded.codes.shape
    fitting = [
        tile
        for tile in (WIDEST, NARROWEST)
        if inputs % tile == 0 and coded.group % (tile // QUARTERS) == 0 and _one_run(coded.group, tile)
    ]
    return fitting[0] if fitting and outputs % 16 == 0 else None


def _one_run(group: int, tile: int) -> bool:
    """Whether tiles and groups begin together: else a group could end within a tile's run of quarters."""
    return group % tile == 0 or tile % group == 0


class FourBitLinear(CodedLinear):
    """4-bit codes with a scale for each output and group of inputs; activations in the compute dtype."""

    least_rows = 8

    def __init__(
        self,
        coded: Coded,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        scratch: Scratch,
        multiprocessors: int,
    ) -> None:
        """``coded`` must have a :func:`tile_of`."""
        tile = tile_of(coded)
        assert tile is not None
        super().__init__(coded, tile, bias, dtype, scratch, multiprocessors)
        self.words = _words(coded.codes, tile)
        self.marks, self.scale, self.minima = _marks(coded)

    def plans(self, rows: int) -> list[GroupedPlan]:
        """A program reads all activations: of many rows that is more than its codes, unless it has many outputs."""
        few = rows <= MOST_OF_FEW
        return plans_of(
            SHAPES if few else WIDE_SHAPES,
            self.outputs,
            self.inputs // self.tile,
            self.multiprocessors,
            (2, 4, 8) if few else (2,),
            2 * MOST_SPLITS if few else MOST_SPLITS,
        )

    def many_plans(self) -> list[GroupedPlan]:
        many, scaled = (
            plans_of(shapes, self.outputs, self.inputs // self.tile, self.multiprocessors, (0.7, 1))
            for shapes in (MANY_SHAPES, SCALED_SHAPES)
        )
        plans = [dataclasses.replace(plan, rows=MANY_ROWS) for plan in many]
        for plan in scaled:
            rows = MANY_ROWS * 2 if plan.block_n <= MANY_ROWS else MANY_ROWS
            plans.append(dataclasses.replace(plan, rows=rows, scaled=True))
        return plans + (self._ahead_plans() if self._goes_ahead() else [])

    def _goes_ahead(self) -> bool:
        """Whether the weight is one that ``four_bits_ahead`` reads, on a device that it is for."""
        fits = self.tile == WIDEST and self.group % (WIDEST // 2) == 0 and self.marks.dtype == torch.int32
        return WAITS_LATER and fits and self.dtype == torch.bfloat16

    def _ahead_plans(self) -> list[GroupedPlan]:
        plans = []
        for block_n, rows, warps, stages in AHEAD_SHAPES:
            shape = [(block_n, warps, stages)]
            for plan in plans_of(
                shape, self.outputs, self.inputs // self.tile, self.multiprocessors, (0.7, 1)
            ):
                plans.append(dataclasses.replace(plan, rows=rows, ahead=True))
        return plans

    def product(self, x: torch.Tensor, out: torch.Tensor, plan: GroupedPlan, at_once: int) -> None:
        if plan.ahead:
            from flightline.torch_engine.kernels.gpu.four_bits_ahead import product_ahead

            how = (self.group, self.scale, self.minima, at_once)
            shape = (plan.block_n, plan.splits, plan.stages, plan.warps)
            product_ahead(x, self.words, self.marks, self.bias, out, *how, *shape)
            return
        _four_bit_product_kernel[(self.outputs // plan.block_n, plan.splits, cdiv(len(x), at_once))](
            x, self.words, self.marks, out if self.bias is None else self.bias, out, len(x),
            self.outputs, self.inputs, self.group, self.tile, self.scale, self.minima,
            self.bias is not None, at_once, plan.block_n, plan.splits, plan.scaled,
            num_warps=plan.warps, num_stages=plan.stages, **LAUNCH,
        )  # fmt: skip

    def write_out(self, out: torch.Tensor, block_n: int) -> None:
        _four_bit_write_out_kernel[(self.inputs // self.tile, self.outputs // block_n)](
            self.words, self.marks, out,
            self.outputs, self.inputs, self.group, self.tile, self.scale, self.minima, block_n,
            num_warps=4, **LAUNCH,
        )  # fmt: skip


def _words(codes: torch.Tensor, tile: int) -> torch.Tensor:
    """[N, K] uint8 to int16 [K / tile, N, tile / 4]: what a program reads at once lies together."""
    outputs, inputs = codes.shape
    quarters = codes.view(outputs, inputs // tile, QUARTERS, tile // QUARTERS).permute(1, 0, 2, 3)
    low, high = (quarters[:, :, at] | quarters[:, :, at + 1] << 4 for at in (0, 2))
    return torch.stack([low, high], dim=-1).view(torch.int16)[..., 0].contiguous()


def _marks(coded: Coded) -> tuple[torch.Tensor, tl.dtype, bool]:
    """What each group has [G, N]: its scale in the lower half, in the upper one the code that means zero or a minimum.

    With them the type of a scale (and minimum), and whether it is a minimum. A half is as wide as the stored numbers.
    """
    scales, offsets = coded.scales.t(), coded.offsets
    minima = offsets is not None and offsets.is_floating_point()
    if scales.element_size() != 2 or (minima and offsets is not None and offsets.dtype != scales.dtype):
        scales = scales.float()
    half, whole = (torch.int16, torch.int32) if scales.element_size() == 2 else (torch.int32, torch.int64)
    upper = torch.zeros_like(scales, dtype=half)
    if offsets is not None:
        upper = offsets.t().to(scales.dtype).contiguous().view(half) if minima else offsets.t().to(half)
    marks = torch.stack([scales.contiguous().view(half), upper], dim=-1).view(whole)[..., 0]
    kind = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}[scales.dtype]
    return marks.contiguous(), kind, minima
