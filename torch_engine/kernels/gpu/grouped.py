"""Products with weights whose codes have scales along the inputs: FP8 in blocks of 128x128, and integers in groups.

For few rows such a product is bound by reading the codes once: they become numbers in registers, beside activations in
the compute dtype. For many rows the weight is written out once into scratch memory for the library's product.

Shapes: T rows, K inputs, N outputs, G groups of inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from enum import IntEnum

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra import cuda

from flightline.torch_engine.kernels.gpu import float_codes
from flightline.torch_engine.kernels.gpu.activation import Activation, Form
from flightline.torch_engine.kernels.gpu.float_codes import float_product, numbers_of, scale_of
from flightline.torch_engine.kernels.gpu.launch import (
    LAUNCH,
    OVERLAPS,
    begin_kernel,
    cdiv,
    kernel,
    next_power_of_2,
    settled,
)
from flightline.torch_engine.model.coded import Coded

FEW_ROWS = 128
"""Most rows of our own products where nothing was timed. An estimate by bytes: up to here the codes are read at most
twice, half a byte each, and writing a weight out and reading it again is 4.5 bytes."""
ROWS_AT_ONCE = 64
MANY_SHAPES = ((128, 8, 2), (64, 4, 3))
"""Outputs of a program, warps and stages, with ``MANY_ROWS`` a program."""
MANY_ROWS = 256
WIDEST = 128
"""Most inputs of a tile."""

_OVERLAPS = tl.constexpr(OVERLAPS)


class Kind(IntEnum):
    """What a byte of codes is."""

    E4M3 = 0
    WHOLE = 1
    """An unsigned code."""
    PAIR = 2
    """Two codes of 4 bits, the lower one of the first half of a tile's inputs."""
    FLOATS = 3
    """Not a byte but a word of four codes of e2m1 (``float_codes.py``)."""


class Offsets(IntEnum):
    """What a group has besides its scale."""

    NONE = 0
    ZEROS = 1
    """A code that means zero: a weight is (code - zero) * scale."""
    MINIMA = 2
    """A number that is added: a weight is code * scale + minimum."""


E4M3, PAIR = tl.constexpr(int(Kind.E4M3)), tl.constexpr(int(Kind.PAIR))
FLOATS = tl.constexpr(int(Kind.FLOATS))
ZEROS, MINIMA = tl.constexpr(int(Offsets.ZEROS)), tl.constexpr(int(Offsets.MINIMA))


MOST_SPLITS, FEWEST_TILES = 8, 6
"""Pieces of the inner dimension, each of which costs whoever adds them up; tiles that each of more pieces has."""


@dataclass(frozen=True)
class GroupedPlan:
    """How a weight is cut up among programs."""

    block_n: int
    splits: int
    """Pieces of the inner dimension, each with a partial sum of its own: enough programs to fill the device."""
    warps: int
    stages: int
    rows: int = ROWS_AT_ONCE
    """The most of a program: its codes become numbers once for all of them."""
    scaled: bool = False
    """Weights are scaled before the product, not sums after it."""
    ahead: bool = False
    """By ``four_bits_ahead``."""


def plans_of(
    shapes: Iterable[tuple[int, int, int]],
    outputs: int,
    tiles: int,
    multiprocessors: int,
    waves: tuple[float, ...],
    most: int = MOST_SPLITS,
) -> list[GroupedPlan]:
    """Plans worth timing for a weight of so many tiles along its inputs; the first is a fair guess.

    ``shapes`` are outputs of a program, warps and stages; few outputs are only for weights that more do not fit. Each
    shape comes with so many splits that every multiprocessor has ``waves`` programs: up to ``MOST_SPLITS``, or ``most``
    of a weight with so many inputs that each still has ``FEWEST_TILES``.
    """
    plans: list[GroupedPlan] = []
    for block_n, warps, stages in shapes:
        if outputs % block_n or (block_n < 64 and plans):
            continue
        for each in waves:
            splits = 1
            while (
                splits < (MOST_SPLITS if tiles < 2 * splits * FEWEST_TILES else most)
                and tiles % (2 * splits) == 0
                and outputs // block_n * splits < each * multiprocessors
            ):
                splits *= 2
            plan = GroupedPlan(block_n, splits, warps, stages)
            if plan not in plans:
                plans.append(plan)
    return plans


@triton.jit
def _numbers(codes, half: tl.constexpr, KIND: tl.constexpr, like: tl.constexpr):
    """Codes as numbers of the compute dtype, which holds each of them; pairs are moved up by :func:`_moved`."""
    if KIND == E4M3:
        numbers = codes.to(tl.float32).to(like)
    elif KIND == PAIR:
        numbers = (codes >> (4 * half)) & 15
        # A power of two whose last bits are the code: converting would cost more than all else done to a weight.
        if like == tl.bfloat16:
            numbers = (numbers.to(tl.int16) | 0x4300).to(like, bitcast=True)
        elif like == tl.float16:
            numbers = (numbers.to(tl.int16) | 0x6400).to(like, bitcast=True)
        else:
            numbers = numbers.to(like)
    else:
        numbers = codes.to(like)
    return numbers


@triton.constexpr_function
def halves_of(kind: int) -> int:
    """Codes in a byte."""
    return 2 if kind == Kind.PAIR else 1


@triton.constexpr_function
def size_of(kind: int, outputs: int, inputs: int, tile: int) -> int:
    """Elements of a whole weight's codes."""
    row: int = -(-inputs // tile) * tile // 4 if kind == Kind.FLOATS else inputs // halves_of(kind)
    return outputs * row


@triton.constexpr_function
def _moved(kind: int, like: tl.dtype) -> int:
    """What a code of a pair is more than it says."""
    if kind != Kind.PAIR:
        return 0
    return 128 if like == tl.bfloat16 else 1024 if like == tl.float16 else 0


@triton.jit
def _of_halves(
    values, tile, n, owned,
    N: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, HALVES: tl.constexpr
):  # fmt: skip
    """What belongs to the halves of a tile, of rows ``n`` of the weight, for each: a half lies in one group."""
    if HALVES == 1 or GROUP % TILE == 0:
        lower = tl.load(values + (tile * TILE // GROUP) * N + n, owned, 0.0)
        return lower, lower
    half = tl.arange(0, 2)
    group = (tile * TILE + half * (TILE // 2)) // GROUP
    both = tl.load(values + group[:, None] * N + n[None, :], owned[None, :], 0.0)
    return tl.split(tl.trans(both))


@triton.jit
def rows_product(
    source, reads, codes, scales, offsets, n, owned, first,
    N: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, KIND: tl.constexpr,
    OFFSETS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Rows of inputs, which begin at the pointers ``source`` [BLOCK_M], times rows ``n`` of a weight, over TILES tiles
    from ``first`` on: [BLOCK_N, BLOCK_M] float32; 0 of rows that are not in ``reads``, and of rows of the weight that
    are not ``owned``.

    The weight is the tall operand: the tensor cores of Hopper want 64 rows of that. Codes that are floats are scaled
    before the product, which then adds up all tiles by itself, and whose operands, scales among them, the compiler asks
    for several tiles ahead. Others are scaled after it, together with their offset.
    """
    if KIND == FLOATS:
        total = float_product(
            source, reads, codes, scales, n, owned, first, N, K, TILES, GROUP, TILE, BLOCK_M, BLOCK_N
        )
    else:
        HALVES: tl.constexpr = halves_of(KIND)
        WIDTH: tl.constexpr = TILE // HALVES
        MOVED: tl.constexpr = _moved(KIND, source.dtype.element_ty)
        NOTHING: tl.constexpr = 0.0 if KIND == E4M3 else 0
        w = tl.arange(0, WIDTH)
        total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        for tile in range(first, first + TILES):
            byte = tl.load(codes + (tile * N + n)[:, None] * WIDTH + w[None, :], owned[:, None], NOTHING)
            lower, upper = _of_halves(scales, tile, n, owned, N, GROUP, TILE, HALVES)
            if OFFSETS > 0:
                lower_offset, upper_offset = _of_halves(offsets, tile, n, owned, N, GROUP, TILE, HALVES)
            for half in tl.static_range(HALVES):
                scale = lower if half == 0 else upper
                a = tl.load(source[:, None] + (tile * TILE + half * WIDTH) + w[None, :], reads[:, None], 0.0)
                if KIND == E4M3:
                    numbers = (byte.to(tl.float32) * scale.to(tl.float32)[:, None]).to(
                        source.dtype.element_ty
                    )
                    total = tl.dot(numbers, tl.trans(a), total, input_precision="ieee")
                else:
                    numbers = _numbers(byte, half, KIND, source.dtype.element_ty)
                    part = tl.dot(numbers, tl.trans(a), input_precision="ieee")
                    if OFFSETS > 0 or MOVED > 0:
                        sums = tl.sum(a.to(tl.float32), 1)[None, :]
                    if OFFSETS == ZEROS:
                        part -= (_column(lower_offset if half == 0 else upper_offset) + MOVED) * sums
                    elif MOVED > 0:
                        part -= MOVED * sums
                    part *= _column(scale)
                    if OFFSETS == MINIMA:
                        part += _column(lower_offset if half == 0 else upper_offset) * sums
                    total += part
            if KIND == E4M3:
                total = settled(total)
    return total


@triton.jit
def _column(values):
    return values.to(tl.float32)[:, None]


@kernel(do_not_specialize=["rows"])
def _product_kernel(
    x, codes, scales, offsets, bias, out, rows,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, KIND: tl.constexpr,
    OFFSETS: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    if _OVERLAPS:
        cuda.gdc_launch_dependents()
    TILES: tl.constexpr = (K + TILE - 1) // TILE // SPLITS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    if _OVERLAPS:
        cuda.gdc_wait()
    total = rows_product(
        x + m * K, m < rows, codes, scales, offsets, n, n < N, split * TILES,
        N, K, TILES, GROUP, TILE, KIND, OFFSETS, ROWS, BLOCK_N,
    )  # fmt: skip
    if BIASED and split == 0:
        total += tl.load(bias + n).to(tl.float32)[:, None]
    target = out + (split * rows + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(target, total, mask=(m < rows)[None, :])


@kernel()
def _write_out_kernel(
    codes, scales, offsets, out,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, KIND: tl.constexpr,
    OFFSETS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin_kernel()
    tile = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    target = out + n.to(tl.int64)[:, None] * K
    if KIND == FLOATS:
        w = tl.arange(0, TILE // 4)
        words = tl.load(codes + (tile * N + n)[:, None] * (TILE // 4) + w[None, :])
        for quarter in tl.static_range(4):
            k = tile * TILE + quarter * (TILE // 4) + w[None, :]
            scale = scale_of(scales, tile, quarter, n, n < N, N, K, GROUP, TILE)
            tl.store(target + k, numbers_of(words, quarter, scale, out.dtype.element_ty), k < K)
    else:
        HALVES: tl.constexpr = halves_of(KIND)
        WIDTH: tl.constexpr = TILE // HALVES
        w = tl.arange(0, WIDTH)
        byte = tl.load(codes + tile * N * WIDTH + n[:, None] * WIDTH + w[None, :])
        for half in tl.static_range(HALVES):
            k = tile * TILE + half * WIDTH
            values = _numbers(byte, half, KIND, tl.float32)
            at = (k // GROUP) * N + n
            scale = tl.load(scales + at).to(tl.float32)[:, None]
            if OFFSETS == ZEROS:
                values -= tl.load(offsets + at).to(tl.float32)[:, None]
            values *= scale
            if OFFSETS == MINIMA:
                values += tl.load(offsets + at).to(tl.float32)[:, None]
            tl.store(target + k + w[None, :], values.to(out.dtype.element_ty))


class Scratch:
    """Memory for one written-out weight, shared by all linears: they run one after the other."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._memory: torch.Tensor | None = None

    def reserve(self, size: int) -> None:
        """At load: a captured graph must find the memory where it was."""
        if self._memory is None or size > self._memory.numel():
            self._memory = None
            self._memory = torch.empty(size, dtype=self._dtype, device=self._device)

    def take(self, rows: int, columns: int) -> torch.Tensor:
        assert self._memory is not None
        return self._memory[: rows * columns].view(rows, columns)


def tile_of(coded: Coded) -> int | None:
    """Inputs of a tile, which lies in one group (each of its halves, if two codes share a byte); None if none fits."""
    outputs, inputs = coded.codes.shape
    if coded.e2m1:
        return float_codes.tile_for(coded) if outputs % 16 == 0 else None
    halves = 2 if coded.bits == 4 else 1
    tiles = [WIDEST >> shift for shift in range(4) if WIDEST >> shift >= 16 * halves]
    fitting = [tile for tile in tiles if inputs % tile == 0 and coded.group % (tile // halves) == 0]
    return fitting[0] if fitting and outputs % 16 == 0 else None


@dataclass(frozen=True)
class GroupedCodes:
    """A weight as the kernels read it."""

    codes: torch.Tensor
    """[K / tile, N, bytes of a tile's row], or words of it."""
    scales: torch.Tensor
    """[G, N]."""
    offsets: torch.Tensor
    """[G, N]; the scales once more where there are none."""
    group: int
    tile: int
    kind: Kind
    offset_kind: Offsets

    @classmethod
    def of(cls, coded: Coded) -> GroupedCodes:
        """``coded`` must have a :func:`tile_of`; its order of inputs is left to whoever brings them."""
        tile = tile_of(coded)
        assert tile is not None
        kind = Kind.FLOATS if coded.e2m1 else Kind.PAIR if coded.bits == 4 else Kind.WHOLE
        if coded.codes.dtype.is_floating_point:
            kind = Kind.E4M3
        scales, offsets, offset_kind = coded.scales.t().contiguous(), None, Offsets.NONE
        if coded.offsets is not None:
            offsets = coded.offsets.t().contiguous()
            offset_kind = Offsets.MINIMA if offsets.is_floating_point() else Offsets.ZEROS
        codes = _tiled(coded.codes, tile, kind)
        return cls(
            codes, scales, scales if offsets is None else offsets, coded.group, tile, kind, offset_kind
        )


class CodedLinear(ABC):
    """Codes with a scale for each output and group of inputs; activations in the compute dtype."""

    form = Form.PLAIN
    input_scale: torch.Tensor | None = None
    column_scales: torch.Tensor | None = None
    least_rows = 16
    """What fewer rows are filled up to."""

    def __init__(
        self,
        coded: Coded,
        tile: int,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        scratch: Scratch,
        multiprocessors: int,
    ) -> None:
        self.outputs, self.inputs = coded.codes.shape
        self.group, self.tile, self.bias, self.dtype = coded.group, tile, bias, dtype
        self.order = coded.order
        self.multiprocessors = multiprocessors
        self.chosen: dict[int, GroupedPlan | None] = {FEW_ROWS: self.plans(FEW_ROWS)[0]}
        """The plan up to so many rows, ascending; None and beyond the last: the library."""
        self._scratch = scratch
        scratch.reserve(self.outputs * self.inputs)

    def choose(self, rows: int, plan: GroupedPlan | None) -> None:
        """Takes ``plan`` for up to so many rows, but where one was chosen for fewer; the library for more."""
        self.chosen = {most: kept for most, kept in self.chosen.items() if most < rows} | {rows: plan}

    def plan_of(self, rows: int) -> GroupedPlan | None:
        return next((plan for most, plan in self.chosen.items() if rows <= most), None)

    def __call__(self, x: Activation) -> torch.Tensor:
        values = x.values if self.order is None else x.values.index_select(1, self.order)
        rows = len(values)
        plan = self.plan_of(rows)
        if plan is None:
            return F.linear(values, self.weight(), self.bias)
        at_once = min(plan.rows, max(self.least_rows, next_power_of_2(rows)))
        alone = plan.splits == 1 and plan.rows > ROWS_AT_ONCE  # then the result is as the library's
        room = cdiv(rows, at_once) * at_once if plan.ahead else rows
        shape = (room, self.outputs) if alone else (plan.splits, room, self.outputs)
        out = torch.empty(shape, dtype=self.dtype if alone else torch.float32, device=values.device)
        self.product(values, out, plan, at_once)
        return out.narrow(-2, 0, rows)

    def weight(self) -> torch.Tensor:
        """[N, K], written out into the scratch memory."""
        out = self._scratch.take(self.outputs, self.inputs)
        self.write_out(out, min(64, self.outputs & -self.outputs))
        return out

    @abstractmethod
    def plans(self, rows: int) -> list[GroupedPlan]:
        """Worth timing for so many rows."""

    def many_plans(self) -> list[GroupedPlan]:
        """Worth timing for more than ``ROWS_AT_ONCE``, beside what is best of those."""
        return []

    @abstractmethod
    def product(self, x: torch.Tensor, out: torch.Tensor, plan: GroupedPlan, at_once: int) -> None:
        """Partial sums into ``out`` [S, T, N], in a fixed order, or the only ones into [T, N]; a program has
        ``at_once`` rows, and those that go ahead write them all, whether there are so many or not."""

    @abstractmethod
    def write_out(self, out: torch.Tensor, block_n: int) -> None:
        """The weight into ``out`` [N, K]; a program has ``block_n`` outputs."""


class GroupedLinear(CodedLinear):
    """Codes of every kind; ``four_bits.FourBitLinear`` is for most of those of 4 bits."""

    def __init__(
        self,
        coded: Coded,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
        scratch: Scratch,
        multiprocessors: int,
    ) -> None:
        """``coded`` must have a :func:`tile_of`."""
        own = GroupedCodes.of(coded)
        super().__init__(coded, own.tile, bias, dtype, scratch, multiprocessors)
        self.kind, self.offset_kind = own.kind, own.offset_kind
        self.codes, self.scales, self.offsets = own.codes, own.scales, own.offsets

    def plans(self, rows: int) -> list[GroupedPlan]:
        shapes = ((64, 4, 5), (128, 4, 4), (64, 4, 3), (32, 4, 5), (16, 4, 4))
        return plans_of(shapes, self.outputs, cdiv(self.inputs, self.tile), self.multiprocessors, (2, 4))

    def many_plans(self) -> list[GroupedPlan]:
        """Codes that are floats are scaled before the product, whose only sum leaves registers for many rows."""
        if self.kind not in (Kind.E4M3, Kind.FLOATS):
            return []
        tiles = cdiv(self.inputs, self.tile)
        plans = plans_of(MANY_SHAPES, self.outputs, tiles, self.multiprocessors, (1, 2))
        return [replace(plan, rows=MANY_ROWS) for plan in plans]

    def product(self, x: torch.Tensor, out: torch.Tensor, plan: GroupedPlan, at_once: int) -> None:
        _product_kernel[(self.outputs // plan.block_n, plan.splits, cdiv(len(x), at_once))](
            x, self.codes, self.scales, self.offsets, out if self.bias is None else self.bias, out, len(x),
            self.outputs, self.inputs, self.group, self.tile, int(self.kind), int(self.offset_kind),
            self.bias is not None, at_once, plan.block_n, plan.splits,
            num_warps=plan.warps, num_stages=plan.stages, **LAUNCH,
        )  # fmt: skip

    def write_out(self, out: torch.Tensor, block_n: int) -> None:
        _write_out_kernel[(cdiv(self.inputs, self.tile), self.outputs // block_n)](
            self.codes, self.scales, self.offsets, out,
            self.outputs, self.inputs, self.group, self.tile, int(self.kind), int(self.offset_kind), block_n,
            num_warps=4, **LAUNCH,
        )  # fmt: skip


def _tiled(codes: torch.Tensor, tile: int, kind: Kind) -> torch.Tensor:
    """[N, K] to [K / tile, N, bytes of a tile's row]: what a program reads at once lies together."""
    if kind == Kind.FLOATS:
        return float_codes.arrange(codes, tile)
    outputs, inputs = codes.shape
    tiles = codes.view(torch.uint8).view(outputs, inputs // tile, tile).transpose(0, 1)
    if halves_of(kind) == 2:
        low, high = tiles.chunk(2, dim=2)
        return (low | high << 4).contiguous()
    return tiles.contiguous().view(codes.dtype)
