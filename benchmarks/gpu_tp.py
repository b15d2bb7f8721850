"""Models on one GPU and on several: ``python3 benchmarks/gpu_tp.py --shapes 8b --out X.json`` at the project's root.

Random weights and prompts, FP8, greedy and drawn; wall clock with prefill; a case is CONCURRENCY:INPUT:OUTPUT. Each
engine runs in a process of its own, one after the other in one call: one GPU, the ranks with NCCL alone, the ranks with
symmetric memory. A line of JSON a result, and all of them in ``--out``. That the ranks say what one says is what
``pytest -m gpu tests/torch_engine/test_tp_gpu.py`` shows.

``--parts``, with what they take beside the engine's start (8B: 55 s on one H200, 30 s on two, of which kernels are
compiled once; 70B is estimated at twice that):

  room    tokens that the KV caches hold: one GPU, ``TP``, and ``TP`` engines of one GPU each. No time.
  rates   the cases. 8B, 2 cases, greedy and drawn, 2 repeats: 10 s.
  steps   what a step of decodes takes on rank 0, by what the kernels are for, and the gaps (``kernel_groups.py``); what
          sums take there has waiting for other ranks in it. At the concurrencies of the cases. 5 s a case.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.kernel_groups import kernels_of, slowest_others, spent  # noqa: E402
from benchmarks.random_checkpoint import LLAMA_8B, LLAMA_70B, RandomCheckpoint  # noqa: E402
from flightline.torch_engine.core.config import EngineConfig  # noqa: E402
from flightline.torch_engine.core.request import GenerationRequest, SamplingParams  # noqa: E402
from flightline.torch_engine.engine import Engine, freeze_garbage_collector  # noqa: E402
from flightline.torch_engine.text.stream import TokenBytes  # noqa: E402

SHAPES = {"8b": LLAMA_8B, "70b": LLAMA_70B}
CASES = "1:128:128,8:128:128,32:128:128,128:128:128,1:8000:1"
MOST = 128
"""Requests at once: fewer graphs are sooner captured."""
PARTS = ("room", "rates", "steps")
RESERVE = 8 << 30
"""Bytes of each GPU for graphs and activations."""


def report(**result: Any) -> None:
    print(json.dumps(result), flush=True)


def room(shape: str, ranks: int) -> int:
    """Blocks that the KV cache of each GPU could have."""
    spec = SHAPES[shape]
    a_block = 2 * spec.num_layers * max(1, spec.num_kv_heads // ranks) * spec.head_dim * 16
    linear = spec.num_layers * spec.hidden_size * (
        2 * spec.head_dim * (spec.num_heads + spec.num_kv_heads) + 3 * spec.intermediate_size
    )  # fmt: skip
    weights = linear // ranks + 2 * spec.vocab_size * spec.hidden_size * (ranks + 1) // ranks
    blocks = int((torch.cuda.mem_get_info()[0] * 0.9 - weights - RESERVE) // a_block)
    report(
        part="room", shape=shape, ranks=ranks, kv_tokens=16 * blocks, weights_gib=round(weights / 2**30, 1),
        gpu_gib=round(torch.cuda.mem_get_info()[1] / 2**30, 1),
    )  # fmt: skip
    return blocks


def engine_of(shape: str, ranks: int, all_reduce: str) -> Engine:
    spec, blocks = SHAPES[shape], room(shape, ranks)
    config = EngineConfig(
        model_dir="random", device="cuda", compute_dtype="bfloat16", kv_dtype="fp8", num_kv_blocks=min(blocks, 20000),
        max_batch_size=MOST, max_num_tokens=8192, max_seq_len=8192, max_queue_size=0, enable_kv_cache_reuse=False,
        tensor_parallel_size=ranks, all_reduce=all_reduce,
    )  # fmt: skip
    started = time.perf_counter()
    engine = Engine(config, RandomCheckpoint(spec), TokenBytes([b"a"] * spec.vocab_size))
    freeze_garbage_collector()
    report(
        part="engine", shape=shape, ranks=ranks, all_reduce=all_reduce, description=engine.info.description,
        group=type(engine.ranks.group).__name__, load_s=round(time.perf_counter() - started, 1),
        memory_gib=round(torch.cuda.memory_allocated() / 2**30, 1), sums_us=engine.kernels.tuned.get("sums", {}),
    )  # fmt: skip
    return engine


def measure(shape: str, ranks: int, all_reduce: str, cases: str, repeats: int, parts: list[str]) -> None:
    engine, chance = engine_of(shape, ranks, all_reduce), random.Random(0)

    def run(sizes: str, sampling: SamplingParams) -> float:
        count, inputs, outputs = map(int, sizes.split(":"))
        batch = [
            GenerationRequest(
                [chance.randrange(5, 120000) for _ in range(inputs)], outputs, sampling, end_id=-1
            )
            for _ in range(count)
        ]
        started = time.perf_counter()
        whole = engine.generate(batch)
        took = time.perf_counter() - started
        assert sum(len(each.token_ids) for each in whole) == count * outputs
        return took

    greedy, drawn = SamplingParams(), SamplingParams(temperature=0.8, top_p=0.95, seed=1)
    for sizes in ("4:128:16", "40:500:8"):
        run(sizes, greedy)
        run(sizes, drawn)
    named = [(sizes, "greedy", greedy) for sizes in cases.split(",")]
    named += [(sizes, "drawn", drawn) for sizes in cases.split(",") if sizes.endswith("128:128")]
    for sizes, kind, sampling in named if "rates" in parts else []:
        seconds = [run(sizes, sampling) for _ in range(repeats)]
        count, _, outputs = map(int, sizes.split(":"))
        rates = [round(count * outputs / took, 1) for took in seconds]
        report(
            part="throughput", shape=shape, ranks=ranks, all_reduce=all_reduce, case=sizes, sampling=kind,
            output_tokens_per_s=statistics.median(rates), rates=rates, seconds=round(statistics.median(seconds), 4),
        )  # fmt: skip
    for count in (
        sorted({sizes.split(":")[0] for sizes in cases.split(",")}, key=int) if "steps" in parts else []
    ):
        for kind, sampling in (("greedy", greedy), ("drawn", drawn)):
            with profile(activities=[ProfilerActivity.CUDA]) as seen:
                run(f"{count}:4:64", sampling)
                torch.cuda.synchronize()
            kernels = kernels_of(seen)
            report(
                part="steps", shape=shape, ranks=ranks, all_reduce=all_reduce, concurrency=int(count),
                sampling=kind, us=spent(kernels), unnamed_us=slowest_others(kernels),
            )  # fmt: skip
    engine.close()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shapes", default="8b", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--engines", default="alone,nccl,auto", help="which of them, in this order")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--parts", default=",".join(PARTS), help="of those above")
    parser.add_argument("--one", default="", help=argparse.SUPPRESS)
    options = parser.parse_args()
    parts = options.parts.split(",")
    if unknown := set(parts) - set(PARTS):
        parser.error(f"--parts: {unknown.pop()} is none of {', '.join(PARTS)}")
    if options.one:
        shape, ranks, all_reduce = options.one.split(",")
        if parts == ["room"]:
            room(shape, int(ranks))
        else:
            measure(shape, int(ranks), all_reduce, options.cases, options.repeats, parts)
        return 0
    results: list[dict[str, Any]] = []
    failed = 0
    for shape in options.shapes.split(","):
        for name in options.engines.split(","):
            one = f"{shape},1,auto" if name == "alone" else f"{shape},{options.ranks},{name}"
            command = [sys.executable, __file__, "--one", one, "--cases", options.cases]
            command += ["--repeats", str(options.repeats), "--parts", options.parts]
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout is not None
                for line in process.stdout:
                    print(line, end="", flush=True)
                    if line.startswith("{"):
                        results.append(json.loads(line))
                    if options.out:
                        options.out.write_text(json.dumps(results, indent=1) + "\n")
            failed += process.returncode != 0
    table(results)
    return 1 if failed else 0


def table(results: list[dict[str, Any]]) -> None:
    """Rates of each case on one GPU and on several, and their ratio; what the caches hold; what a step consists of."""
    rates = {
        (each["shape"], each["case"], each["sampling"], each["ranks"], each["all_reduce"]): each["output_tokens_per_s"]
        for each in results if each["part"] == "throughput"
    }  # fmt: skip
    for (shape, case, sampling, ranks, all_reduce), rate in rates.items():
        alone = rates.get((shape, case, sampling, 1, "auto"))
        if ranks > 1 and alone:
            compared = f"{alone:,.1f} -> {rate:,.1f} tok/s on {ranks} ({all_reduce}), x {rate / alone:.2f}"
            print(f"{shape} {case} {sampling}: {compared}")
    rooms = {(each["shape"], each["ranks"]): each["kv_tokens"] for each in results if each["part"] == "room"}
    for (shape, ranks), tokens in rooms.items():
        if ranks > 1 and (shape, 1) in rooms:
            apart = ranks * max(0, rooms[shape, 1])
            print(
                f"{shape} KV cache: {tokens:,} tokens in one engine of {ranks}, {apart:,} in {ranks} engines of one"
            )
    steps = [each for each in results if each["part"] == "steps" and each["us"]]
    for each in steps:
        whose = f"{each['shape']} {each['concurrency']} {each['sampling']}, rank 0 of {each['ranks']}"
        figures = ", ".join(f"{name} {us:.0f}" for name, us in each["us"].items() if name != "steps")
        print(f"{whose} ({each['all_reduce']}), us: {figures}")


if __name__ == "__main__":
    sys.exit(main())
