"""How fast one request may be answered: the bytes that a step reads, over what the memory gives. No torch."""

from __future__ import annotations

import time
from dataclasses import dataclass

from flightline.engine_build.hardware import Hardware
from flightline.engine_build.plan import DTYPE_BYTES, ModelShape, Plan

GPU_RATES = {
    "GH200": 4.0e12,
    "H200": 4.8e12,
    "H100 NVL": 3.9e12,
    "H100 PCIe": 2.0e12,
    "H100": 3.35e12,
    "B200": 8.0e12,
    "A100-SXM4-80GB": 2.04e12,
    "A100 80GB": 1.94e12,
    "A100": 1.56e12,
    "L40S": 0.86e12,
    "L40": 0.86e12,
    "A40": 0.70e12,
    "A10": 0.60e12,
    "L4": 0.30e12,
    "RTX 5090": 1.79e12,
    "RTX 4090": 1.01e12,
    "RTX 3090": 0.94e12,
}
"""Bytes a second of memory, as NVIDIA states it, by a part of the device's name; the first that fits."""
REACHED = 0.58
"""Of that rate, by one request to Llama-3.1-8B in FP8 on an H200 (benchmarks/h200); small models reach less."""
LINEAR_BYTES = {"fp8": 1.0, "int8": 1.0, "int4": 0.6}
"""Of one weight of a linear layer."""
COPIED = 64 << 20


@dataclass(frozen=True)
class Speed:
    """Of one request; others that run beside it share what is read."""

    tokens_a_second: float
    step_bytes: int
    """Weights that a step reads."""
    basis: str
    """Where the memory's rate is from."""


def expected(shape: ModelShape, plan: Plan, hardware: Hardware) -> Speed | None:
    """None where nothing is known of the memory's rate."""
    idle = shape.idle_parameters * DTYPE_BYTES[plan.compute_dtype] // plan.tp
    idle += int(shape.idle_linear_parameters * LINEAR_BYTES.get(plan.precision, 2.0)) // plan.tp
    step_bytes = max(1, plan.weights_bytes - idle)
    if plan.device == "cpu":
        rate = _copy_rate()
        return Speed(rate / step_bytes, step_bytes, f"{rate / 1e9:.0f} GB/s, a core's copy just now")
    rate = next((rate for name, rate in GPU_RATES.items() if name in hardware.name), 0.0)
    if not rate:
        return None
    basis = f"{REACHED:.0%} of {rate / 1e12:.2g} TB/s, as Llama-3.1-8B in FP8 reached on an H200"
    return Speed(REACHED * rate / step_bytes, step_bytes, basis)


def _copy_rate() -> float:
    """Bytes a second that one core reads and writes, the best of three."""
    source, target = bytearray(COPIED), bytearray(COPIED)
    best = 0.0
    for _ in range(3):
        start = time.perf_counter()
        target[:] = source
        best = max(best, 2 * COPIED / (time.perf_counter() - start))
    return best
