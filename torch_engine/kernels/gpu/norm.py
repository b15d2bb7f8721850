"""What lies between the linears of a layer: residual sum and norm, and the gate of the MLP.

A linear may leave its result as partial sums [S, T, N] in float32 (``linear.skinny_linear``): these kernels add
them up.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flightline.torch_engine.kernels.gpu.activation import (
    Activation,
    Form,
    emit,
    known_scale,
    new_output,
    parts_of,
    sum_parts,
    warps_of,
)
from flightline.torch_engine.kernels.gpu.launch import LAUNCH, begin_kernel, cdiv, kernel, next_power_of_2
from flightline.torch_engine.model.mixture import CLAMPED_SLOPE

_CLAMPED_SLOPE = tl.constexpr(CLAMPED_SLOPE)


@triton.jit
def add_and_norm(
    x, h, d, post, weight, out, scales, unit, eps, row, columns, mask,
    N: tl.constexpr, ADDS: tl.constexpr, HAS_POST: tl.constexpr, NORM: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Of one row: ``x = h + norm(d)``, if there is something to add, and the norm of that; ``post`` and ``weight`` are
    of :func:`norm_weights`."""
    if ADDS:
        if HAS_POST:
            d = d * tl.rsqrt(tl.sum(d * d, 0) / N + eps)
            d *= post
        rounded = (h + d).to(x.dtype.element_ty)
        tl.store(x + row * N + columns, rounded, mask=mask)
        h = rounded.to(tl.float32)
    if NORM:
        h = h * tl.rsqrt(tl.sum(h * h, 0) / N + eps)
        h *= weight
    emit(h, out, scales, unit, row, columns, mask, N, FORM)


@triton.jit
def norm_weights(post, weight, columns, mask, HAS_POST: tl.constexpr, NORM: tl.constexpr):
    """Of the norm of what is added and of the norm after it, in float32; no kernel writes them: they are read before
    the wait."""
    of_post, of_norm = 1.0, 1.0
    if HAS_POST:
        of_post = tl.load(post + columns, mask=mask, other=0.0).to(tl.float32)
    if NORM:
        of_norm = tl.load(weight + columns, mask=mask, other=0.0).to(tl.float32)
    return of_post, of_norm


@kernel(do_not_specialize=["step"])
def _add_norm_kernel(
    x, delta, step, post, weight, out, scales, in_scale, eps,
    N: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, HAS_POST: tl.constexpr, NORM: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK)
    mask = columns < N
    of_post, of_norm = norm_weights(post, weight, columns, mask, HAS_POST, NORM)
    unit = known_scale(in_scale, FORM)
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    h = tl.load(x + row * N + columns, mask=mask, other=0.0).to(tl.float32)
    d = h
    if PARTS > 0:
        d = sum_parts(delta + row * N + columns, step, mask, PARTS)
    add_and_norm(
        x,
        h,
        d,
        of_post,
        of_norm,
        out,
        scales,
        unit,
        eps,
        row,
        columns,
        mask,
        N,
        PARTS > 0,
        HAS_POST,
        NORM,
        FORM,
    )


def add_norm(
    x: torch.Tensor,
    delta: torch.Tensor | None,
    post: torch.Tensor | None,
    weight: torch.Tensor | None,
    eps: float,
    form: Form = Form.PLAIN,
    in_scale: torch.Tensor | None = None,
) -> Activation:
    """``x += norm(delta, post)`` in place (``delta`` itself without ``post``), then the norm of ``x`` [T, N].

    Without ``weight`` it is ``x`` itself. ``delta`` is [T, N] or partial sums.
    """
    rows, size = x.shape
    out, scales = new_output(rows, size, form, x)
    block = next_power_of_2(size)
    parts, step = (0, 0) if delta is None else parts_of(delta)
    _add_norm_kernel[(rows,)](
        x, x if delta is None else delta, step, x if post is None else post, x if weight is None else weight,
        out, scales, out if in_scale is None else in_scale, eps,
        size, block, parts, post is not None, weight is not None, int(form), num_warps=warps_of(block, parts), **LAUNCH,
    )  # fmt: skip
    return Activation(out, scales)


@kernel(do_not_specialize=["step", "size"])
def _add_up_kernel(sums, step, out, size, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    begin_kernel()
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = at < size
    tl.store(out + at, sum_parts(sums + at, step, mask, PARTS).to(out.dtype.element_ty), mask=mask)


def add_up(sums: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Partial sums [S, T, N] as one, in ``out`` [T, N]."""
    parts, step = parts_of(sums)
    block = 1024
    _add_up_kernel[(cdiv(out.numel(), block),)](sums, step, out, out.numel(), block, parts, **LAUNCH)
    return out


@kernel(do_not_specialize=["step"])
def _gate_kernel(
    gate_up, step, out, scales, in_scale,
    N: tl.constexpr, BLOCK: tl.constexpr, PARTS: tl.constexpr, SILU: tl.constexpr, CLAMP: tl.constexpr,
    FORM: tl.constexpr,
):  # fmt: skip
    unit = known_scale(in_scale, FORM)
    begin_kernel()
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < N
    gate = sum_parts(gate_up + row * 2 * N + columns, step, mask, PARTS)
    up = sum_parts(gate_up + row * 2 * N + N + columns, step, mask, PARTS)
    if CLAMP > 0:
        gate = tl.minimum(gate, CLAMP)
        gate = gate * tl.sigmoid(_CLAMPED_SLOPE * gate)
        up = tl.clamp(up, -CLAMP, CLAMP) + 1.0
    elif SILU:
        gate = gate * tl.sigmoid(gate)
    else:  # x * (1 + tanh(u)) / 2 = x * sigmoid(2 u)
        gate = gate * tl.sigmoid(1.5957691216057308 * (gate + 0.044715 * gate * gate * gate))
    emit(gate * up, out, scales, unit, row, columns, mask, N, FORM)


def gate(
    gate_up: torch.Tensor,
    activation: str,
    dtype: torch.dtype,
    form: Form = Form.PLAIN,
    in_scale: torch.Tensor | None = None,
    clamp: float | None = None,
) -> Activation:
    """``[T, 2 N] -> [T, N]``: activation (``silu`` or ``gelu_tanh``) of the first half times the second.

    With ``clamp`` it is what ``MixtureSpec.clamp`` says. ``gate_up`` may be partial sums; ``dtype`` is the plain
    form's.
    """
    rows, size = gate_up.shape[-2], gate_up.shape[-1] // 2
    out, scales = new_output(rows, size, form, gate_up, dtype)
    parts, step = parts_of(gate_up)
    block = next_power_of_2(size)
    if scales is None:
        block = min(block, 1024)
    grid = (rows, cdiv(size, block))
    _gate_kernel[grid](
        gate_up, step, out, scales, out if in_scale is None else in_scale,
        size, block, parts, activation == "silu", float(clamp or 0.0), int(form), num_warps=warps_of(block), **LAUNCH,
    )  # fmt: skip
    return Activation(out, scales)
