"""Microseconds that choosing tokens costs a step on a CPU, by kind: ``python3 benchmarks/cpu_sampling.py``.

The logits are those of an engine's own answers (``make build-engines``), at temperature 1 and, almost flat, the same
divided by 8: top-p's worst case. Every kind chooses from the same ones, in turns; of each step the least of
``--repeats`` counts, so that others on the machine do not. ``--against FOLDER`` has other compiled kernels take turns
with these.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.cpu import deployment, texts
from benchmarks.kinds import ALL, request_fields
from flightline.torch_engine import runner
from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.core.request import GenerationRequest
from flightline.torch_engine.core.sampling import Row, Sampled, Sampler, sample
from flightline.torch_engine.core.sequence import Sequence
from flightline.torch_engine.engine import Engine
from flightline.torch_engine.kernels.cpu.native import NativeKernels
from flightline.torch_engine.text.stream import TokenBytes

STEPS = range(4, 64, 10)
"""Of an answer, whose logits are taken."""
FLAT = 8


def answered(config: EngineConfig, count: int) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Logits [count, vocab] of ``STEPS``, and the tokens of each prompt and its answer."""
    engine = Engine(config)
    tokenizer = Tokenizer.from_file(str(Path(config.model_dir) / "tokenizer.json"))
    prompts = [each.ids for each in tokenizer.encode_batch(texts(count))]
    seen: list[torch.Tensor] = []

    def watched(logits: torch.Tensor, rows: list[Row], kernels: Sampler) -> list[Sampled]:
        if len(rows) == count:
            seen.append(logits.clone())
        return sample(logits, rows, kernels)

    runner.sample = watched  # type: ignore[assignment]
    requests = [
        GenerationRequest(ids, STEPS.stop + 2, end_id=-1, stream=False, **request_fields("seeded", number))
        for number, ids in enumerate(prompts)
    ]
    outputs = engine.generate(requests)
    runner.sample = sample
    said = [prompt + output.token_ids for prompt, output in zip(prompts, outputs, strict=True)]
    return [seen[step] for step in STEPS], said


def sequences(kind: str, said: list[list[int]]) -> list[Row]:
    made = []
    for number, tokens in enumerate(said):
        request = GenerationRequest(tokens, 100, **request_fields(kind, number))
        made.append(Row(Sequence.start(number, request, (1,), TokenBytes([]), 1)))
    return made


def microseconds(
    sides: dict[str, Sampler],
    kinds: list[str],
    steps: list[torch.Tensor],
    said: list[list[int]],
    repeats: int,
) -> dict[str, dict[str, float]]:
    """Of a step: side -> kind -> the mean of the steps' least times."""
    rows = {kind: sequences(kind, said) for kind in kinds}
    least: dict[tuple[str, str], list[float]] = {}
    for logits in steps:
        times: dict[tuple[str, str], float] = {}
        for number in range(repeats):
            for kind in kinds:
                for side, kernels in sorted(sides.items(), reverse=bool(number % 2)):
                    copied = logits.clone()
                    start = time.perf_counter()
                    sample(copied, rows[kind], kernels)
                    spent = time.perf_counter() - start
                    times[side, kind] = min(spent, times.get((side, kind), spent))
        for key, spent in times.items():
            least.setdefault(key, []).append(1e6 * spent)
    return {side: {kind: round(statistics.mean(least[side, kind]), 1) for kind in kinds} for side in sides}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument("--rows", default="1,16")
    parser.add_argument("--kinds", default=",".join(ALL))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--isa", default="auto", help="avx512, avx2, portable: one that the folders have")
    parser.add_argument("--kernels", metavar="FOLDER", help="compiled kernels; the build's own by default")
    parser.add_argument("--against", metavar="FOLDER", help="others to compare with")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write all figures there, as JSON")
    options = parser.parse_args()
    kinds = options.kinds.split(",")
    settings: dict[str, Any] = {"enable_kv_cache_reuse": False, "num_threads": options.threads}
    config = EngineConfig.load(deployment(options.build_dir.absolute())["engine_dir"], **settings)
    steps, said = answered(config, max(int(count) for count in options.rows.split(",")))

    def loaded(folder: str) -> NativeKernels:
        own = EngineConfig(model_dir=config.model_dir, kernel_dir=folder, cpu_isa=options.isa)
        return NativeKernels(own, torch.device("cpu"), torch.float32, options.threads)

    sides: dict[str, Sampler] = {"ours": loaded(options.kernels or config.kernel_dir)}
    if options.against:
        sides["against"] = loaded(options.against)
    figures = {}
    for count in map(int, options.rows.split(",")):
        for shape, factor in (("peaked", 1), ("flat", FLAT)):
            some = [each[:count] / factor for each in steps]
            figures[f"{count} {shape}"] = microseconds(sides, kinds, some, said[:count], options.repeats)
    for case, found in figures.items():
        print(f"\n{case + ', us a step':24}" + "".join(f"{side:>10}{'- greedy':>10}" for side in sides))
        for kind in kinds:
            each = "".join(
                f"{found[side][kind]:10.1f}{found[side][kind] - found[side][kinds[0]]:10.1f}"
                for side in sides
            )
            print(f"{kind:24}" + each)
    if options.output:
        options.output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
