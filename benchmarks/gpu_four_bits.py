"""Four-bit weights against FP8 on one GPU, product by product: ``python3 benchmarks/gpu_four_bits.py``.

The products of a layer of Llama-3.1-8B, by every plan that the engine would time at load, each through so many copies
of its weight that all of them come from memory; microseconds of one product, and GB/s of the codes, scales and zeros
that it must read. Before its times each plan's result is compared with the product of the dequantised weight. One line
of JSON a result, a table last. About two minutes on an H200, of which most is compiling.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flightline.torch_engine.kernels.gpu.activation import Activation  # noqa: E402
from flightline.torch_engine.kernels.gpu.cuda import time_all  # noqa: E402
from flightline.torch_engine.kernels.gpu.four_bits import FourBitLinear  # noqa: E402
from flightline.torch_engine.kernels.gpu.grouped import ROWS_AT_ONCE, GroupedPlan, Scratch  # noqa: E402
from flightline.torch_engine.kernels.gpu.linear import SKINNY_ROWS, Fp8Linear, skinny_plans  # noqa: E402
from flightline.torch_engine.model.coded import Coded  # noqa: E402

SHAPES = {"qkv": (6144, 4096), "out": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
READ_AT_LEAST = 2**29
"""Bytes of all copies of a weight: ten times the L2 of an H200."""
BF16 = torch.bfloat16
results: list[dict[str, Any]] = []


def report(**result: Any) -> None:
    results.append(result)
    print(json.dumps(result), flush=True)


def coded(outputs: int, inputs: int, group: int) -> Coded:
    def random(width: int) -> torch.Tensor:
        return torch.randint(0, 16, (outputs, width), dtype=torch.uint8, device="cuda")

    scales = 0.003 + torch.rand(outputs, inputs // group, device="cuda") / 500
    return Coded(random(inputs), scales.half(), group, random(inputs // group), 4)


def error(linear: FourBitLinear, weight: torch.Tensor, x: torch.Tensor) -> float:
    """‖ours - theirs‖ / ‖theirs‖, against float32."""
    got = linear(Activation(x)).float()
    expected = x.float() @ weight.t()
    return float(((got.sum(0) if got.dim() == 3 else got) - expected).norm() / expected.norm())


def four_bits(name: str, rows: list[int], group: int, multiprocessors: int) -> None:
    outputs, inputs = SHAPES[name]
    scratch = Scratch(BF16, torch.device("cuda"))
    first = coded(outputs, inputs, group)
    weight = first.values(torch.float32)
    size = outputs * inputs // 2 + outputs * inputs // group * 4
    linears = [FourBitLinear(first, None, BF16, scratch, multiprocessors)]
    while len(linears) * size < READ_AT_LEAST:
        linears.append(FourBitLinear(coded(outputs, inputs, group), None, BF16, scratch, multiprocessors))
    for count in rows:
        x = torch.randn(count, inputs, device="cuda", dtype=BF16)
        plans: list[GroupedPlan | None] = [*linears[0].plans(min(count, ROWS_AT_ONCE))]
        if count > ROWS_AT_ONCE:
            plans += linears[0].many_plans()
        for plan in plans + ([None] if count >= ROWS_AT_ONCE else []):
            linears[0].choose(count, plan)
            wrong = error(linears[0], weight, x)
            took = time_all(linears, Activation(x), plan) / len(linears)
            report(
                product=name, weights=f"W4A16 g{group}", rows=count, plan=str(plan), us=round(took, 2),
                gb_s=round(size / took / 1e3), error=round(wrong, 5),
            )  # fmt: skip


def fp8(name: str, rows: list[int], multiprocessors: int) -> None:
    outputs, inputs = SHAPES[name]
    one = torch.ones((), device="cuda")
    linears = []
    while len(linears) * outputs * inputs < READ_AT_LEAST:
        codes = torch.randn(outputs, inputs, device="cuda").to(torch.float8_e4m3fn)
        linears.append(Fp8Linear(codes, one, one, None, BF16))
    for count in rows:
        x = Activation(torch.randn(count, inputs, device="cuda").to(torch.float8_e4m3fn))
        ours = skinny_plans(outputs, inputs, multiprocessors) if count <= SKINNY_ROWS else []
        for plan in (None, *ours):
            took = time_all(linears, x, plan) / len(linears)
            report(
                product=name, weights="FP8", rows=count, plan=str(plan), us=round(took, 2),
                gb_s=round(outputs * inputs / took / 1e3), error=None,
            )  # fmt: skip


def table(rows: list[int]) -> int:
    """The fastest plans; 1 if a result was wrong: of bf16 activations and exact weights it is within 1 %."""
    print(
        f"{'product':>8} {'rows':>5} {'FP8 us':>8} {'GB/s':>6} {'W4 us':>8} {'GB/s':>6} {'FP8 / W4':>9}  plan"
    )
    for name in SHAPES:
        for count in rows:
            found = [each for each in results if (each["product"], each["rows"]) == (name, count)]
            if not found:
                continue
            by_kind = [
                [each for each in found if (each["weights"] == "FP8") == eight] for eight in (True, False)
            ]
            theirs, ours = (min(kind, key=lambda each: each["us"]) for kind in by_kind)
            print(
                f"{name:>8} {count:>5} {theirs['us']:>8} {theirs['gb_s']:>6} {ours['us']:>8} {ours['gb_s']:>6} "
                f"{theirs['us'] / ours['us']:>9.2f}  {ours['plan']}"
            )
    wrong = [each for each in results if each["error"] is not None and not each["error"] < 0.01]
    for each in wrong:
        print("WRONG", json.dumps(each))
    return 1 if wrong else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--products", default=",".join(SHAPES))
    parser.add_argument("--rows", default="1,8,32,64,128")
    parser.add_argument("--group", type=int, default=128)
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write all results there, as JSON")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu_four_bits.py needs a CUDA device")
    rows = [int(count) for count in options.rows.split(",")]
    multiprocessors = torch.cuda.get_device_properties(0).multi_processor_count
    torch.manual_seed(0)
    for name in options.products.split(","):
        four_bits(name, rows, options.group, multiprocessors)
        fp8(name, rows, multiprocessors)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    return table(rows)


if __name__ == "__main__":
    sys.exit(main())
