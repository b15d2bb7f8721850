"""The assembly that takes 4-bit codes apart on a GPU, carried out here instruction by instruction.

Triton's interpreter knows no inline assembly: there, and for float32, the kernel has the same in Triton's language,
which test_triton_ops.py compares with PyTorch. On a GPU the same tests run the assembly itself.
"""

from __future__ import annotations

import importlib.util
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


def lop3(a: torch.Tensor, b: int, c: int, table: int) -> torch.Tensor:
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
            registers[target] = torch.full_like(next(iter(inputs.values())), values[0])
        elif name == "shr.b32":
            registers[target] = values[0] >> values[1]
        elif name == "mul.lo.u32":
            registers[target] = values[0] * values[1] & 0xFFFFFFFF
        elif name == "and.b32":
            registers[target] = values[0] & values[1]
        elif name == "prmt.b32":  # bytes 0 to 3 are the first operand's, which the second's 0 follow
            assert values[1] == 0
            picked = [values[2] >> 4 * at & 15 for at in range(4)]
            registers[target] = sum(
                (values[0] >> 8 * byte & 0xFF if byte < 4 else 0) << 8 * at for at, byte in enumerate(picked)
            )
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


@pytest.mark.parametrize("half", [0, 1])
def test_assembly_scales_every_pair_of_floats(half: int) -> None:
    """Each byte in each of its four places, with scales of all sizes that MXFP4 has where the product is a number."""
    from flightline.torch_engine.kernels.gpu import grouped

    floats = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    floats = torch.cat([floats, -floats])
    codes = torch.arange(2**16)
    places = [codes & 0xFF, codes >> 8, 255 - (codes & 0xFF), (codes + 77) & 0xFF]
    word = sum(byte << 8 * at for at, byte in enumerate(places))
    scales = [2.0 ** (codes // (13 + at) % 240 - 120) for at in range(4)]
    bits = [scale.to(torch.bfloat16).view(torch.int16).long() for scale in scales]
    inputs = {"$2": word, "$3": pairs(*bits[:2]), "$4": pairs(*bits[2:])}
    registers = carried_out([grouped.LOWER, grouped.UPPER][half].value, inputs, torch.bfloat16)
    made = [*numbers(registers["$0"], torch.bfloat16), *numbers(registers["$1"], torch.bfloat16)]
    for got, byte, scale in zip(made, places, scales, strict=True):
        expected = (floats[byte >> 4 * half & 15].double() * scale).to(torch.bfloat16)
        assert torch.equal(got, expected)
        assert torch.equal(got.signbit(), expected.signbit())


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
