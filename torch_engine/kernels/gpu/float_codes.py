"""Products with weights of e2m1, floating point numbers of 4 bits, which have scales along the inputs: MXFP4, NVFP4.

A word of 16 bits holds four codes, one of each quarter of a tile's inputs, as wide as the numbers that they become
(``four_bits.py`` says why). Its bits lie so that a shift and a mask put three of the codes where bfloat16 has its sign,
the last bits of its exponent and the first of its mantissa; the fourth has what is left, and takes three shifts.

A code with its bits there is 2^126 times too small, which the product with its scale puts right, also of 0.5: a
subnormal number on either side. Scales times 2^126 would be too large for bfloat16, so sums are ``LEFT`` too small and
multiplied by that in the end.

Shapes: T rows, K inputs, N outputs, G groups of inputs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flightline.torch_engine.kernels.gpu.launch import INTERPRETED, settled
from flightline.torch_engine.model.coded import Coded

QUARTERS = 4
TILES = (128, 64)
"""Inputs of a tile: a quarter has at least the 16 inputs of one instruction of the tensor cores."""
LARGEST = 2.0**30
"""What scales in bfloat16 must be less than; no model's are near."""
SIZES, SIGNS = (6, 3, 0, None), (15, 12, 9, 14)
"""Where in a word the sizes of the quarters' codes begin, three bits of each, and where their signs are."""
LAST_LOW, LAST_HIGH = 10, 13
"""Of the last quarter's size the lower two bits, and the third."""
_LEFT = tl.constexpr(2.0**32)
_MORE = tl.constexpr(2.0**94)
"""2^126 / _LEFT."""


def arrange(codes: torch.Tensor, tile: int) -> torch.Tensor:
    """[N, K] uint8 to int16 [tiles, N, tile / 4]: what a program reads at once lies together; zeros fill the last."""
    outputs, inputs = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -inputs % tile))
    quarters = padded.view(outputs, -1, QUARTERS, tile // QUARTERS).permute(2, 1, 0, 3)
    words = torch.zeros(quarters.shape[1:], dtype=torch.int16, device=codes.device)
    for number, (size, sign) in enumerate(
        zip(SIZES, SIGNS, strict=True)
    ):  # one by one: they are wider than codes
        quarter = quarters[number].to(torch.int16)
        words |= (quarter >> 3) << sign
        if size is not None:
            words |= (quarter & 7) << size
        else:
            words |= (quarter & 3) << LAST_LOW | (quarter >> 2 & 1) << LAST_HIGH
    return words


def assembly() -> str:
    """PTX that takes two words, $4, apart: four pairs of numbers in bfloat16, times the scales $5 to $8."""
    moved = ["mov.b32 codes, $4;", "shl.b32 codes, $4, 3;", "shl.b32 codes, $4, 6;"]
    parts = [f"{move} and.b32 codes, codes, 0x81c081c0;" for move in moved]
    parts.append(
        "shr.b32 codes, $4, 4; and.b32 codes, codes, 0x00c000c0; "
        "shr.b32 more, $4, 5; lop3.b32 codes, more, 0x01000100, codes, 0xea; "
        "shl.b32 more, $4, 1; lop3.b32 codes, more, 0x80008000, codes, 0xea;"
    )
    scaled = [
        f"{part} fma.rn.bf16x2 ${number}, codes, ${QUARTERS + 1 + number}, nothing;"
        for number, part in enumerate(parts)
    ]
    return f"{{ .reg .b32 codes, more, nothing; mov.b32 nothing, 0x80008000; {' '.join(scaled)} }}"


SCALED = tl.constexpr(assembly())


@triton.jit
def _from_e2m1(codes, like: tl.constexpr):
    """Codes of sign, two bits of exponent and one of mantissa, as numbers of the compute dtype.

    Their bits are moved to where a 16-bit type has its own; a product with a power of two moves its exponent's zero.
    """
    KIND: tl.constexpr = tl.float16 if like == tl.float32 else like
    LAST: tl.constexpr = 6 if tl.bfloat16 == KIND else 9  # the mantissa's first bit
    MORE: tl.constexpr = 2.0**126 if tl.bfloat16 == KIND else 2.0**14
    moved = (codes & 7) << LAST | (codes & 8) << 12
    return (moved.to(tl.int16).to(KIND, bitcast=True) * MORE).to(like)


@triton.jit
def _code(words, quarter: tl.constexpr):
    """The codes of a quarter, int32."""
    wide = words.to(tl.int32)
    if quarter == 3:
        return (wide >> 10 & 3) | (wide >> 11 & 4) | (wide >> 11 & 8)
    return (wide >> 6 - 3 * quarter & 7) | (wide >> 12 - 3 * quarter & 8)


@triton.jit
def numbers_of(words, quarter: tl.constexpr, scale, like: tl.constexpr):
    """A quarter of ``words`` [N, W], of rows with a ``scale`` each, in ``like``, rounded once."""
    return (_from_e2m1(_code(words, quarter), tl.float32) * scale.to(tl.float32)[:, None]).to(like)


@triton.constexpr_function
def in_assembly(like: tl.dtype, scale: tl.dtype) -> bool:
    return not INTERPRETED and like == tl.bfloat16 and scale == tl.bfloat16


@triton.jit
def _scaled(words, first, second, third, fourth, like: tl.constexpr):
    """Four quarters [N, W] in ``like``, of rows with a scale each; in assembly 1 / _LEFT of that."""
    if in_assembly(like, first.dtype):
        result = tl.inline_asm_elementwise(
            SCALED, "=&r,=&r,=&r,=&r,r,r,r,r,r",
            [words, _wide(first, words), _wide(second, words), _wide(third, words), _wide(fourth, words)],
            dtype=(tl.bfloat16, tl.bfloat16, tl.bfloat16, tl.bfloat16), is_pure=True, pack=2,
        )  # fmt: skip
    else:
        result = (
            numbers_of(words, 0, first, like),
            numbers_of(words, 1, second, like),
            numbers_of(words, 2, third, like),
            numbers_of(words, 3, fourth, like),
        )
    return result


@triton.jit
def _wide(scale, words):
    return tl.broadcast_to((scale.to(tl.float32) * _MORE).to(scale.dtype)[:, None], words.shape)


@triton.jit
def scale_of(
    scales, tile, quarter: tl.constexpr, n, owned,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """What a quarter of a tile is multiplied by, of rows ``n`` [BLOCK_N] of the weight; 0 behind the last input."""
    group = (tile * TILE + quarter * (TILE // 4)) // GROUP
    if K % TILE > 0:
        owned = owned & (group < tl.cdiv(K, GROUP))
    return tl.load(scales + group * N + n, owned, 0.0)


@triton.jit
def _scales_of(
    scales, tile, n, owned,
    N: tl.constexpr, K: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr
):  # fmt: skip
    """Those of a tile's quarters. Several groups' are loaded at once: two bytes a thread cannot be asked for ahead."""
    COUNT: tl.constexpr = max(TILE // GROUP, 1)
    if COUNT == 1:
        one = scale_of(scales, tile, 0, n, owned, N, K, GROUP, TILE)
        result = one, one, one, one
    else:
        group = tile * COUNT + tl.arange(0, COUNT)[:, None]
        wanted = owned[None, :]
        if K % TILE > 0:
            wanted = wanted & (group < tl.cdiv(K, GROUP))
        each = tl.trans(tl.load(scales + group * N + n[None, :], wanted, 0.0))
        if COUNT == 2:
            one, three = tl.split(each)
            result = one, one, three, three
        else:
            even, odd = tl.split(tl.reshape(each, [n.shape[0], 2, 2]))
            one, three = tl.split(even)
            two, four = tl.split(odd)
            result = one, two, three, four
    return result


@triton.jit
def float_product(
    source, reads, words, scales, n, owned, first,
    N: tl.constexpr, K: tl.constexpr, TILES: tl.constexpr, GROUP: tl.constexpr, TILE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """As ``grouped.rows_product``: the weight is scaled before the product, which adds up all tiles by itself, and
    whose operands, scales among them, the compiler asks for several tiles ahead."""
    WIDTH: tl.constexpr = TILE // 4
    w = tl.arange(0, WIDTH)
    like: tl.constexpr = source.dtype.element_ty
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    for tile in range(first, first + TILES):
        word = tl.load(words + (tile * N + n)[:, None] * WIDTH + w[None, :], owned[:, None], 0)
        one, two, three, four = _scales_of(scales, tile, n, owned, N, K, GROUP, TILE)
        quarters = _scaled(word, one, two, three, four, like)
        for quarter in tl.static_range(4):
            k = tile * TILE + quarter * WIDTH + w
            wanted = reads[:, None]
            if K % TILE > 0:
                wanted = wanted & (k < K)[None, :]
            a = tl.load(source[:, None] + k[None, :], wanted, 0.0)
            total = tl.dot(quarters[quarter], tl.trans(a), total, input_precision="ieee")
        total = settled(total)
    if in_assembly(like, scales.dtype.element_ty):
        total *= _LEFT
    return total


def tile_for(coded: Coded) -> int | None:
    """Inputs of a tile, whose quarters lie in one group each; the last may end beyond the inputs. None: no tile fits,
    or a scale is too large."""
    scales, inputs = coded.scales, coded.codes.shape[1]
    if scales.dtype == torch.bfloat16 and not bool(scales.amax() < LARGEST):
        return None
    fitting = [
        tile
        for tile in TILES
        if coded.group % (tile // QUARTERS) == 0 and (coded.group % tile == 0 or tile % coded.group == 0)
    ]
    whole = [tile for tile in fitting if inputs % tile == 0]
    return next(iter(whole or fitting[-1:]), None)
