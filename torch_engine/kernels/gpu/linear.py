"""Linears of every precision: cuBLASLt's matrix products, our own for a few rows, and the codes around them.

Shapes: T rows (tokens of a step), K inputs, N outputs; a weight is [N, K].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
import triton.language as tl
from triton.language.extra import cuda

from flightline.torch_engine.kernels.gpu.activation import (
    Activation,
    Form,
    emit,
    known_scale,
    new_output,
    warps_of,
)
from flightline.torch_engine.kernels.gpu.grouped import CodedLinear
from flightline.torch_engine.kernels.gpu.launch import (
    LAUNCH,
    OVERLAPS,
    begin_kernel,
    cdiv,
    kernel,
    next_power_of_2,
    prefetch,
)

E4M3_MAX = 448.0
INT8_MIN_ROWS = 32
"""``torch._int_mm`` wants more than 16 rows."""

PREFETCH = 256
"""Bytes of each of its rows of the weight that a program asks for while the kernel before it still runs. Measured on an
H200 at one row: 256 bytes 376 tok/s, 512 360, 1024 351."""
SKINNY_ROWS = 16
"""Most rows of :func:`skinny_linear`."""

ROW_PART = 4096
"""Columns of a program that scales rows."""
_OVERLAPS = tl.constexpr(OVERLAPS)


# Products for a few rows -----------------------------------------------------------------------------------------


SKINNY_SHAPES = ((16, 512, 4, 4), (32, 256, 4, 5), (64, 128, 4, 6), (64, 256, 4, 4), (128, 128, 4, 5))
NARROW_SHAPES = ((32, 64, 4, 8), (64, 64, 4, 8), (128, 64, 4, 6))
"""Outputs and inputs of a tile, warps and stages; the latter where no wider tile fits (gpt-oss has 2,880 inputs)."""
MOST_SPLITS = 9


@dataclass(frozen=True)
class SkinnyPlan:
    """How the weight of a skinny product is cut up."""

    block_n: int
    block_k: int
    splits: int
    """Pieces of the inner dimension, each with a partial sum of its own: enough programs to fill the device."""
    warps: int
    stages: int


def skinny_plans(outputs: int, inputs: int, multiprocessors: int) -> list[SkinnyPlan]:
    """Plans worth timing for a weight [outputs, inputs]."""
    plans = []
    for block_n, block_k, warps, stages in SKINNY_SHAPES if inputs % 128 == 0 else NARROW_SHAPES:
        if outputs % block_n or inputs % block_k:
            continue
        for waves in (2, 4):
            # As many pieces as fill the device, each of as many tiles.
            possible = [splits for splits in range(1, MOST_SPLITS + 1) if inputs // block_k % splits == 0]
            enough = [splits for splits in possible if outputs // block_n * splits >= waves * multiprocessors]
            plan = SkinnyPlan(block_n, block_k, (enough or possible[-1:])[0], warps, stages)
            if plan not in plans:
                plans.append(plan)
    return plans


@kernel(do_not_specialize=["rows"])
def _skinny_kernel(
    x, weight, x_scale, weight_scale, bias, out, rows,
    N: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr, PREFETCH: tl.constexpr, X_EACH: tl.constexpr, W_EACH: tl.constexpr, BIASED: tl.constexpr,
):  # fmt: skip
    if _OVERLAPS:
        cuda.gdc_launch_dependents()
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(1)
    m, k = tl.arange(0, ROWS), tl.arange(0, BLOCK_K)
    EACH: tl.constexpr = K // SPLITS
    weights = weight + n.to(tl.int64)[:, None] * K + split * EACH + k[None, :]
    prefetch(weight + n.to(tl.int64)[:, None] * K + split * EACH, PREFETCH)
    if _OVERLAPS:
        cuda.gdc_wait()
    inputs = x + m[:, None] * K + split * EACH + k[None, :]
    mask = (m < rows)[:, None]
    scale_x = tl.load(x_scale + m, mask=m < rows, other=0.0) if X_EACH else tl.load(x_scale)
    scale_w = tl.load(weight_scale + n) if W_EACH else tl.load(weight_scale)
    if BLOCK_N >= 64:  # the weight as the tall operand: the tensor cores of Hopper want 64 rows
        tall = tl.zeros([BLOCK_N, ROWS], tl.float32)
        for start in range(0, EACH, BLOCK_K):
            a = tl.load(inputs + start, mask=mask, other=0.0)
            tall = tl.dot(tl.load(weights + start), tl.trans(a), tall)
        target = out + (split * rows + m)[None, :] * N + n[:, None]
        if X_EACH:
            tall *= scale_x[None, :]
        else:
            tall *= scale_x
        if W_EACH:
            tall *= scale_w[:, None]
        else:
            tall *= scale_w
        if BIASED and split == 0:
            tall += tl.load(bias + n).to(tl.float32)[:, None]
        tl.store(target, tall, mask=(m < rows)[None, :])
    else:
        flat = tl.zeros([ROWS, BLOCK_N], tl.float32)
        for start in range(0, EACH, BLOCK_K):
            a = tl.load(inputs + start, mask=mask, other=0.0)
            flat = tl.dot(a, tl.trans(tl.load(weights + start)), flat)
        target = out + (split * rows + m)[:, None] * N + n[None, :]
        if X_EACH:
            flat *= scale_x[:, None]
        else:
            flat *= scale_x
        if W_EACH:
            flat *= scale_w[None, :]
        else:
            flat *= scale_w
        if BIASED and split == 0:
            flat += tl.load(bias + n).to(tl.float32)[None, :]
        tl.store(target, flat, mask=mask)


def skinny_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    x_scale: torch.Tensor,
    weight_scale: torch.Tensor,
    plan: SkinnyPlan,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """``x`` [T <= 16, K] times ``weight`` [N, K], e4m3, plus ``bias`` [N]: partial sums [S, T, N] float32, in a fixed
    order.

    ``x_scale`` is a scalar or [T], ``weight_scale`` a scalar or [N].

    With few rows a product is bound by reading the weight once; splitting the inner dimension keeps all of the
    device reading, and the sums are added up by the kernel that reads them anyway.
    """
    rows, inputs = x.shape
    outputs = weight.shape[0]
    out = torch.empty(plan.splits, rows, outputs, dtype=torch.float32, device=x.device)
    _skinny_kernel[(outputs // plan.block_n, plan.splits)](
        x, weight, x_scale, weight_scale, out if bias is None else bias, out, rows,
        outputs, inputs, SKINNY_ROWS, plan.block_n, plan.block_k, plan.splits,
        min(PREFETCH, 2 ** ((inputs // plan.splits).bit_length() - 1)), x_scale.dim(), weight_scale.dim(),
        bias is not None, num_warps=plan.warps, num_stages=plan.stages, **LAUNCH,
    )  # fmt: skip
    return out


# Codes and scales --------------------------------------------------------------------------------------------------


@kernel()
def _quantise_kernel(
    x, out, scales, in_scale, N: tl.constexpr, BLOCK: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    unit = known_scale(in_scale, FORM)
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    values = tl.load(x + row * N + columns, mask=mask, other=0.0).to(tl.float32)
    emit(values, out, scales, unit, row, columns, mask, N, FORM)


def quantise(x: torch.Tensor, form: Form, in_scale: torch.Tensor | None = None) -> Activation:
    """``x`` [T, N], contiguous, in another form."""
    rows, size = x.shape
    out, scales = new_output(rows, size, form, x)
    block = next_power_of_2(size)
    _quantise_kernel[(rows,)](
        x, out, scales, out if in_scale is None else in_scale, size, block, int(form),
        num_warps=warps_of(block), **LAUNCH,
    )  # fmt: skip
    return Activation(out, scales)


@kernel()
def _dequantise_kernel(
    sums, scales, weight_scales, bias, out, N: tl.constexpr, BLOCK: tl.constexpr, BIASED: tl.constexpr
):
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    values = tl.load(sums + row * N + columns, mask=mask, other=0).to(tl.float32)
    values *= tl.load(scales + row) * tl.load(weight_scales + columns, mask=mask, other=0.0)
    if BIASED:
        values += tl.load(bias + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * N + columns, values.to(out.dtype.element_ty), mask=mask)


def dequantise(
    sums: torch.Tensor,
    scales: torch.Tensor,
    weight_scales: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Sums of an int8 product times the scales of its rows [T] and columns [N], plus ``bias``: [T, N]."""
    rows, size = scales.shape[0], sums.shape[1]
    out = torch.empty(rows, size, dtype=dtype, device=sums.device)
    block = min(next_power_of_2(size), 1024)
    _dequantise_kernel[(rows, cdiv(size, block))](
        sums,
        scales,
        weight_scales,
        out if bias is None else bias,
        out,
        size,
        block,
        bias is not None,
        **LAUNCH,
    )
    return out


@kernel()
def _scale_rows_kernel(x, scales, N: tl.constexpr, BLOCK: tl.constexpr):
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    values = tl.load(x + row * N + columns, mask=mask, other=0.0).to(tl.float32) * tl.load(scales + row)
    tl.store(x + row * N + columns, values.to(x.dtype.element_ty), mask=mask)


def scale_rows(x: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """``x`` [T, N], contiguous, times ``scales`` [T], in place.

    PyTorch's kernel for this moves 0.9 TB/s on an H200, whose memory reads 4.5.
    """
    rows, size = x.shape
    _scale_rows_kernel[(rows, cdiv(size, ROW_PART))](x, scales, size, ROW_PART, num_warps=4, **LAUNCH)
    return x


# Linears -------------------------------------------------------------------------------------------------------------


class PlainLinear:
    """Product in the compute dtype."""

    form = Form.PLAIN
    input_scale: torch.Tensor | None = None
    column_scales: torch.Tensor | None = None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        self.weight, self.bias = weight, bias

    def __call__(self, x: Activation) -> torch.Tensor:
        return F.linear(x.values, self.weight, self.bias)


class Fp8Linear:
    """e4m3 weights and activations with one scale each, known beforehand; accumulated in float32."""

    form = Form.FP8_STATIC
    column_scales: torch.Tensor | None = None

    def __init__(
        self,
        codes: torch.Tensor,
        weight_scale: torch.Tensor,
        input_scale: torch.Tensor,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        self.weight, self.weight_scale, self.input_scale = codes, weight_scale, input_scale
        self.bias, self.dtype = bias, dtype
        self.plan: SkinnyPlan | None = None
        """For a few rows, where measuring found it faster than the library: :meth:`CudaKernels.tune`."""

    def __call__(self, x: Activation) -> torch.Tensor:
        if self.plan is not None and x.values.shape[0] <= SKINNY_ROWS:
            return skinny_linear(
                x.values, self.weight, self.input_scale, self.weight_scale, self.plan, self.bias
            )
        return _scaled_mm(x.values, self.weight, self.input_scale, self.weight_scale, self.bias, self.dtype)


def fp8_by_output(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``weight`` [N, K] as e4m3 codes and the scale of each output, float32 [N]."""
    scales = torch.empty(len(weight), dtype=torch.float32, device=weight.device)
    codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn, device=weight.device)
    for start in range(0, len(weight), 16384):  # a float32 copy of a whole head would be gigabytes
        rows = slice(start, start + 16384)
        part = weight[rows].float()
        scales[rows] = part.abs().amax(1).clamp_min(1e-12) / E4M3_MAX
        codes[rows] = (part / scales[rows, None]).to(torch.float8_e4m3fn)
    return codes, scales


class Fp8RowLinear:
    """e4m3 weights with a scale for each output; activations have one that is known beforehand, or one for each row."""

    column_scales: torch.Tensor | None = None

    def __init__(
        self,
        codes: torch.Tensor,
        scales: torch.Tensor,
        input_scale: torch.Tensor | None,
        bias: torch.Tensor | None,
        dtype: torch.dtype,
    ) -> None:
        """``scales`` [N] float32."""
        self.form = Form.FP8_TOKEN if input_scale is None else Form.FP8_STATIC
        self.weight, self.scales, self.input_scale = codes, scales, input_scale
        self.bias, self.dtype = bias, dtype
        self.one = torch.ones((), dtype=torch.float32, device=codes.device)
        self.plan: SkinnyPlan | None = None
        """As of :class:`Fp8Linear`."""

    def __call__(self, x: Activation) -> torch.Tensor:
        scales = self.input_scale if x.scales is None else x.scales
        assert scales is not None
        rows = x.values.shape[0]
        if self.plan is not None and rows <= SKINNY_ROWS:
            return skinny_linear(x.values, self.weight, scales, self.scales, self.plan, self.bias)
        scales = scales.expand(rows).contiguous()
        if x.values.is_cuda and self.dtype == torch.bfloat16:
            columns = self.scales[None, :]
            return _scaled_mm(x.values, self.weight, scales[:, None], columns, self.bias, self.dtype)
        sums = _scaled_mm(x.values, self.weight, self.one, self.one, None, torch.float32)
        return dequantise(sums, scales, self.scales, self.bias, self.dtype)


class Int8Linear:
    """int8 weights with a scale for each output, int8 activations with a scale for each token (W8A8)."""

    form = Form.INT8_TOKEN
    input_scale: torch.Tensor | None = None
    column_scales: torch.Tensor | None = None

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> None:
        scales = weight.float().abs().amax(1).clamp_min(1e-12) / 127
        self.weight = (weight.float() / scales[:, None]).round_().to(torch.int8)
        self.scales, self.bias, self.dtype = scales, bias, dtype

    def __call__(self, x: Activation) -> torch.Tensor:
        assert x.scales is not None
        codes = x.values
        if codes.shape[0] < INT8_MIN_ROWS:
            codes = F.pad(codes, (0, 0, 0, INT8_MIN_ROWS - codes.shape[0]))
        sums = torch._int_mm(codes, self.weight.t())
        return dequantise(sums, x.scales, self.scales, self.bias, self.dtype)


class Fp8Head:
    """Output head in e4m3 with a scale for each token of the vocabulary, activations with one for each row.

    The product runs without scales, its fastest form; the column scales are left to whoever reads the logits (the
    argmax applies them in passing).
    """

    form = Form.FP8_TOKEN
    input_scale: torch.Tensor | None = None

    def __init__(self, weight: torch.Tensor, dtype: torch.dtype) -> None:
        self.weight, self.column_scales = fp8_by_output(weight)
        self.one = torch.ones((), dtype=torch.float32, device=weight.device)
        self.dtype = dtype

    def __call__(self, x: Activation) -> torch.Tensor:
        assert x.scales is not None
        logits = _scaled_mm(x.values, self.weight, self.one, self.one, None, self.dtype)
        return scale_rows(logits, x.scales)


CudaLinear = PlainLinear | Fp8Linear | Fp8RowLinear | CodedLinear | Int8Linear | Fp8Head


def _scaled_mm(x, weight, x_scale, weight_scale, bias, dtype) -> torch.Tensor:
    return torch._scaled_mm(
        x, weight.t(), x_scale, weight_scale, bias=bias, out_dtype=dtype,
        use_fast_accum=x.is_cuda and dtype != torch.float32,
    )  # fmt: skip
