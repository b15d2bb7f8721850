"""Which kernels the library has for a product, by its number of rows: ``python3 benchmarks/gpu_products.py``.

A server loads a kernel where a number of rows is the first to want it, and waits for that until the device is idle; so
the engine runs each product beforehand with the numbers of ``cuda._sorts``. This counts what they leave out: FP8
products of Llama-3.1-8B, every number of rows from 1 to ``--most``, names as PyTorch's profiler tells them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flightline.torch_engine.kernels.gpu.cuda import _sorts

PRODUCTS = {"qkv": (6144, 4096), "out": (4096, 4096), "gate and up": (28672, 4096), "down": (4096, 14336)}
"""Outputs and inputs."""
AT_ONCE = 512
"""Products that are profiled together."""


def kernels(outputs: int, inputs: int, most: int) -> list[str]:
    """Of 1 row, 2 rows, ..."""
    one = torch.ones((), device="cuda")
    weight, x = (torch.zeros(rows, inputs, device="cuda").to(torch.float8_e4m3fn) for rows in (outputs, most))
    names: list[str] = []
    for begin in range(1, most + 1, AT_ONCE):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
            for rows in range(begin, min(begin + AT_ONCE, most + 1)):
                torch._scaled_mm(
                    x[:rows], weight.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True
                )
            torch.cuda.synchronize()
        events = sorted(profiler.events(), key=lambda event: event.time_range.start)
        names += [event.name for event in events if "nvjet" in event.name or "gemm" in event.name.lower()]
    assert len(names) == most, f"{len(names)} products of {most} are told"
    return names


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--most", type=int, default=2048, help="rows")
    options = parser.parse_args()
    met = set(_sorts(options.most))
    print(
        "| product | kernels | left out by the engine's numbers | by every 16th | changes from row to row |"
    )
    print("|---|--:|--:|--:|--:|")
    for product, (outputs, inputs) in PRODUCTS.items():
        names = kernels(outputs, inputs, options.most)
        missed = [
            len(set(names) - {names[rows - 1] for rows in numbers})
            for numbers in (met, range(16, options.most + 1, 16))
        ]
        changes = sum(one != other for one, other in itertools.pairwise(names))
        print(f"| {product} | {len(set(names))} | {missed[0]} | {missed[1]} | {changes} |")


if __name__ == "__main__":
    main()
