"""Attention alone on one GPU: prompts of 1,000 to 128,000 tokens by every plan, and decodes over unequal rows.

    python3 benchmarks/gpu_attention.py --out attention.json

A prompt is computed in chunks of ``--chunk`` tokens over a cache in the form that the engine has it. TFLOP/s count
the scores and weighted sums that a causal mask leaves; the roofs are the H200's dense ones, 989 TFLOP/s in bf16 and
1,979 in FP8. Every plan's result is compared with the first one's. Of decodes the table has the bytes of keys and
values a second, with the rows cut by their length and uncut.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flightline.torch_engine.kernels.gpu import attention  # noqa: E402
from flightline.torch_engine.kernels.gpu.cuda import prefill_seconds  # noqa: E402
from flightline.torch_engine.kernels.gpu.kv_cache import AttentionInput, KVCache  # noqa: E402

BLOCK_SIZE = 16
ROOFS = {"bf16": 989e12, "FP8": 1979e12}
DECODES = {
    "1 x 1,000": [1000], "1 x 100,000": [100_000], "8 x 16,000": [16_000] * 8, "64 x 4,000": [4000] * 64,
    "256 x 500": [500] * 256, "255 x 500 + 100,000": [500] * 255 + [100_000],
}  # fmt: skip
results: list[dict[str, Any]] = []


def report(**result: Any) -> None:
    results.append(result)
    print(json.dumps(result), flush=True)


def new_cache(kind: str, blocks: int, kv_heads: int, size: int) -> KVCache:
    """Random keys and values."""
    shape = (blocks, 2, kv_heads, BLOCK_SIZE, size)
    values = torch.empty(shape, dtype=torch.bfloat16, device="cuda")
    for part in values.split(1024):  # in pieces: random numbers of all would be float32
        part.normal_()
    if kind == "fp8":
        return KVCache(values.to(torch.float8_e4m3fn), None)
    if kind == "int8":
        scales = torch.full(shape[:-1], 1 / 32, device="cuda")
        return KVCache((values * 32).round().clamp(-127, 127).to(torch.int8), scales)
    return KVCache(values, None)


def flops(begin: int, end: int, heads: int, size: int) -> float:
    """Of the tokens from ``begin`` to ``end`` of a prompt."""
    return 4.0 * heads * size * (end - begin) * (begin + end + 1) / 2


def prompts(options: argparse.Namespace, spec: Any, kind: str) -> None:
    cache = new_cache(kind, -(-max(options.lengths) // BLOCK_SIZE), spec.num_kv_heads, spec.head_dim)
    plans = attention.long_prefill_plans(torch.bfloat16, spec.head_dim)
    differences = {plan: difference(plan, plans[0], spec, cache) for plan in plans}
    for length in options.lengths:
        for plan in plans:
            repeats = 5 if length <= 32_000 else 3
            seconds = 0.0
            for begin in range(0, length, options.chunk):
                end = min(length, begin + options.chunk)
                seconds += prefill_seconds(plan, spec, cache, end, end - begin, torch.bfloat16, repeats)
            if math.isinf(seconds):
                continue  # it was refused, and said so
            rate = flops(0, length, spec.num_heads, spec.head_dim) / seconds
            report(
                part="prompt", kv=kind, tokens=length, plan=str(plan), layer_ms=round(seconds * 1e3, 3),
                tflops=round(rate / 1e12, 1), difference=differences[plan],
                **{f"of_{name}_roof": round(rate / roof, 3) for name, roof in ROOFS.items()},
            )  # fmt: skip


def difference(plan: attention.PrefillPlan, first: attention.PrefillPlan, spec: Any, cache: KVCache) -> float:
    """Largest one between the two plans' results, of the largest result; infinite where a plan does not run."""
    tokens, context = 300, min(5000, cache.values.shape[0] * BLOCK_SIZE)
    integers = {"dtype": torch.int32, "device": "cuda"}
    positions = torch.arange(context - tokens, context, **integers)
    table = torch.arange(cache.values.shape[0], **integers)[None]
    torch.manual_seed(0)
    width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
    qkv = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda")

    def run(which: attention.PrefillPlan) -> torch.Tensor:
        each = which.tokens(spec.num_groups)
        tiles = [(at, min(each, tokens - at), context - tokens + at, 0) for at in range(0, tokens, each)]
        where = AttentionInput(
            torch.zeros_like(positions), positions, table, 0, torch.tensor(tiles, **integers), context, True
        )
        return attention.attend(
            qkv, cache, where, spec.num_heads, spec.attention_scale, None, None,
            attention.DecodePlan(0, 0, 32, 1), prefill=which,
        ).float()  # fmt: skip

    try:
        expected, got = run(first), run(plan)
    except Exception as error:  # a plan that this compiler or device cannot have
        report(part="refused", plan=str(plan), error=f"{type(error).__name__}: {error}"[:300])
        return float("inf")
    return float((got - expected).abs().max() / expected.abs().max())


def in_a_graph(run: Callable[[], object], times: int = 20) -> float:
    """Seconds of one call."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(times):
            run()
    took = []
    for _ in range(7):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        took.append(start.elapsed_time(end) / times * 1e-3)
    return statistics.median(took)


def decodes(spec: Any, kind: str) -> None:
    integers = {"dtype": torch.int32, "device": "cuda"}
    multiprocessors = torch.cuda.get_device_properties("cuda").multi_processor_count
    for name, lengths in DECODES.items():
        used = [-(-length // BLOCK_SIZE) for length in lengths]
        cache = new_cache(kind, sum(used), spec.num_kv_heads, spec.head_dim)
        table = torch.zeros(len(lengths), max(used), **integers)
        at = 0
        for row, blocks in enumerate(used):
            table[row, :blocks] = torch.arange(at, at + blocks, **integers)
            at += blocks
        width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        qkv = torch.randn(len(lengths), width, dtype=torch.bfloat16, device="cuda")
        positions = torch.tensor(lengths, **integers) - 1
        where = AttentionInput(torch.arange(len(lengths), **integers), positions, table, len(lengths), None)
        plan = attention.decode_plan(
            len(lengths), spec.num_kv_heads, spec.num_groups, spec.head_dim, multiprocessors, 131_072
        )
        uncut = attention.DecodePlan(0, 0, plan.block, plan.warps)
        outputs = {}
        for cut, one in ((True, plan), (False, uncut)):
            run = partial(
                attention.attend, qkv, cache, where, spec.num_heads, spec.attention_scale, None, None, one
            )
            outputs[cut] = run().float()
            seconds = in_a_graph(run)
            size = cache.values.element_size() * spec.head_dim + (4 if kind == "int8" else 0)
            read = 2 * sum(lengths) * spec.num_kv_heads * size
            report(
                part="decode", kv=kind, rows=name, cut=cut, plan=str(one), layer_us=round(seconds * 1e6, 1),
                gb_per_s=round(read / seconds / 1e9),
            )  # fmt: skip
        worst = float((outputs[True] - outputs[False]).abs().max() / outputs[False].abs().max())
        report(part="decode difference", kv=kind, rows=name, difference=worst)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--lengths",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[1000, 2000, 4000, 8000, 16_000, 32_000, 64_000, 128_000],
    )
    parser.add_argument("--chunk", type=int, default=8192, help="tokens of one step")
    parser.add_argument("--kv", default="fp8,bfloat16,int8")
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--parts", default="decodes,prompts")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    spec = SimpleNamespace(
        num_heads=options.heads, num_kv_heads=options.kv_heads, num_groups=options.heads // options.kv_heads,
        head_dim=options.size, attention_scale=options.size**-0.5, attention_softcap=None,
    )  # fmt: skip
    try:
        for kind in options.kv.split(","):
            if "decodes" in options.parts:
                decodes(spec, kind)
            if "prompts" in options.parts:
                prompts(options, spec, kind)
    finally:
        if options.out:
            options.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n| KV cache | tokens | plan | ms a layer | TFLOP/s | of bf16's roof | of FP8's |")
    print("|---|--:|---|--:|--:|--:|--:|")
    for one in results:
        if one["part"] == "prompt":
            cells = [
                one[key]
                for key in ("kv", "tokens", "plan", "layer_ms", "tflops", "of_bf16_roof", "of_FP8_roof")
            ]
            print("| " + " | ".join(map(str, cells)) + " |")
    print("\n| KV cache | decodes | cut by length | us a layer | GB/s |")
    print("|---|---|---|--:|--:|")
    for one in results:
        if one["part"] == "decode":
            cells = [one[key] for key in ("kv", "rows", "cut", "layer_us", "gb_per_s")]
            print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
