"""What a GPU did in a step, by what the kernels are for: out of what PyTorch's profiler has seen."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch.autograd import DeviceType

GROUPS: dict[str, tuple[str, ...]] = {
    "sums of ranks": ("_exchange_kernel", "AllReduce", "one_shot", "two_shot", "_add_up_kernel"),
    "choice of tokens": (
        "_argmax", "_stack_kernel", "AllGather", "Broadcast", "_remember", "_words_kernel", "_scan_kernel",
        "_sum_kernel", "_draw_kernel", "_top_kernel", "round_kernel", "gather_kernel", "settle_kernel", "search_kernel",
        "_fork_kernel",
    ),
    "norms and gates": ("_add_norm_kernel", "_gate_kernel", "_quantise_kernel", "_dequantise_kernel", "_row_means"),
    "attention": ("_decode_kernel", "_merge_kernel", "_prefill_kernel", "_share_kernel", "_rotate_write_kernel"),
    "inputs": ("_embed_kernel", "_scatter_kernel", "Memcpy", "Memset"),
    "linears": (
        "_skinny_kernel", "_product_kernel", "_write_out_kernel", "nvjet", "gemm", "gemv", "xmma", "cutlass", "splitK",
    ),
}  # fmt: skip
"""Parts of kernels' names, ours and the libraries', the first that fits."""
A_STEP = "_embed_kernel"
"""Runs once in each."""


class Kernel(NamedTuple):
    name: str
    begin: float
    end: float
    """Microseconds."""


def kernels_of(profile: Any) -> list[Kernel]:
    """Of a ``torch.profiler.profile`` that has ended, one GPU's."""
    return [
        Kernel(event.name, event.time_range.start, event.time_range.end)
        for event in profile.events() if event.device_type == DeviceType.CUDA
    ]  # fmt: skip


def microseconds_by_kernel(queue: Callable[[], object], times: int = 5) -> dict[str, float]:
    """Of each kernel, in one of ``times`` calls of what queues them."""
    queue()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for _ in range(times):
            queue()
        torch.cuda.synchronize()
    return {event.key: round(event.self_device_time_total / times, 1) for event in profile.key_averages()}


def group_of(name: str) -> str:
    return next((group for group, parts in GROUPS.items() if any(part in name for part in parts)), "others")


def spent(kernels: Iterable[Kernel]) -> dict[str, float]:
    """Microseconds a step of each group, and of gaps, in which nothing ran; together they are the step.

    A kernel may start while the one before it ends, and then waits for it: that time is the earlier one's.
    """
    ordered = sorted(kernels, key=lambda kernel: kernel.begin)
    steps = sum(A_STEP in kernel.name for kernel in ordered)
    if not steps:
        return {}
    found = dict.fromkeys([*GROUPS, "others", "gaps"], 0.0)
    until = ordered[0].begin
    for name, begin, end in ordered:
        found["gaps"] += max(0.0, begin - until)
        found[group_of(name)] += max(0.0, end - max(begin, until))
        until = max(until, end)
    told = {group: round(each / steps, 1) for group, each in found.items()}
    return {"steps": float(steps), "step": round((until - ordered[0].begin) / steps, 1)} | told


def slowest_others(kernels: Iterable[Kernel], count: int = 5) -> dict[str, float]:
    """Microseconds of kernels that no group names, for who extends the table."""
    found: dict[str, float] = {}
    for kernel in kernels:
        if group_of(kernel.name) == "others":
            found[kernel.name[:80]] = found.get(kernel.name[:80], 0.0) + kernel.end - kernel.begin
    return dict(sorted(found.items(), key=lambda each: -each[1])[:count])
