"""The forms in which kernels leave a result for the linear that reads it, and how one is read and written."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum

import torch
import triton
import triton.language as tl

from flightline.torch_engine.kernels.gpu.launch import INTERPRETED


class Form(IntEnum):
    """How a kernel writes its result."""

    PLAIN = 0
    FP8_STATIC = 1
    """e4m3 codes; one scale, known beforehand."""
    INT8_TOKEN = 2
    """int8 codes and a scale for each row."""
    FP8_TOKEN = 3
    """e4m3 codes and a scale for each row."""


@dataclass
class Activation:
    """Input of a linear layer: values [T, N] in the form it reads."""

    values: torch.Tensor
    scales: torch.Tensor | None = None
    """[T] float32, of the forms that have a scale for each row."""


FP8_MAX = tl.constexpr(448.0)
_INTERPRETED = tl.constexpr(INTERPRETED)
PLAIN = tl.constexpr(int(Form.PLAIN))
FP8_STATIC = tl.constexpr(int(Form.FP8_STATIC))
INT8_TOKEN = tl.constexpr(int(Form.INT8_TOKEN))


@triton.jit
def to_fp8(values):
    """Float32 within ±448, about to be stored as e4m3: the interpreter does not round, so that is done for it."""
    values = tl.clamp(values, -FP8_MAX, FP8_MAX)
    if _INTERPRETED:
        exponent = tl.maximum(tl.floor(tl.log2(tl.maximum(tl.abs(values), 1e-9))), -6.0)
        grid = tl.exp2(exponent - 3.0)
        values = tl.floor(values / grid + 0.5) * grid
    return values


@triton.jit
def known_scale(in_scale, FORM: tl.constexpr):
    """The scale that is known beforehand, in the form that has one. No kernel writes it: it is read before the wait."""
    unit = 1.0
    if FORM == FP8_STATIC:
        unit = tl.load(in_scale)
    return unit


@triton.jit
def emit(values, out, scales, unit, row, columns, mask, N: tl.constexpr, FORM: tl.constexpr):
    """Writes one row (or a part of it, in forms without a scale for each row) as the reading linear wants it; ``unit``
    is its :func:`known_scale`."""
    target = out + row * N + columns
    if FORM == PLAIN:
        tl.store(target, values.to(out.dtype.element_ty), mask=mask)
    elif FORM == FP8_STATIC:
        codes = to_fp8(values / unit)
        tl.store(target, codes.to(out.dtype.element_ty), mask=mask)
    else:
        limit = 127.0 if FORM == INT8_TOKEN else FP8_MAX
        scale = tl.maximum(tl.max(tl.abs(values), 0), 1e-12) / limit
        codes = values / scale
        if FORM == INT8_TOKEN:
            codes = tl.floor(codes + 0.5)
        else:
            codes = to_fp8(codes)
        tl.store(target, codes.to(out.dtype.element_ty), mask=mask)
        tl.store(scales + row, scale)


@triton.jit
def sum_parts(source, step, mask, PARTS: tl.constexpr):
    """Values of partial sums that lie ``step`` elements apart."""
    values = tl.load(source, mask=mask, other=0.0).to(tl.float32)
    for part in tl.static_range(1, PARTS):
        values += tl.load(source + part * step, mask=mask, other=0.0).to(tl.float32)
    return values


def parts_of(x: torch.Tensor) -> tuple[int, int]:
    """How many partial sums ``x`` consists of, and how many elements apart they lie."""
    return (x.shape[0], x.stride(0)) if x.dim() == 3 else (1, 0)


def new_output(
    rows: int, size: int, form: Form, like: torch.Tensor, plain: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    dtype = {
        Form.PLAIN: plain or like.dtype, Form.FP8_STATIC: torch.float8_e4m3fn,
        Form.INT8_TOKEN: torch.int8, Form.FP8_TOKEN: torch.float8_e4m3fn,
    }[form]  # fmt: skip
    scales = None
    if form in (Form.INT8_TOKEN, Form.FP8_TOKEN):
        scales = torch.empty(rows, dtype=torch.float32, device=like.device)
    return torch.empty(rows, size, dtype=dtype, device=like.device), scales


def warps_of(block: int, parts: int = 1) -> int:
    """Of a program that reads a row; sums of many parts wait for memory, which more threads hide better."""
    return min(32, max(1, block // (512 if parts == 1 else 128)))
