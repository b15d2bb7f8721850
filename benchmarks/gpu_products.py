"""Which kernels the library has for a product, by its number of rows: ``python3 benchmarks/gpu_products.py``.

A server loads a kernel where a number of rows is the first to want it, and waits for that until the device is idle; so
the engine runs each product beforehand with the numbers of ``cuda._sorts``. The first part counts what they leave out:
FP8 products of Llama-3.1-8B, every number of rows from 1 to ``--most``, names as PyTorch's profiler tells them.

The second part asks whether the library's favourite is its fastest: for each number of ``--rows`` it times PyTorch's
product and every algorithm that cuBLASLt offers (``cublaslt.py``), over weights that an L2 does not hold.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cublaslt import Algorithm, Fp8Products
from flightline.torch_engine.kernels.gpu.cuda import _sorts
from flightline.torch_engine.kernels.gpu.timing import graph_seconds

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
                product(x[:rows], weight, one)
            torch.cuda.synchronize()
        events = sorted(profiler.events(), key=lambda event: event.time_range.start)
        names += [event.name for event in events if "nvjet" in event.name or "gemm" in event.name.lower()]
    assert len(names) == most, f"{len(names)} products of {most} are told"
    return names


def count_kernels(options: argparse.Namespace) -> None:
    met = set(_sorts(options.most))
    print(
        "| product | kernels | left out by the engine's numbers | by every 16th | changes from row to row |"
    )
    print("|---|--:|--:|--:|--:|")
    for name, (outputs, inputs) in PRODUCTS.items():
        names = kernels(outputs, inputs, options.most)
        missed = [
            len(set(names) - {names[rows - 1] for rows in numbers})
            for numbers in (met, range(16, options.most + 1, 16))
        ]
        changes = sum(one != other for one, other in itertools.pairwise(names))
        print(f"| {name} | {len(set(names))} | {missed[0]} | {missed[1]} | {changes} |")


def product(x: torch.Tensor, weight: torch.Tensor, one: torch.Tensor) -> torch.Tensor:
    return torch._scaled_mm(x, weight.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)


def microseconds(run: Callable[[torch.Tensor], object], weights: list[torch.Tensor]) -> float:
    """Of one of the products with all ``weights``, which are too many for an L2."""

    def all_of_them() -> None:
        for weight in weights:
            run(weight)

    all_of_them()
    return graph_seconds(all_of_them, 9) / len(weights) * 1e6


def time_algorithms(name: str, rows: int, options: argparse.Namespace) -> dict[str, Any]:
    """PyTorch's choice and all others, for one product."""
    outputs, inputs = PRODUCTS[name]
    one = torch.ones((), device="cuda")
    copies = max(2, -(-options.megabytes * 1_000_000 // (outputs * inputs)))
    weights = [torch.randn(outputs, inputs, device="cuda").to(torch.float8_e4m3fn) for _ in range(copies)]
    x = torch.randn(rows, inputs, device="cuda").to(torch.float8_e4m3fn)
    expected = product(x, weights[0], one).float()
    usual = microseconds(lambda weight: product(x, weight, one), weights)
    library = Fp8Products(rows, outputs, inputs, one)
    out = torch.empty(rows, outputs, dtype=torch.bfloat16, device="cuda")

    def run(algorithm: Algorithm, weight: torch.Tensor) -> None:
        library.run(x, weight, out, algorithm)

    found = []
    for place, algorithm in enumerate(library.algorithms(options.algorithms)):
        out.fill_(float("nan"))
        run(algorithm, weights[0])
        apart = ((out.float() - expected).norm() / expected.norm()).item()
        took = microseconds(partial(run, algorithm), weights)
        found.append((took, place, algorithm.workspace, round(algorithm.waves, 2), apart))
    took, place, workspace, waves, apart = min(found)
    return {
        "product": name, "rows": rows, "pytorch_us": round(usual, 2), "first_us": round(found[0][0], 2),
        "best_us": round(took, 2), "best_is": place, "of": len(found), "workspace": workspace, "waves": waves,
        "difference": apart, "tflops": round(2 * rows * outputs * inputs / took / 1e6),
    }  # fmt: skip


def compare_algorithms(options: argparse.Namespace) -> None:
    results = []
    print("| rows | product | PyTorch, us | best of so many, us | its place | workspace, MB | TFLOP/s |")
    print("|--:|---|--:|--:|--:|--:|--:|")
    for rows in options.rows:
        for name in PRODUCTS:
            result = time_algorithms(name, rows, options)
            results.append(result)
            print(
                f"| {rows} | {name} | {result['pytorch_us']} | {result['best_us']} of {result['of']} | "
                f"{result['best_is']} | {result['workspace'] / 1e6:.1f} | {result['tflops']} |",
                flush=True,
            )
        layer = [[result[key] for result in results[-len(PRODUCTS) :]] for key in ("pytorch_us", "best_us")]
        usual, best = map(sum, layer)
        print(f"| {rows} | all four | {usual:.1f} | {best:.1f} = {best / usual:.3f} | | | |", flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default="kernels,algorithms")
    parser.add_argument("--most", type=int, default=2048, help="rows of which kernels are counted")
    parser.add_argument(
        "--rows",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[32, 64, 128, 192, 256, 320, 384, 512, 768, 1024, 2048, 8192],
    )
    parser.add_argument("--algorithms", type=int, default=32, help="most to time of each product")
    parser.add_argument("--megabytes", type=int, default=200, help="of weights in turns")
    parser.add_argument("--out", type=Path, help="the second part's results as JSON")
    options = parser.parse_args()
    if "kernels" in options.parts:
        count_kernels(options)
    if "algorithms" in options.parts:
        compare_algorithms(options)


if __name__ == "__main__":
    main()
