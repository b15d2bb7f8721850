"""The assembly that takes 4-bit codes apart on a GPU, carried out here instruction by instruction.

Triton's interpreter knows no inline assembly: there, and for float32, the kernel has the same in Triton's language,
which test_triton_ops.py compares with PyTorch. On a GPU the same tests run the assembly itself.
"""

from __future__ import annotations

import importlib.util
import math
import re

import pytest
import torch

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="Triton's language is not installed: pip install triton",
)


def pairs(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """Bits of 16 as registers of 32, in int64."""
    return (low & 0xFFFF) | (high & 0xFFFF) << 16


def numbers(register: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """[2, M]: the lower and the upper number of each register."""
    return torch.stack([register & 0xFFFF, register >> 16]).to(torch.uint16).view(dtype)


def lop3(a: torch.Tensor, b: int, c: int | torch.Tensor, table: int) -> torch.Tensor:
    """PTX's logic of three operands: bit 4 a + 2 b + c of the table, for each of their bits."""
    result = torch.zeros_like(a)
    for bit in range(32):
        at = (a >> bit & 1) * 4 + (b >> bit & 1) * 2 + (c >> bit & 1)
        result |= (table >> at & 1) << bit
    return result


def carried_out(text: str, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The registers after ``text``: of PTX only what it may consist of."""
    registers = dict(inputs)
    for instruction in filter(None, (part.strip() for part in text.strip("{ }").split(";"))):
        name, rest = instruction.split(" ", 1)
        operands = re.split(r",\s*", rest)
        if name == ".reg":
            continue
        target, *read = operands
        values = [registers[each] if each in registers else int(each, 0) for each in read]
        if name == "mov.b32":
            registers[target] = torch.zeros_like(next(iter(inputs.values()))) + values[0]
        elif name == "shr.b32":
            registers[target] = values[0] >> values[1]
        elif name == "shl.b32":
            registers[target] = values[0] << values[1] & 0xFFFFFFFF
        elif name == "and.b32":
            registers[target] = values[0] & values[1]
        elif name == "lop3.b32":
            registers[target] = lop3(*values)
        else:
            assert name == {torch.bfloat16: "fma.rn.bf16x2", torch.float16: "fma.rn.f16x2"}[dtype]
            one, other, added = (numbers(value, dtype).double() for value in values)
            low, high = (one * other + added).to(dtype).view(torch.int16).long()
            registers[target] = pairs(low, high)
    return registers


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_assembly_takes_every_word_apart(dtype: torch.dtype) -> None:
    from flightline.torch_engine.kernels.gpu import four_bits

    text, moved = {
        torch.bfloat16: (four_bits.BFLOAT16.value, four_bits.LESS_128.value),
        torch.float16: (four_bits.FLOAT16.value, four_bits.LESS_1024.value),
    }[dtype]
    words = torch.arange(2**16)
    others, zeros = words.flip(0), words // 7 % 16
    added = pairs(zeros | moved, (15 - zeros) | moved)
    registers = carried_out(text, {"$4": pairs(words, others), "$5": added}, dtype)
    for quarter in range(four_bits.QUARTERS):
        low, high = numbers(registers[f"${quarter}"], dtype).long()
        assert torch.equal(low, (words >> 4 * quarter & 15) - zeros)
        assert torch.equal(high, (others >> 4 * quarter & 15) - (15 - zeros))


def test_assembly_scales_every_word_of_floats() -> None:
    """As whoever arranges the codes lays them, with scales of all sizes that MXFP4 may have here."""
    from flightline.torch_engine.kernels.gpu import float_codes

    floats = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    floats = torch.cat([floats, -floats]).double()
    every = torch.arange(2**16)
    codes = torch.stack([every >> 4 * at & 15 for at in range(4)]).to(torch.uint8)
    # A tile of 64 inputs, of which all but the first of each quarter are 0.
    tiles = torch.zeros(2**16, 4, 16, dtype=torch.uint8)
    tiles[:, :, 0] = codes.t()
    words = float_codes.arrange(tiles.flatten(1), 64)[0, :, 0].long() & 0xFFFF
    assert len(words.unique()) == 2**16, "no two of them are the same"
    exponents = [every // (13 + at) % 150 - 120 for at in range(4)]
    assert max(exponent.max() for exponent in exponents) < 30 == math.log2(float_codes.LARGEST)
    scales = [2.0**exponent for exponent in exponents]
    bits = [(scale * 2.0**94).to(torch.bfloat16).view(torch.int16).long() for scale in scales]
    assert float_codes._MORE.value == 2.0**94
    names = {f"${5 + at}": pairs(each, each.flip(0)) for at, each in enumerate(bits)}
    registers = carried_out(
        float_codes.SCALED.value, {"$4": pairs(words, words.flip(0)), **names}, torch.bfloat16
    )
    for at in range(4):
        low, high = numbers(registers[f"${at}"], torch.bfloat16)
        expected = floats[codes[at].int()] * scales[at]
        # What is smaller than the smallest number is 0 then: 2^-101 after all.
        expected = (expected / float_codes._LEFT.value).to(torch.bfloat16)
        assert torch.equal(low, expected) and torch.equal(high, expected.flip(0))
        assert torch.equal(low.signbit(), expected.signbit())


@pytest.mark.parametrize(
    ("group", "inputs", "tile"),
    [(128, 384, 128), (32, 384, 128), (16, 384, 64), (576, 576, 64), (96, 384, None), (32, 96, None)],
)
def test_tiles(group: int, inputs: int, tile: int | None) -> None:
    """A quarter of a tile lies in one group; what no tile fits is dequantised, and said."""
    from flightline.torch_engine.kernels.gpu.four_bits import tile_of
    from flightline.torch_engine.model.coded import Coded

    codes = torch.zeros(16, inputs, dtype=torch.uint8)
    assert tile_of(Coded(codes, torch.ones(16, -(-inputs // group)), group, bits=4)) == tile


@pytest.mark.parametrize(
    ("group", "inputs", "largest", "tile"),
    [
        *((32, 256, 1.0, 128), (32, 2880, 2.0**29, 64), (16, 256, 1.0, 64), (32, 96, 1.0, 64)),
        *((24, 96, 1.0, None), (32, 256, 2.0**30, None), (32, 256, torch.inf, None)),
    ],
)
def test_tiles_of_floats(group: int, inputs: int, largest: float, tile: int | None) -> None:
    """The last tile may end beyond the inputs; scales that would overflow are left to whoever dequantises."""
    from flightline.torch_engine.kernels.gpu.grouped import tile_of
    from flightline.torch_engine.model.coded import Coded

    scales = torch.ones(16, -(-inputs // group), dtype=torch.bfloat16)
    scales[3, -1] = largest
    codes = torch.zeros(16, inputs, dtype=torch.uint8)
    assert tile_of(Coded(codes, scales, group, bits=4, e2m1=True)) == tile
