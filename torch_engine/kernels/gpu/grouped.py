"""Products with weights whose codes have scales along the inputs: FP8 in blocks of 128x128, and bytes in groups.

For few rows such a product is bound by reading the codes once: they become numbers in registers, beside activations in
the compute dtype. For many rows the weight is written out once into scratch memory for the library's product.

Shapes: T rows, K inputs, N outputs, G groups of inputs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.language.extra import cuda

from flightline.torch_engine.kernels.gpu.activation import Activation, Form
from flightline.torch_engine.kernels.gpu.launch import LAUNCH, OVERLAPS, begin_kernel
from flightline.torch_engine.model.coded import Coded

FEW_ROWS = 128
"""Most rows of our own products where nothing was timed. An estimate by bytes: up to here the codes are read at most
twice, half a byte each, and writing a weight out and reading it again is 4.5 bytes."""
ROWS_AT_ONCE = 64
WIDEST = 128
"""Most inputs of a tile."""

_OVERLAPS = tl.constexpr(OVERLAPS)


class Kind(IntEnum):
    """What a byte of codes is."""

    E4M3 = 0
    WHOLE = 1
    """An unsigned code."""


class Offsets(IntEnum):
    """What a group has besides its scale."""

    NONE = 0
    ZEROS = 1
    """A code that means zero: a weight is (code - zero) * scale."""
    MINIMA = 2
    """A number that is added: a weight is code * scale + minimum."""


E4M3 = tl.constexpr(int(Kind.E4M3))
ZEROS, MINIMA = tl.constexpr(int(Offsets.ZEROS)), tl.constexpr(int(Offsets.MINIMA))


@dataclass(frozen=True)
class GroupedPlan:
    """How a weight is cut up among programs."""

    block_n: int
    splits: int
    """Pieces of the inner dimension, each with a partial sum of its own: enough programs to fill the device."""
    warps: int
    stages: int


def plans_of(
    shapes: Iterable[tuple[int, int, int]],
    outputs: int,
    tiles: int,
    multiprocessors: int,
    waves: tuple[int, ...],
) -> list[GroupedPlan]:
    """Plans worth timing for a weight of so many tiles along its inputs; the first is a fair guess.

    ``shapes`` are outputs of a program, warps and stages; few outputs are only for weights that more do not fit. Each
    shape comes with so many splits that every multiprocessor has ``waves`` programs.
    """
    plans: list[GroupedPlan] = []
    for block_n, warps, stages in shapes:
        if outputs % block_n or (block_n < 64 and plans):
            continue
        for each in waves:
            splits = 1
            while (
                splits < 8
                and tiles % (2 * splits) == 0
                and outputs // block_n * splits < each * multiprocessors
            ):
                splits *= 2
            plan = GroupedPlan(block_n, splits, warps, stages)
            if plan not in plans:
                plans.append(plan)
    return plans


@triton.jit
def _numbers(codes, KIND: tl.constexpr, like: tl.constexpr):
    """Codes as numbers of the compute dtype, which holds each of them."""
    if KIND == E4M3:
        codes = codes.to(tl.float32)
    return codes.to(like)


@triton.jit(do_not_specialize=["rows"])
def _product_kernel(
    x, codes, scales, offsets, bias, out, rows,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, KIND: tl.constexpr,
    OFFSETS: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    if _OVERLAPS:
        cuda.gdc_launch_dependents()
    TILES: tl.constexpr = K // TILE // SPLITS
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m, w = tl.program_id(2) * ROWS + tl.arange(0, ROWS), tl.arange(0, TILE)
    mask = (m < rows)[:, None]
    if _OVERLAPS:
        cuda.gdc_wait()
    total = tl.zeros([BLOCK_N, ROWS], tl.float32)
    for tile in range(split * TILES, (split + 1) * TILES):
        byte = tl.load(codes + tile * N * TILE + n[:, None] * TILE + w[None, :])
        k = tile * TILE
        a = tl.load(x + m[:, None] * K + k + w[None, :], mask=mask, other=0.0)
        part = tl.dot(_numbers(byte, KIND, x.dtype.element_ty), tl.trans(a), input_precision="ieee")
        # A tile lies in one group: its scale is applied to the sums, which are fewer than the weights.
        at = (k // GROUP) * N + n
        if OFFSETS > 0:
            sums = tl.sum(a.to(tl.float32), 1)[None, :]
        if OFFSETS == ZEROS:
            part -= tl.load(offsets + at).to(tl.float32)[:, None] * sums
        part *= tl.load(scales + at).to(tl.float32)[:, None]
        if OFFSETS == MINIMA:
            part += tl.load(offsets + at).to(tl.float32)[:, None] * sums
        total += part
    if BIASED and split == 0:
        total += tl.load(bias + n).to(tl.float32)[:, None]
    target = out + (split * rows + m).to(tl.int64)[None, :] * N + n[:, None]
    tl.store(target, total, mask=(m < rows)[None, :])


@triton.jit
def _write_out_kernel(
    codes, scales, offsets, out,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr, KIND: tl.constexpr,
    OFFSETS: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    begin_kernel()
    tile = tl.program_id(0)
    n, w = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, TILE)
    values = _numbers(tl.load(codes + tile * N * TILE + n[:, None] * TILE + w[None, :]), KIND, tl.float32)
    k = tile * TILE
    at = (k // GROUP) * N + n
    if OFFSETS == ZEROS:
        values -= tl.load(offsets + at).to(tl.float32)[:, None]
    values *= tl.load(scales + at).to(tl.float32)[:, None]
    if OFFSETS == MINIMA:
        values += tl.load(offsets + at).to(tl.float32)[:, None]
    tl.store(out + n.to(tl.int64)[:, None] * K + k + w[None, :], values.to(out.dtype.element_ty))


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
        at_once = min(ROWS_AT_ONCE, max(self.least_rows, triton.next_power_of_2(rows)))
        out = torch.empty(plan.splits, rows, self.outputs, dtype=torch.float32, device=values.device)
        self.product(values, out, plan, at_once)
        return out

    def weight(self) -> torch.Tensor:
        """[N, K], written out into the scratch memory."""
        out = self._scratch.take(self.outputs, self.inputs)
        self.write_out(out, min(64, self.outputs & -self.outputs))
        return out

    @abstractmethod
    def plans(self, rows: int) -> list[GroupedPlan]:
        """Worth timing for so many rows."""

    @abstractmethod
    def product(self, x: torch.Tensor, out: torch.Tensor, plan: GroupedPlan, at_once: int) -> None:
        """Partial sums into ``out`` [S, T, N], in a fixed order; a program has ``at_once`` rows."""

    @abstractmethod
    def write_out(self, out: torch.Tensor, block_n: int) -> None:
        """The weight into ``out`` [N, K]; a program has ``block_n`` outputs."""


def tile_of(coded: Coded) -> int | None:
    """Inputs of a tile, which lies in one group; None if none fits."""
    outputs, inputs = coded.codes.shape
    tiles = [WIDEST >> shift for shift in range(4)]
    fitting = [tile for tile in tiles if inputs % tile == 0 and coded.group % tile == 0]
    return fitting[0] if fitting and outputs % 16 == 0 else None


class GroupedLinear(CodedLinear):
    """Codes that are bytes."""

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
        self.kind = Kind.E4M3 if coded.codes.dtype.is_floating_point else Kind.WHOLE
        tiles = coded.codes.view(torch.uint8).view(self.outputs, self.inputs // tile, tile).transpose(0, 1)
        self.codes = tiles.contiguous().view(coded.codes.dtype)
        self.scales = coded.scales.t().contiguous()
        self.offset_kind = Offsets.NONE
        self.offsets = self.scales
        if coded.offsets is not None:
            self.offset_kind = Offsets.MINIMA if coded.offsets.is_floating_point() else Offsets.ZEROS
            self.offsets = coded.offsets.t().contiguous()

    def plans(self, rows: int) -> list[GroupedPlan]:
        shapes = ((64, 4, 5), (128, 4, 4), (64, 4, 3), (32, 4, 5), (16, 4, 4))
        return plans_of(shapes, self.outputs, self.inputs // self.tile, self.multiprocessors, (2, 4))

    def product(self, x: torch.Tensor, out: torch.Tensor, plan: GroupedPlan, at_once: int) -> None:
        _product_kernel[(self.outputs // plan.block_n, plan.splits, triton.cdiv(len(x), at_once))](
            x, self.codes, self.scales, self.offsets, out if self.bias is None else self.bias, out, len(x),
            self.outputs, self.inputs, self.group, self.tile, int(self.kind), int(self.offset_kind),
            self.bias is not None, at_once, plan.block_n, plan.splits,
            num_warps=plan.warps, num_stages=plan.stages, **LAUNCH,
        )  # fmt: skip

    def write_out(self, out: torch.Tensor, block_n: int) -> None:
        _write_out_kernel[(self.inputs // self.tile, self.outputs // block_n)](
            self.codes, self.scales, self.offsets, out,
            self.outputs, self.inputs, self.group, self.tile, int(self.kind), int(self.offset_kind), block_n,
            num_warps=4, **LAUNCH,
        )  # fmt: skip
