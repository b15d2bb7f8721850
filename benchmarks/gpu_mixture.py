"""Products with the experts of a mixture, by the shape of their programs: ``python3 benchmarks/gpu_mixture.py``.

    python3 benchmarks/gpu_mixture.py --out mixture.json
    TRITON_INTERPRET=1 python3 benchmarks/gpu_mixture.py --tiny     # tries it, on a CPU, where times mean nothing

Random codes of two models' experts in their real sizes, and random routes: microseconds of ``_blocks_kernel`` alone in
a graph, the codes of the experts that were hit a second, and the operations of all pairs a second; blocks of as many
rows as the engine takes, of half and of twice as many. Every shape's result is compared with the one's that
``mixture.block_plan`` says, which is marked. One line of JSON a figure, a table last.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flightline.torch_engine.kernels.gpu import mixture  # noqa: E402
from flightline.torch_engine.kernels.gpu.grouped import Kind  # noqa: E402
from flightline.torch_engine.kernels.gpu.launch import INTERPRETED  # noqa: E402
from flightline.torch_engine.kernels.gpu.timing import difference, graph_seconds  # noqa: E402
from flightline.torch_engine.model.mixture import MixtureSpec  # noqa: E402

SHAPES = ((128, 4, 4), (64, 2, 4), (64, 4, 4), (128, 4, 3), (128, 8, 3), (256, 8, 3))
"""Outputs of a program, warps and stages."""
IN_A_GRAPH = 4
CODES = {"FP8 blocks": (Kind.E4M3, 128, 128, 1.0 + 4 / 128), "MXFP4": (Kind.FLOATS, 32, 64, 0.5 + 2 / 32)}
"""Kind, inputs of a group and of a tile, bytes of a weight with its scale."""


@dataclass(frozen=True)
class Model:
    codes: str
    experts: int
    chosen: int
    linears: tuple[tuple[str, int, int], ...]
    """Names, outputs and inputs."""


MODELS = {
    "Qwen3-30B-A3B": Model("FP8 blocks", 128, 8, (("gate and up", 1536, 2048), ("down", 2048, 768))),
    "gpt-oss-20b": Model("MXFP4", 32, 4, (("gate and up", 5760, 2880), ("down", 2880, 2880))),
}
DEVICE, DTYPE = "cuda", torch.bfloat16
"""With ``--tiny`` both are others."""


def random_experts(count: int, outputs: int, inputs: int, codes: str) -> mixture.Experts:
    kind, group, tile, _ = CODES[codes]
    cut = (group, tile, int(kind), 0)
    tiles, nothing = inputs // tile, torch.zeros(1, 1, 1, device=DEVICE)
    if kind == Kind.E4M3:
        values = torch.randn(count, tiles, outputs, tile, device=DEVICE).to(torch.float8_e4m3fn)
        scales = torch.rand(count, inputs // group, outputs, device=DEVICE)
        return mixture.Experts(values, outputs, inputs, scales, None, cut, nothing)
    words = (count, tiles, outputs, tile // 4)
    values = torch.randint(-(2**15), 2**15, words, dtype=torch.int16, device=DEVICE)
    exponents = torch.randint(-8, -2, (count, inputs // group, outputs), device=DEVICE)
    return mixture.Experts(values, outputs, inputs, (2.0**exponents).to(DTYPE), None, cut, nothing)


def product(name: str, model: Model, linear: tuple[str, int, int], rows: int) -> list[dict[str, Any]]:
    """The figures of all shapes."""
    title, outputs, inputs = linear
    down, pairs = title == "down", rows * model.chosen
    experts = random_experts(model.experts, outputs, inputs, model.codes)
    routes = torch.rand(rows, model.experts, device=DEVICE).topk(model.chosen).indices.to(torch.int32)
    shares = torch.rand(rows, model.chosen, device=DEVICE)
    x = torch.randn(pairs if down else rows, inputs, dtype=DTYPE, device=DEVICE)
    spec = MixtureSpec(model.experts, model.chosen, inputs)
    routed = mixture.CudaMixture(spec, torch.empty(0), None, experts, experts, None, "silu", DTYPE, None, 132)
    taken = routed.rows_of_block(pairs)
    sizes = (taken, *(size for size in (taken // 2, taken * 2) if 16 <= size <= 128))
    hit = len(routes.unique())
    weights = outputs * inputs
    figures: list[dict[str, Any]] = []
    expected: torch.Tensor | None = None
    planned = mixture.block_plan
    tried = []
    for size in sizes:
        usual = mixture.block_plan(experts, size)
        tried += [
            (size, shape, shape == usual) for shape in (usual, *(each for each in SHAPES if each != usual))
        ]
    for size, shape, is_usual in tried:
        blocks = mixture.sort_pairs(routes, model.experts, size)
        out = torch.full((pairs, outputs), torch.nan, dtype=DTYPE, device=DEVICE)

        def run(out: torch.Tensor = out, blocks: mixture.Sorted = blocks) -> None:
            for _ in range(IN_A_GRAPH):
                routed._blocks(x, experts, blocks, shares, out, rows, down)

        mixture.block_plan = lambda linear, size, shape=shape: shape
        try:
            run()
            seconds = graph_seconds(run) / IN_A_GRAPH
        except OutOfResources:
            continue
        finally:
            mixture.block_plan = planned
        expected = out.float() if expected is None else expected
        figures.append(
            {
                "model": name, "linear": title, "rows": rows, "experts_hit": hit, "block_rows": blocks.size,
                "outputs": shape[0], "warps": shape[1], "stages": shape[2], "chosen": is_usual and size == taken,
                "us": round(seconds * 1e6, 1), "gb_per_s": round(hit * weights * CODES[model.codes][3] / seconds / 1e9),
                "tflops": round(2 * pairs * weights / seconds / 1e12, 1), "difference": difference(out, expected),
            }
        )  # fmt: skip
        print(json.dumps(figures[-1]), flush=True)
    return figures


def make_tiny(options: argparse.Namespace) -> None:
    global DEVICE, DTYPE
    if not INTERPRETED:
        sys.exit("gpu_mixture.py: error: --tiny needs TRITON_INTERPRET=1")
    DEVICE, DTYPE, options.rows = "cpu", torch.float32, [5]
    for name, model in MODELS.items():
        MODELS[name] = Model(model.codes, 4, 2, (("gate and up", 128, 256), ("down", 128, 128)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    rows = {"type": lambda text: [int(part) for part in text.split(",")], "default": [32, 256, 4096]}
    parser.add_argument("--rows", **rows)  # type: ignore[arg-type]
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write all results there, as JSON")
    parser.add_argument("--tiny", action="store_true", help="small sizes without a GPU")
    options = parser.parse_args()
    if options.tiny:
        make_tiny(options)
    results: list[dict[str, Any]] = []
    with torch.inference_mode():
        for name in options.models.split(","):
            model = MODELS[name]
            for linear in model.linears:
                for count in options.rows:
                    results += product(name, model, linear, count)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(
        "\n| model | linear | rows | rows of a block; outputs, warps, stages | us | GB/s | TFLOP/s | difference |"
    )
    print("|---|---|--:|---|--:|--:|--:|--:|")
    for one in results:
        shape = f"{one['block_rows']}; {one['outputs']}, {one['warps']}, {one['stages']}"
        shape += " (taken)" if one["chosen"] else ""
        cells = [one[key] for key in ("us", "gb_per_s", "tflops")]
        print(
            f"| {one['model']} | {one['linear']} | {one['rows']} | {shape} | {' | '.join(map(str, cells))} | ",
            end="",
        )
        print(f"{one['difference']:.1e} |")


if __name__ == "__main__":
    main()
