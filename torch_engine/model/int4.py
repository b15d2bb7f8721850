"""Codes of 4 bits as GPTQ, AWQ and compressed-tensors pack them, taken out of their words of 32 bits; and NVFP4.

A weight is (code - zero) * scale in the first three; they differ in what lies beside what. N outputs, K inputs,
G groups.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch

from flightline.torch_engine.model.coded import Coded
from flightline.torch_engine.model.fields import UnsupportedModel
from flightline.torch_engine.model.quantization import Quantization

Read = Callable[[str], torch.Tensor | None]
"""A tensor of the module by its last name; None if there is none."""
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Which of a word's codes is that of each of eight neighbouring outputs."""
MIDDLE = 8


def read_int4(read: Read, quantization: Quantization, module: str) -> Coded:
    """The module's weight; ``module`` names it in errors.

    Raises UnsupportedModel if its inputs are spread over groups of different sizes.
    """
    if quantization.packing == "flightline":
        return _own(read)
    if quantization.floats:
        return _nvfp4(read, quantization, module)
    codes, scales, zeros = _READERS[quantization.packing](read, quantization)
    inputs = codes.shape[1]
    group = quantization.group or inputs
    if zeros is None:
        zeros = torch.full(scales.shape, MIDDLE, dtype=torch.uint8)
    index = read("weight_g_idx" if quantization.packing == "compressed" else "g_idx")
    order = None if index is None else _order(index, group, inputs, module)
    if order is not None:
        codes = codes[:, order]
    return Coded(codes.contiguous(), scales.contiguous(), group, zeros.contiguous(), 4, order)


def _compressed(
    read: Read, quantization: Quantization
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes along the inputs, zeros along the outputs, both signed and stored plus 8."""
    packed, scales, shape = _need(read, "weight_packed"), _need(read, "weight_scale"), read("weight_shape")
    codes = unpack(packed)
    if shape is not None:
        codes = codes[:, : int(shape[1])]
    if quantization.symmetric:
        return codes, scales, None
    return codes, scales, unpack(_need(read, "weight_zero_point").t())[:, : codes.shape[0]].t()


def _gptq(read: Read, quantization: Quantization) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes along the inputs of a transposed weight, zeros along the outputs."""
    codes, scales = unpack(_need(read, "qweight").t()), _need(read, "scales").t()
    if quantization.symmetric:  # whatever the stored zeros are: some tools write 7, some 8
        return codes, scales, None
    zeros = unpack(_need(read, "qzeros")).t()
    return codes, scales, (zeros + 1 & 15 if quantization.zero_plus_one else zeros)


def _awq(read: Read, quantization: Quantization) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes and zeros along the outputs, in another order."""

    def ordered(words: torch.Tensor) -> torch.Tensor:
        return unpack(words).view(len(words), -1, 8)[:, :, list(AWQ_ORDER)].flatten(1).t()

    return ordered(_need(read, "qweight")), _need(read, "scales").t(), ordered(_need(read, "qzeros"))


_READERS = {"compressed": _compressed, "gptq": _gptq, "awq": _awq}


def _nvfp4(read: Read, quantization: Quantization, module: str) -> Coded:
    """e2m1 codes along the inputs, e4m3 scales for 16 of them, and a scale of the whole: ModelOpt multiplies by it,
    compressed-tensors divides.

    Raises UnsupportedModel if that one means nothing.
    """
    compressed = quantization.packing == "nvfp4"
    name = "weight_global_scale" if compressed else "weight_scale_2"
    whole = float(_need(read, name).float())
    if not 0 < whole < math.inf:
        raise UnsupportedModel(f"{module}.{name} is {whole}: it must be positive, fetch the checkpoint again")
    packed = _need(read, "weight_packed" if compressed else "weight")
    scales = _need(read, "weight_scale").float()
    scales = scales / whole if compressed else scales * whole
    return Coded(unpack(packed), scales, quantization.group, bits=4, e2m1=True)


def write_codes(coded: Coded) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors of a module in our own layout, by their last names: for formats that are no safetensors files.

    Two codes of 4 bits share a byte, the lower one first.
    """
    codes = coded.codes
    yield "codes", codes[:, ::2] | codes[:, 1::2] << 4 if coded.bits == 4 else codes
    yield "scales", coded.scales
    yield "bits", torch.tensor([coded.bits], dtype=torch.int32)
    if coded.offsets is not None:
        yield "minima" if coded.offsets.is_floating_point() else "zeros", coded.offsets


def _own(read: Read) -> Coded:
    codes, scales, bits = _need(read, "codes"), _need(read, "scales"), int(_need(read, "bits"))
    if bits == 4:
        codes = torch.stack([codes & 15, codes >> 4], dim=-1).flatten(1)
    zeros = read("zeros")
    offsets = read("minima") if zeros is None else zeros
    return Coded(codes, scales, codes.shape[1] // scales.shape[1], offsets, bits)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """[R, C] int32 to the codes [R, 8 C] uint8, the lowest bits first; bytes to two each."""
    pairs = words.contiguous().view(torch.uint8)
    return torch.stack([pairs & 15, pairs >> 4], dim=-1).flatten(1)


def _order(index: torch.Tensor, group: int, inputs: int, module: str) -> torch.Tensor | None:
    """The inputs such that those of a group stand together, from the group of each; None if they do already."""
    if torch.equal(index, torch.arange(inputs, dtype=index.dtype) // group):
        return None
    order = index.long().argsort(stable=True)
    if not torch.equal(index[order], torch.arange(inputs, dtype=index.dtype) // group):
        raise UnsupportedModel(
            f"{module}: its inputs are not spread evenly over groups of {group}, which is not implemented"
        )
    return order


def _need(read: Read, leaf: str) -> torch.Tensor:
    tensor = read(leaf)
    assert tensor is not None, f"{leaf} was there when the layout was checked"
    return tensor
