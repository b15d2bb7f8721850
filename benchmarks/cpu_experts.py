"""One row through mixtures of experts on a CPU, beside what their bytes allow: ``python benchmarks/cpu_experts.py``.

Layers of Qwen3-30B-A3B's shape with fewer experts, random weights, about 1 GB in all, so that each call reads weights
from memory. What the bytes allow is the rate of a dense linear of the same precision that is too large for the caches,
run by the same kernels in the same minute. One line of JSON a precision and number of rows.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.kernels.cpu.native import NativeKernels, NativeLinear
from flightline.torch_engine.kernels.cpu.toolchain import compile_library
from flightline.torch_engine.model.mixture import MixtureSpec, mixture_linears, mixture_sizes

HIDDEN, INNER, EXPERTS, CHOSEN = 2048, 768, 32, 8
LAYERS = {"int4": 12, "int8": 7, "auto": 3}
"""Of about a gigabyte."""


class Random:
    """Weights of one routed MLP, drawn when asked for."""

    def __init__(self, mixture: MixtureSpec) -> None:
        sizes = mixture_sizes(mixture) | {"hidden_size": HIDDEN}
        self.shapes = {
            f"layer.{name}": [sizes[extent] for extent in shape]
            for name, shape in mixture_linears(mixture).items()
        }

    def raw(self, name: str) -> torch.Tensor:
        return torch.randn(self.shapes[name.removesuffix(".weight")]) / HIDDEN**0.5

    def fused(self, modules: list[str], dtype: torch.dtype) -> tuple[torch.Tensor, None]:
        return torch.cat([self.raw(module) for module in modules]), None

    def fused_coded(self, modules: list[str], dtype: torch.dtype, device: torch.device) -> None:
        return None  # they are packed from numbers


def seconds(run: Callable[[int], object], repeats: int) -> float:
    run(0)
    times = []
    for repeat in range(repeats):
        started = time.perf_counter()
        run(repeat)
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precisions", default="int4,int8,auto")
    parser.add_argument("--rows", default="1,4,16")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    options = parser.parse_args()
    mixture = MixtureSpec(EXPERTS, CHOSEN, INNER, normalise=True)
    with tempfile.TemporaryDirectory() as folder:
        compile_library(Path(folder))
        for precision in options.precisions.split(","):
            config = EngineConfig(model_dir="none", kernel_dir=folder, weight_precision=precision)
            kernels = NativeKernels(config, torch.device("cpu"), torch.float32, options.threads)
            layers = [
                kernels.load_mixture(Random(mixture), mixture, "layer", "silu")
                for _ in range(LAYERS[precision])
            ]
            dense = NativeLinear(kernels, torch.randn(65536, HIDDEN) / HIDDEN**0.5, None, kernels.bits)
            read = kernels._hidden(1, HIDDEN, dense.integers).zero_()
            dense_s = seconds(lambda repeat, dense=dense, read=read: dense(read), options.repeats)
            weight_s = dense_s / (dense.outputs * dense.inputs)
            for rows in map(int, options.rows.split(",")):
                x = torch.randn(options.repeats, rows, HIDDEN)
                took = seconds(
                    lambda repeat, x=x, layers=layers: [layer(x[repeat], None) for layer in layers],
                    options.repeats,
                )
                hits = 0
                for layer in layers:
                    logits = layer.router(x.flatten(0, 1)).view(options.repeats, rows, EXPERTS)
                    chosen = logits.topk(CHOSEN).indices
                    hits += statistics.mean(len(set(each.flatten().tolist())) for each in chosen)
                floor = hits * 3 * HIDDEN * INNER * weight_s
                print(json.dumps({
                    "precision": precision, "rows": rows, "threads": options.threads,
                    "us_a_layer": round(took / len(layers) * 1e6), "experts_hit": round(hits / len(layers), 1),
                    "share_of_what_bytes_allow": round(floor / took, 3),
                }), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
