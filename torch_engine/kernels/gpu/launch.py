"""How every Triton-language kernel starts: the switches of this process, and the overlap with its neighbours.

A kernel runs on a CPU too, under ``TRITON_INTERPRET=1``.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
OVERLAPS = not INTERPRETED and torch.cuda.is_available() and torch.cuda.get_device_capability() >= (9, 0)
"""Whether a kernel may start while the one before it ends (programmatic dependent launch, CUDA's guide §"PDL")."""
WAITS_LATER = OVERLAPS and torch.cuda.get_device_capability()[0] == 9
"""Whether products are asked for and waited for apart (wgmma), which kernels in Gluon need."""
LAUNCH = {"launch_pdl": True} if OVERLAPS else {}

_OVERLAPS, _ON_GPU = tl.constexpr(OVERLAPS), tl.constexpr(not INTERPRETED)


class Kernel(JITFunction):  # type: ignore[misc]  # Triton tells no types
    """A kernel whose later starts cost the host about half of Triton's own.

    Each of those asks anew for the environment's switches, whether a global that the kernel reads has changed, and for
    the text of all options. A step that is no graph starts some 250 kernels, and the device waits for the slower of the
    two. Here a start asks for what can differ from the last: the kinds of the arguments, found by Triton's own rules,
    and the options. What was started like that before starts again. Written against Triton 3.6 and read in 3.8; hooks
    around starts, which Triton's profiler has, see the first start of each form only.
    """

    def __init__(self, function: Callable[..., Any], **options: Any) -> None:
        super().__init__(function, **options)
        self._forms: dict[tuple[Any, ...], Any] = {}

    def run(self, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> Any:
        if warmup:
            return super().run(*args, grid=grid, warmup=warmup, **options)
        device = driver.active.get_current_device()
        binder = self.device_caches[device][-1]
        bound, kinds, _ = binder(*args, **options)
        form = (device, *kinds, *options.items())
        code = self._forms.get(form)
        if code is None:
            code = self._forms[form] = super().run(*args, grid=grid, warmup=warmup, **options)
            return code
        x, y, z = (*grid, 1, 1)[:3]
        stream = driver.active.get_current_stream(device)
        code.run(x, y, z, stream, code.function, code.packed_metadata, None, None, None, *bound.values())
        return code


def kernel(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """As ``triton.jit``, for what the host starts; what a kernel calls stays ``triton.jit``."""
    return triton.jit(**options) if INTERPRETED else lambda function: Kernel(function, **options)


def cdiv(number: int, by: int) -> int:
    """Rounded up. Triton's own, which kernels can use, too, takes 5 us: a step that is no graph asks 360 times."""
    return -(-number // by)


def next_power_of_2(number: int) -> int:
    """The least one that is not less than a positive ``number``; Triton's takes 7 us."""
    return 1 << (number - 1).bit_length()


@triton.jit
def begin_kernel():
    """Lets the next kernel of the stream start, then waits until the kernels before this one have ended.

    Every kernel calls it, or :func:`begin_in_order`, or its two halves, before it writes anything and before it reads
    what kernels before it write. The next one starts as soon as all programs of this one have, so any number of kernels
    may stand there and wait for each other in a row. What is older than the last :func:`begin_in_order` may be read
    before the wait, as weights may.
    """
    if _OVERLAPS:
        cuda.gdc_launch_dependents()
        cuda.gdc_wait()


@triton.jit
def begin_in_order():
    """Waits first: when any later kernel starts, all those before this one have ended."""
    if _OVERLAPS:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()


@triton.jit
def settled(sums):
    """``sums`` [M, N] float32, which all products before this line have been added to.

    Stands at the end of a loop over products whose left operand is made in registers. Without it Triton 3.6 lets the
    last product of a turn be computed while the next turn writes into these registers: it waits for that product first
    behind the next one (triton-lang/triton#9433), and ptxas 12.9 gives the registers to others as soon as it is asked
    for (fixed in CUDA 13.3). Then sums are wrong, rarely.
    """
    if _ON_GPU:
        sums = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [sums], dtype=tl.float32, is_pure=True, pack=1
        )
    return sums


@triton.jit
def prefetch(rows, BYTES: tl.constexpr):
    """Brings the first bytes behind each pointer of ``rows`` [N, 1] into the L2, while the kernel before ends."""
    if _OVERLAPS and BYTES >= 128:
        lines = rows.to(tl.int64) + tl.arange(0, BYTES // 128)[None, :] * 128
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [lines], dtype=tl.int32, is_pure=False, pack=1
        )
