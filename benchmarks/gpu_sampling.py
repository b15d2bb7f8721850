"""Microseconds that choosing tokens costs a step, by kind: ``python3 benchmarks/gpu_sampling.py`` on a GPU.

Rows of random bf16 logits of a vocabulary of 128,256, almost flat (top-p's worst case) unless ``--spread`` is large;
the launches of a step in a CUDA graph, replays over three sets of logits timed with device events, the median.
``--kernels KIND,...`` splits these kinds' time up by kernel.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.kernel_groups import microseconds_by_kernel
from benchmarks.kinds import ALL, request_fields
from flightline.torch_engine.core.request import GenerationRequest
from flightline.torch_engine.core.sequence import Sequence
from flightline.torch_engine.kernels.gpu.device_sampling import DeviceSampling
from flightline.torch_engine.kernels.gpu.sampling_ops import sample
from flightline.torch_engine.kernels.gpu.sampling_tables import Choice
from flightline.torch_engine.text.stream import TokenBytes

VOCAB, POSITION = 128256, 200
SETS = 3
"""Of logits, in turns: at 256 rows one set is as large as the cache."""
DEVICE = torch.device("cuda")


def step(kind: str, count: int, spread: float) -> Callable[[], None]:
    """What queues the choices of ``SETS`` steps of ``count`` rows."""
    tables = DeviceSampling(count, VOCAB, DEVICE)
    for slot in range(count):
        request = GenerationRequest([1, 2, 3], 100, **request_fields(kind, slot))
        tables.assign(slot, Sequence.start(slot, request, (1,), TokenBytes([b"a"]), 1))
    tables.flush()
    chance = torch.Generator(DEVICE).manual_seed(0)
    logits = [
        (torch.randn(count, VOCAB, generator=chance, device=DEVICE) * spread).bfloat16() for _ in range(SETS)
    ]
    slots = torch.arange(count, dtype=torch.int32, device=DEVICE)
    positions, last = torch.full_like(slots, POSITION), torch.zeros_like(slots)
    choice = Choice.empty(count, DEVICE)

    def queue() -> None:
        for each in logits:
            sample(each, None, None, None, slots, positions, tables.tables, last, choice)

    return queue


def microseconds(queue: Callable[[], None], repeats: int) -> float:
    """Of one of the ``SETS`` steps that ``queue`` queues."""
    queue()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        queue()
    times = []
    for _ in range(repeats + 3):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) * 1000 / SETS)
    return statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", default=",".join(ALL))
    parser.add_argument("--rows", default="1,64,256")
    parser.add_argument("--spread", type=float, default=1.3, help="standard deviation of the logits")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--kernels", default="", help="kinds to split up by kernel")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write all results there, as JSON")
    options = parser.parse_args()
    kinds, rows = options.kinds.split(","), [int(count) for count in options.rows.split(",")]
    figures = {
        kind: {
            count: round(microseconds(step(kind, count, options.spread), options.repeats), 1)
            for count in rows
        }
        for kind in kinds
    }
    split = {
        kind: {
            count: {
                name: round(us / SETS, 1)
                for name, us in microseconds_by_kernel(step(kind, count, options.spread)).items()
            }
            for count in rows
        }
        for kind in filter(None, options.kernels.split(","))
    }
    if options.out:
        result = {
            "torch": torch.__version__,
            "spread": options.spread,
            "microseconds": figures,
            "kernels": split,
        }
        options.out.write_text(json.dumps(result, indent=1))
    for kind, each in split.items():
        for count, kernels in each.items():
            print(f"{kind} x {count}:", ", ".join(f"{name.strip('_')} {us}" for name, us in kernels.items()))
    print(f"\n{'us a step':>12}" + "".join(f"{count:>9}" for count in rows))
    for kind, figure in figures.items():
        print(f"{kind:>12}" + "".join(f"{figure[count]:>9.1f}" for count in rows))


if __name__ == "__main__":
    main()
