"""How every Triton-language kernel starts: the switches of this process, and the overlap with its neighbours.

A kernel runs on a CPU too, under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import os

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OVERLAPS = not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
"""Whether a kernel may start while the one before it ends (programmatic dependent launch, CUDA's guide §"PDL")."""
LAUNCH = {"launch_pdl": True} if OVERLAPS else {}

_OVERLAPS = tl.constexpr(OVERLAPS)


def cdiv(number: int, by: int) -> int:
    """Rounded up. Triton's own, which kernels can use, too, takes 5 us: a step that is no graph asks 360 times."""
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """The least one that is not less than a positive ``number``; Triton's takes 7 us."""
    return 1 << (number - 1).bit_length()


@triton.jit
def begin_kernel():
    """Waits until the kernels before this one have ended, then lets the next one of the stream start its own wait.

    Every kernel calls it, or its two halves, before it reads or writes anything that another one writes.
    """
    if _OVERLAPS:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def prefetch(rows, BYTES: tl.constexpr):
    """Brings the first bytes behind each pointer of ``rows`` [N, 1] into the L2, while the kernel before ends."""
    if _OVERLAPS and BYTES >= 128:
        lines = rows.to(tl.int64) + tl.arange(0, BYTES // 128)[None, :] * 128
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
        )
