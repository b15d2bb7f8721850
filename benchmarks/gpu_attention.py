"""Attention alone on one GPU: prompts of 1,000 to 128,000 tokens by every plan, and decodes over unequal rows.

    python3 benchmarks/gpu_attention.py --out attention.json

A prompt is computed in chunks of ``--chunk`` tokens over a cache in the form that the engine has it. TFLOP/s count
the scores and weighted sums that a causal mask leaves; the roofs are the H200's dense ones, 989 TFLOP/s in bf16 and
1,979 in FP8. Every plan's result is compared with the first one's. Of decodes the table has the bytes of keys and
values a second, with the plan that is taken and with others; of decodes that share their first keys the time with
each for itself and together. ``--tiny`` tries all of it in Triton's interpreter, where times mean nothing:

    TRITON_INTERPRET=1 python3 benchmarks/gpu_attention.py --tiny
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.kernel_groups import microseconds_by_kernel  # noqa: E402
from flightline.torch_engine.core.shared_prefixes import Group  # noqa: E402
from flightline.torch_engine.kernels.gpu import attention  # noqa: E402
from flightline.torch_engine.kernels.gpu.attention import DecodePlan, PrefillPlan  # noqa: E402
from flightline.torch_engine.kernels.gpu.gathered import (  # noqa: E402
    GatheredPlan,
    GatheredScratch,
    ahead_plans,
    gathered_plans,
)
from flightline.torch_engine.kernels.gpu.kv_cache import AttentionInput, KVCache, rotate_write  # noqa: E402
from flightline.torch_engine.kernels.gpu.launch import INTERPRETED  # noqa: E402
from flightline.torch_engine.kernels.gpu.shared_prefix import PrefixPlan  # noqa: E402
from flightline.torch_engine.kernels.gpu.timing import (  # noqa: E402
    difference,
    graph_seconds,
    prefill_seconds,
    prompt_attention,
    random_qkv,
    shared_attention,
    shared_seconds,
)

BLOCK_SIZE = 16


def spread(rows: int) -> list[int]:
    """Lengths of users who have come at all times, with prompts of 128 tokens and 128 tokens to say."""
    return [129 + 127 * row // max(1, rows - 1) for row in range(rows)]


ROOFS = {"bf16": 989e12, "FP8": 1979e12}
DECODES = {
    "1 x 200": [200], "1 x 1,000": [1000], "1 x 100,000": [100_000], "8 x 16,000": [16_000] * 8,
    "16 x 129 to 256": spread(16), "32 x 129 to 256": spread(32), "64 x 129 to 256": spread(64),
    "128 x 129 to 256": spread(128), "256 x 129 to 256": spread(256), "512 x 129 to 256": spread(512),
    "64 x 4,000": [4000] * 64, "256 x 500": [500] * 256, "512 x 800": [800] * 512,
    "255 x 500 + 100,000": [500] * 255 + [100_000],
}  # fmt: skip
SHORT = 2048
"""Keys of a row up to which a step's graphs have plans of their own."""
CACHED = 300_000_000
"""Bytes of keys and values that are read before the same ones come again: many times what an L2 holds."""
SHARED = {
    "4 x 30,000": (4, 30_000),
    "8 x 1,000": (8, 1000),
    "64 x 2,000": (64, 2000),
    "256 x 2,000": (256, 2000),
}
DTYPE = torch.bfloat16
DEVICE = "cuda"
"""With ``--tiny`` both are others."""
results: list[dict[str, Any]] = []


def report(**result: Any) -> None:
    results.append(result)
    print(json.dumps(result), flush=True)


def new_cache(kind: str, blocks: int, kv_heads: int, size: int) -> KVCache:
    """Random keys and values."""
    shape = (blocks, 2, kv_heads, BLOCK_SIZE, size)
    values = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    for part in values.split(1024):  # in pieces: random numbers of all would be float32
        part.normal_()
    if kind == "fp8":
        return KVCache(values.to(torch.float8_e4m3fn), None)
    if kind == "int8":
        scales = torch.full(shape[:-1], 1 / 32, device=DEVICE)
        return KVCache((values * 32).round().clamp(-127, 127).to(torch.int8), scales)
    return KVCache(values, None)


def flops(begin: int, end: int, heads: int, size: int) -> float:
    """Of the tokens from ``begin`` to ``end`` of a prompt."""
    return 4.0 * heads * size * (end - begin) * (begin + end + 1) / 2


def prompts(options: argparse.Namespace, spec: Any, kind: str) -> None:
    cache = new_cache(kind, -(-max(options.lengths) // BLOCK_SIZE), spec.num_kv_heads, spec.head_dim)
    usual, *others = attention.long_prefill_plans(DTYPE, spec.head_dim)
    plans: list[PrefillPlan | GatheredPlan] = [usual]
    plans += dict.fromkeys([*others, *attention.usual_prefill_plans(DTYPE, spec.head_dim)[1:]])
    fp8 = cache.values.dtype == torch.float8_e4m3fn
    for turned in (False, True) if fp8 else (False,):
        scratch = GatheredScratch.new(cache, DTYPE, max(options.lengths), turned)
        plans += [GatheredPlan(tile, scratch) for tile in gathered_plans(DTYPE, spec.head_dim)]
        plans += ahead_plans(scratch, spec.attention_softcap, False)
    apart = {named(plan): checked(plan, plans[0], spec, cache) for plan in plans}
    for length in options.lengths:
        for plan in plans:
            name = named(plan)
            if math.isinf(apart[name]) or (isinstance(plan, GatheredPlan) and length > plan.keys):
                continue
            repeats = 5 if length <= 32_000 else 3
            seconds = 0.0
            for begin in range(0, length, options.chunk):
                end = min(length, begin + options.chunk)
                seconds += prefill_seconds(plan, spec, cache, end, end - begin, DTYPE, repeats, in_graph=True)
            rate = flops(0, length, spec.num_heads, spec.head_dim) / seconds
            report(
                part="prompt", kv=kind, tokens=length, plan=name, layer_ms=round(seconds * 1e3, 3),
                tflops=round(rate / 1e12, 1), difference=apart[name],
                **{f"of_{roof}_roof": round(rate / most, 3) for roof, most in ROOFS.items()},
            )  # fmt: skip


def named(plan: PrefillPlan | GatheredPlan) -> str:
    return f"{'gathered, ' if isinstance(plan, GatheredPlan) else ''}{plan}"


def checked(
    plan: PrefillPlan | GatheredPlan, first: PrefillPlan | GatheredPlan, spec: Any, cache: KVCache
) -> float:
    """Difference of the two plans' results; infinite where ``plan`` does not run."""
    context = min(5000, cache.values.shape[0] * BLOCK_SIZE)
    qkv = random_qkv(spec, min(300, context), DTYPE, cache.values.device)
    expected = prompt_attention(first, spec, cache, context, qkv)()
    try:
        return difference(prompt_attention(plan, spec, cache, context, qkv)(), expected)
    except Exception as error:  # a plan that this compiler or device cannot have
        report(part="refused", plan=named(plan), error=f"{type(error).__name__}: {error}"[:300])
        return math.inf


def libraries(options: argparse.Namespace, spec: Any) -> None:
    """PyTorch's attention by cuDNN and by FlashAttention over dense keys and values in fp16: a chunk of a prompt, and
    the same chunk over what came before it. What a library would give, conversion and gathering not counted."""
    tokens = min(max(options.lengths), options.chunk)
    queries = torch.randn(1, spec.num_heads, tokens, spec.head_dim, dtype=torch.float16, device=DEVICE)
    for context in sorted({0, *(length - tokens for length in options.lengths if length > tokens)}):
        shape = (1, spec.num_kv_heads, context or tokens, spec.head_dim)
        keys, values = (torch.randn(shape, dtype=torch.float16, device=DEVICE) for _ in range(2))
        pairs = tokens * (context or (tokens + 1) / 2)
        for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
            try:
                with torch.nn.attention.sdpa_kernel(getattr(torch.nn.attention.SDPBackend, name)):
                    run = partial(
                        F.scaled_dot_product_attention,
                        queries,
                        keys,
                        values,
                        is_causal=not context,
                        enable_gqa=True,
                    )
                    run()
                    seconds = in_a_graph(run, 3)
            except RuntimeError as error:
                report(part="refused", plan=name, error=str(error)[:300])
                continue
            rate = 4.0 * spec.num_heads * spec.head_dim * pairs / seconds
            report(
                part="library", name=name, tokens=tokens, before=context, layer_ms=round(seconds * 1e3, 3),
                tflops=round(rate / 1e12, 1),
            )  # fmt: skip


def shared(spec: Any, kind: str) -> None:
    """Decodes that share their first keys, each for itself and together."""
    for name, (count, common) in SHARED.items():
        blocks, own = common // BLOCK_SIZE, -(-100 // BLOCK_SIZE)
        cache = new_cache(kind, blocks + count * own, spec.num_kv_heads, spec.head_dim)
        usual = PrefixPlan.of(cache, spec.num_heads, DTYPE, multiprocessors())
        pays = usual.lay_out([Group(np.arange(count), blocks)], count, BLOCK_SIZE) is not None
        for plan in (usual, *usual.others(DTYPE, spec.head_dim)):
            shape = (spec, cache, count, blocks, own, DTYPE, multiprocessors())
            alone, together, apart = shared_seconds(plan, *shape)
            if math.isinf(together):
                continue
            kernels = {} if INTERPRETED else microseconds_by_kernel(shared_attention(plan, *shape)[1])
            report(
                part="shared", kv=kind, rows=name, plan=str(plan.tile), alone_us=round(alone * 1e6, 1),
                together_us=round(together * 1e6, 1), expected_to_pay=pays, difference=apart, kernels_us=kernels,
            )  # fmt: skip


def multiprocessors() -> int:
    return 2 if INTERPRETED else torch.cuda.get_device_properties(DEVICE).multi_processor_count


def in_a_graph(run: Callable[[], object], times: int = 20) -> float:
    """Seconds of one call."""
    times = 1 if INTERPRETED else times

    def runs() -> None:
        for _ in range(times):
            run()

    return graph_seconds(runs, 7) / times


def decodes(spec: Any, kind: str) -> None:
    """A layer's rotation and attention of decodes, over as many caches as a device does not remember."""
    integers = {"dtype": torch.int32, "device": DEVICE}
    for name, lengths in DECODES.items():
        used = [-(-length // BLOCK_SIZE) for length in lengths]
        layers = [new_cache(kind, sum(used), spec.num_kv_heads, spec.head_dim)]
        count = 1 if INTERPRETED else min(64, 1 + CACHED // layers[0].num_bytes)
        layers += [new_cache(kind, sum(used), spec.num_kv_heads, spec.head_dim) for _ in range(count - 1)]
        table = torch.zeros(len(lengths), max(used), **integers)
        at = 0
        for row, blocks in enumerate(used):
            table[row, :blocks] = torch.arange(at, at + blocks, **integers)
            at += blocks
        width = (spec.num_heads + 2 * spec.num_kv_heads) * spec.head_dim
        qkv = torch.randn(len(lengths), width, dtype=DTYPE, device=DEVICE)
        positions = torch.tensor(lengths, **integers) - 1
        rope = torch.zeros(max(lengths), 2, spec.head_dim // 2, device=DEVICE)
        rope[:, 0] = 1  # a rotation that leaves everything as it is: it is done in place, again and again
        where = AttentionInput(torch.arange(len(lengths), **integers), positions, table, len(lengths), None)
        plan = attention.decode_plan(
            len(lengths), spec.num_kv_heads, spec.num_groups, spec.head_dim, layers[0].values.element_size(),
            multiprocessors(), SHORT if max(lengths) <= SHORT else 131_072,
        )  # fmt: skip
        results = {}
        for way, (one, registers) in decode_ways(plan).items():
            bound, attention.REGISTERS = attention.REGISTERS, registers
            try:
                run = partial(step_of_decodes, qkv, layers, where, rope, spec, one)
                results[way] = run().float()
                seconds = in_a_graph(run, 1) / count
            finally:
                attention.REGISTERS = bound
            size = layers[0].values.element_size() * spec.head_dim + (4 if kind == "int8" else 0)
            read = 2 * sum(lengths) * spec.num_kv_heads * size
            report(
                part="decode", kv=kind, rows=name, way=way, plan=str(one), layer_us=round(seconds * 1e6, 1),
                gb_per_s=round(read / seconds / 1e9), difference=difference(results[way], results["taken"]),
            )  # fmt: skip


def step_of_decodes(
    qkv: torch.Tensor,
    layers: list[KVCache],
    where: AttentionInput,
    rope: torch.Tensor,
    spec: Any,
    plan: DecodePlan,
) -> torch.Tensor:
    """What the last layer gives."""
    where.shares.clear()
    for cache in layers:
        turned = rotate_write(qkv, cache, where, rope, spec.num_heads)
        out = attention.attend(turned, cache, where, spec.num_heads, spec.attention_scale, None, None, plan)
    return out


def decode_ways(plan: DecodePlan) -> dict[str, tuple[DecodePlan, int]]:
    """Plans, and the most registers of a thread: the one that is taken, that without a bound, and others."""
    bound = attention.REGISTERS
    ways = {"taken": (plan, bound), "any registers": (plan, 255), "uncut": (replace(plan, extra=0), bound)}
    for block, warps in ((32, 1), (64, 2), (128, 4)):
        if not INTERPRETED and (block, warps) != (plan.block, plan.warps):
            ways[f"{block} keys, {warps} warps"] = replace(plan, block=block, warps=warps), bound
    return ways


def make_tiny(options: argparse.Namespace) -> None:
    """Everything small, on a CPU."""
    global DEVICE, DTYPE
    if not INTERPRETED:
        sys.exit("gpu_attention.py: error: --tiny needs TRITON_INTERPRET=1")
    DEVICE, DTYPE = "cpu", torch.float32
    options.lengths, options.chunk, options.heads, options.kv_heads, options.size = [150], 100, 4, 2, 64
    DECODES.clear()
    DECODES.update({"3 unequal": [40, 200, 3]})
    SHARED.clear()
    SHARED.update({"3 x 256": (3, 256)})
    attention.long_prefill_plans = lambda dtype, size: [PrefillPlan(32, 32, 4, 1), PrefillPlan(64, 64, 4, 2)]


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
    parser.add_argument("--parts", default="decodes,shared,prompts,libraries")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tiny", action="store_true", help="small sizes without a GPU")
    options = parser.parse_args()
    if options.tiny:
        make_tiny(options)
    spec = SimpleNamespace(
        num_heads=options.heads, num_kv_heads=options.kv_heads, num_groups=options.heads // options.kv_heads,
        head_dim=options.size, attention_scale=options.size**-0.5, attention_softcap=None,
    )  # fmt: skip
    try:
        if "libraries" in options.parts:
            libraries(options, spec)
        for kind in options.kv.split(","):
            if "decodes" in options.parts:
                decodes(spec, kind)
            if "shared" in options.parts:
                shared(spec, kind)
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
    print(
        "\n| KV cache | decodes sharing | plan | alone, us a layer | together | difference |"
        "\n|---|---|---|--:|--:|--:|"
    )
    for one in results:
        if one["part"] == "shared":
            cells = [one[key] for key in ("kv", "rows", "plan", "alone_us", "together_us", "difference")]
            print("| " + " | ".join(map(str, cells)) + " |")
    print("\n| library | tokens | over so many before | ms a layer | TFLOP/s |\n|---|--:|--:|--:|--:|")
    for one in results:
        if one["part"] == "library":
            cells = [one[key] for key in ("name", "tokens", "before", "layer_ms", "tflops")]
            print("| " + " | ".join(map(str, cells)) + " |")
    print("\n| KV cache | decodes | plan | us a layer | GB/s | difference |")
    print("|---|---|---|--:|--:|--:|")
    for one in results:
        if one["part"] == "decode":
            cells = [one[key] for key in ("kv", "rows", "way", "layer_us", "gb_per_s")]
            print("| " + " | ".join(map(str, cells)) + f" | {one['difference']:.1e} |")


if __name__ == "__main__":
    main()
