"""Long prompts, shared prompts and conversations on one GPU, beside vLLM: ``python3 benchmarks/gpu_long.py``.

    python3 benchmarks/gpu_long.py --sides ours --out long.json
    python3 benchmarks/gpu_long.py --vllm 'env PYTHONPATH=SITE python3' --out long.json      # SITE has vLLM's wheels
    python3 benchmarks/gpu_long.py --tiny --sides ours,ours                                  # tries it, on a CPU

The shape of Llama-3.1-8B with random weights, FP8 weights and KV cache, greedy, end of sequence ignored, prefix reuse
on (``--no-reuse``: off, on both sides); all prompts differ where nothing else is said. ``--kv-tokens`` limits the KV
cache of both sides, ``--host-gib`` gives both a second tier in host memory. Each side is a process of its own, one
after the other, driven in the same way: requests are added, and a step of its engine is asked for again and again.
Rates are output tokens over wall clock, prefill included. A side stops beginning cases after ``--seconds`` and says
which it left out. One line of JSON a figure, a table last; the exit status is 1 if a side failed.

Cases: COUNTxINPUT/OUTPUT; ``first-N``: time to the first token of a prompt of N tokens alone; ``shared``: 64 prompts
with 2,000 tokens in common and 100 of their own, 128 more; ``turns``: 32 conversations that reach 30,000 tokens in 8
turns of a new text and 64 answered tokens each, in which all wait for the last; ``gaps``: time between two tokens of 32
streams while prompts of 30,000 tokens are computed one after the other, for ours with ``MAX_GAP_MS`` 0 and 50;
``curve``: a prompt alone of each length from 128 to 120,000 tokens, and a decode step after it (``long_curve.py``
draws it).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import re
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from gpu_compare import lines_of  # noqa: E402

CASES = (
    "1x30000/128,8x16000/256,64x4000/300,512x1000/500,first-1000,first-8000,first-30000,shared,gaps,turns,"
    "first-120000,1x120000/64,curve"
)
CURVE = (128, 256, 512, 768, 1000, 1100, 1500, 2000, 3000, 4000, 8000, 8500, 16_000, 30_000, 60_000, 120_000)
"""Lengths; some lie right behind one another, where steps change their kind."""
STEPS = 32
"""Decodes that a step's time is the mean of."""
LONGEST = 131_072
Step = list[tuple[str, list[int], bool]]
"""Of each request that got tokens in a step: its key, these tokens, whether it has ended."""


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What ``--tiny`` makes small."""

    shrink: int = 1
    """Lengths are divided by it."""
    vocabulary: int = 120_000
    most: int = 512
    """Requests together."""
    outputs: int = 2**31
    """Tokens of an answer at the most."""
    streams: int = 32
    talks: int = 32
    turns: int = 8

    def tokens(self, length: int) -> int:
        return max(length // self.shrink, 2)


TINY = Sizes(shrink=500, vocabulary=90, most=4, outputs=4, streams=3, talks=2, turns=3)


class Side(Protocol):
    """An engine in this process."""

    gaps: tuple[int, ...]
    """Values of MAX_GAP_MS that it can be asked for; (0,): it has none."""
    steps: list[list[float]]
    """Of bounded gaps: tokens, the mean of what they see, ms, ms expected, margin, whether the host was in time."""

    def describe(self) -> str: ...

    def add(self, key: str, prompt: list[int], outputs: int) -> None: ...

    def step(self) -> Step: ...

    def cancel(self, key: str) -> None: ...

    def bound_gaps(self, milliseconds: int) -> None: ...


class Ours:
    gaps = (0, 50)

    def __init__(self, options: argparse.Namespace) -> None:
        tiny = options.tiny
        sys.path.insert(0, str(HERE.parent))
        import torch

        from benchmarks.random_checkpoint import LLAMA_8B, RandomCheckpoint, scaled_down
        from flightline.torch_engine.core.config import EngineConfig
        from flightline.torch_engine.core.request import GenerationRequest
        from flightline.torch_engine.core.step_times import StepTimes
        from flightline.torch_engine.engine import Engine, freeze_garbage_collector
        from flightline.torch_engine.text.stream import TokenBytes

        class Recorded(StepTimes):
            """Remembers all steps with prompts, and what was expected of them."""

            def observe(times, work: Any, seconds: float, prompts: bool, sure: bool = True) -> None:
                if prompts:
                    expected = (1e3 * times.expected(work), times.margin)
                    seen = (work.tokens, work.pairs / work.tokens, 1e3 * seconds, *expected)
                    self.steps.append([*(round(value, 2) for value in seen), sure])
                super().observe(work, seconds, prompts, sure)

        self._request, self._times, self.steps = GenerationRequest, Recorded, []
        if tiny:
            spec = scaled_down(LLAMA_8B)
            where: dict[str, Any] = {
                "device": "cpu",
                "num_kv_blocks": 400,
                "max_seq_len": 512,
                "num_threads": 1,
            }
            checkpoint = RandomCheckpoint(spec, "bf16", "cpu")
        else:
            spec = LLAMA_8B
            a_block = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 16
            room = torch.cuda.mem_get_info()[0] * 0.9 - 18e9
            where = {
                "device": "cuda", "compute_dtype": "bfloat16", "kv_dtype": "fp8", "max_seq_len": LONGEST,
                "num_kv_blocks": options.kv_tokens // 16 or int(room / a_block), "max_num_tokens": 8192,
                "num_host_kv_blocks": int(options.host_gib * 2**30 / a_block),
            }  # fmt: skip
            checkpoint = RandomCheckpoint(spec)
        where["enable_kv_cache_reuse"] = not options.no_reuse
        config = EngineConfig(model_dir="random", max_batch_size=512, max_queue_size=0, **where)
        self.engine = Engine(config, checkpoint, TokenBytes([b"a"] * spec.vocab_size))
        freeze_garbage_collector()

    def describe(self) -> str:
        return self.engine.info.description

    def add(self, key: str, prompt: list[int], outputs: int) -> None:
        self.engine.add(key, self._request(prompt, outputs, end_id=-1))

    def step(self) -> Step:
        return [
            (key, list(output.token_ids), output.finish_reason is not None)
            for key, output in self.engine.step()
        ]

    def cancel(self, key: str) -> None:
        self.engine.cancel(key)

    def bound_gaps(self, milliseconds: int) -> None:
        scheduler = self.engine.scheduler
        scheduler.config = dataclasses.replace(scheduler.config, max_gap_ms=milliseconds)
        scheduler.times = self._times() if milliseconds else None


class Vllm:
    gaps = (0,)
    steps: list[list[float]] = []  # noqa: RUF012

    def __init__(self, options: argparse.Namespace) -> None:
        os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        import vllm
        from peer_vllm import SHAPE
        from vllm.sampling_params import RequestOutputKind

        folder = tempfile.mkdtemp()
        Path(folder, "config.json").write_text(json.dumps(SHAPE | {"max_position_embeddings": LONGEST}))
        room: dict[str, Any] = (
            {"num_gpu_blocks_override": options.kv_tokens // 16} if options.kv_tokens else {}
        )
        if options.host_gib:
            room["kv_offloading_size"] = options.host_gib
        llm = vllm.LLM(
            folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=LONGEST, max_num_seqs=512,
            gpu_memory_utilization=0.88, enable_prefix_caching=not options.no_reuse, quantization="fp8",
            kv_cache_dtype="fp8", block_size=16, **room,
        )  # fmt: skip
        self._engine, self._version = llm.llm_engine, vllm.__version__
        self._asked: dict[str, Any] = {
            "temperature": 0.0, "ignore_eos": True, "detokenize": False, "output_kind": RequestOutputKind.DELTA,
        }  # fmt: skip
        self._sampling = vllm.SamplingParams

    def describe(self) -> str:
        return f"vLLM {self._version}"

    def add(self, key: str, prompt: list[int], outputs: int) -> None:
        self._engine.add_request(
            key, {"prompt_token_ids": prompt}, self._sampling(max_tokens=outputs, **self._asked)
        )

    def step(self) -> Step:
        return [
            (output.request_id, list(output.outputs[0].token_ids), output.finished)
            for output in self._engine.step()
        ]

    def cancel(self, key: str) -> None:
        self._engine.abort_request([key])

    def bound_gaps(self, milliseconds: int) -> None:
        raise NotImplementedError("vLLM has no bound on gaps: its steps have as many tokens as they may")


class Cases:
    """Runs cases on one side and prints their figures."""

    def __init__(self, side: Side, sizes: Sizes) -> None:
        self.side, self.sizes = side, sizes
        self.chance = random.Random(0)
        self._number = 0

    def prompt(self, length: int) -> list[int]:
        return [self.chance.randrange(5, self.sizes.vocabulary) for _ in range(length)]

    def add(self, prompt: list[int], outputs: int) -> str:
        self._number += 1
        self.side.add(str(self._number), prompt, outputs)
        return str(self._number)

    def generate(self, prompts: list[list[int]], outputs: int) -> tuple[float, list[list[int]]]:
        """Seconds until all have their tokens, and these."""
        started = time.perf_counter()
        answers: dict[str, list[int]] = {self.add(prompt, outputs): [] for prompt in prompts}
        running = set(answers)
        while running:
            for key, tokens, ended in self.side.step():
                answers[key] += tokens
                running -= {key} if ended else set()
        took = time.perf_counter() - started
        made = {len(tokens) for tokens in answers.values()}
        assert made == {outputs}, f"{made} tokens instead of {outputs}"
        return took, list(answers.values())

    def warm_up(self) -> None:
        """Kernels of usual shapes are compiled, few and many rows, short and long."""
        for count, inputs, outputs in ((1, 3000, 16), (4, 128, 16), (64, 128, 8), (1, 9000, 4)):
            self.generate([self.prompt(self.sizes.tokens(inputs)) for _ in range(count)], outputs)

    def run(self, name: str) -> Iterator[dict[str, Any]]:
        """The figures of a case: how many of what, and whether more is better."""
        tokens = self.sizes.tokens
        if found := re.fullmatch(r"(\d+)x(\d+)/(\d+)", name):
            count, inputs, outputs = map(int, found.groups())
            count, inputs = min(count, self.sizes.most), tokens(inputs)
            yield self._rate(count, outputs, lambda: [self.prompt(inputs) for _ in range(count)], inputs)
        elif found := re.fullmatch(r"first-(\d+)", name):
            length = tokens(int(found[1]))
            times = [self.generate([self.prompt(length)], 1)[0] for _ in range(repeats(length))]
            yield figure("first token, ms", [1e3 * took for took in times], False)
        elif name == "shared":
            count = min(64, self.sizes.most)

            def shared() -> list[list[int]]:
                begin = self.prompt(tokens(2000))
                return [begin + self.prompt(tokens(100)) for _ in range(count)]

            yield self._rate(count, 128, shared, tokens(2100))
        elif name == "turns":
            yield from self._turns()
        elif name == "curve":
            for length in CURVE:
                yield from self._point(length)
        elif name == "gaps":
            for bound in self.side.gaps:
                yield from self._gaps(bound)
        else:
            raise SystemExit(f"gpu_long.py: error: case {name!r} is unknown: use some of {CASES}")

    def _rate(
        self, count: int, outputs: int, prompts: Callable[[], list[list[int]]], inputs: int
    ) -> dict[str, Any]:
        outputs = min(outputs, self.sizes.outputs)
        times = [self.generate(prompts(), outputs)[0] for _ in range(repeats(count * inputs))]
        return figure("output tokens/s", [count * outputs / took for took in times], True)

    def _turns(self) -> Iterator[dict[str, Any]]:
        sizes = self.sizes
        answered = min(64, sizes.outputs)
        new = max(sizes.tokens(30_000) // sizes.turns - answered, 2)
        talks: list[list[int]] = [[] for _ in range(sizes.talks)]
        times = []
        for _ in range(sizes.turns):
            talks = [talk + self.prompt(new) for talk in talks]
            took, answers = self.generate(talks, answered)
            talks = [talk + answer for talk, answer in zip(talks, answers, strict=True)]
            times.append(took)
        yield figure("output tokens/s", [sizes.talks * sizes.turns * answered / sum(times)], True)
        yield figure("first turn, s", [times[0]], False)
        yield figure("last turn, s", [times[-1]], False)

    def _point(self, length: int) -> Iterator[dict[str, Any]]:
        """Of the curve. The prompt whose decodes are timed is the last one again, of which all but the end is known."""
        prompts = [self.prompt(self.sizes.tokens(length)) for _ in range(repeats(length))]
        times = [self.generate([prompt], 1)[0] for prompt in prompts]
        yield figure(f"first token of {length} tokens, ms", [1e3 * took for took in times], False)
        alone, more = (
            min(self.generate([prompts[-1]], outputs)[0] for _ in range(2)) for outputs in (1, 1 + STEPS)
        )
        step = max(more - alone, 1e-9) / STEPS
        yield figure(f"step after {length} tokens, ms", [1e3 * step], False)

    def _gaps(self, bound: int) -> Iterator[dict[str, Any]]:
        """Between tokens of streams; the prompts come one after the other, each as soon as the last has its token."""
        sizes, side = self.sizes, self.side
        if bound:
            side.bound_gaps(bound)
            self.generate(
                [self.prompt(sizes.tokens(4000)) for _ in range(4)], 64
            )  # it learns how long steps take
        streams = {
            self.add(self.prompt(sizes.tokens(128)), 20_000 // sizes.shrink): 0.0
            for _ in range(sizes.streams)
        }
        gaps: list[float] = []

        def step() -> tuple[list[str], float]:
            """What has ended beside the streams, and when."""
            outputs = side.step()
            now = time.perf_counter()
            for key, tokens, _ in outputs:
                if tokens and key in streams:
                    if streams[key]:
                        gaps.append(now - streams[key])
                    streams[key] = now
            return [key for key, _, ended in outputs if ended and key not in streams], now

        while not all(streams.values()):
            step()
        for _ in range(20):
            step()
        gaps.clear()
        waits = []
        for _ in range(8 if sizes.shrink == 1 else 2):
            started, ended = time.perf_counter(), []
            key = self.add(self.prompt(sizes.tokens(30_000)), 1)
            while key not in ended:
                ended, now = step()
            waits.append(now - started)
        for key in streams:
            side.cancel(key)
        if bound:
            side.bound_gaps(0)
        gaps.sort()
        said = f" (MAX_GAP_MS={bound})" if bound else ""
        for share in (50, 99, 99.9):
            value = gaps[min(len(gaps) - 1, int(len(gaps) * share / 100))]
            yield figure(f"gap p{share:g}, ms{said}", [1e3 * value], False)
        yield figure(f"longest gap, ms{said}", [1e3 * gaps[-1]], False)
        yield figure(f"first token beside streams, s{said}", waits, False)
        if bound:
            yield {"steps": side.steps}


def repeats(tokens: int) -> int:
    """Of a case that computes so many tokens of prompts: what takes seconds by itself is measured once."""
    return 3 if tokens <= 40_000 else 2 if tokens <= 150_000 else 1


def figure(what: str, values: list[float], more_is_better: bool) -> dict[str, Any]:
    digits = [float(f"{value:.4g}") for value in values]
    return {
        "what": what,
        "value": float(f"{statistics.median(values):.4g}"),
        "all": digits,
        "more": more_is_better,
    }


def measure(name: str, options: argparse.Namespace) -> None:
    """One side, in this process."""
    started = time.perf_counter()
    side: Side = {"ours": Ours, "vllm": Vllm}[name](options)
    cases = Cases(side, TINY if options.tiny else Sizes())
    cases.warm_up()
    print(json.dumps({"side": name, "engine": side.describe()}), flush=True)
    for case in options.cases.split(","):
        began = time.perf_counter()
        if began - started > options.seconds:
            print(json.dumps({"side": name, "case": case, "left_out": True}), flush=True)
            continue
        for line in cases.run(case):
            print(json.dumps({"side": name, "case": case, **line}), flush=True)
        print(f"-- {case}: {time.perf_counter() - began:.0f} s", flush=True)


def table(lines: list[tuple[int, dict[str, Any]]], sides: list[str]) -> str:
    """``lines`` are those of all sides, each with the number of its side."""
    rows: dict[tuple[str, str], dict[int, dict[str, Any]]] = {}
    for number, line in lines:
        if "what" in line:
            rows.setdefault((line["case"], line["what"]), {})[number] = line
    text = [
        f"| case | figure | {' | '.join(sides)} | first against last |",
        "|---|---|" + "--:|" * (len(sides) + 1),
    ]
    for (case, what), found in rows.items():
        cells = [f"{found[number]['value']:g}" if number in found else "" for number in range(len(sides))]
        ratio = ""
        if len(sides) > 1 and {0, len(sides) - 1} <= set(found):
            first, last = found[0]["value"], found[len(sides) - 1]["value"]
            ratio = f"{first / last:.2f}" if found[0]["more"] else f"{last / first:.2f}"
        text.append(f"| {case} | {what} | {' | '.join(cells)} | {ratio} |")
    out = sorted({f"{sides[number]}: {line['case']}" for number, line in lines if line.get("left_out")})
    text.append("\nAbove 1 the first side is better." if len(sides) > 1 else "")
    if out:
        text.append(f"Left out for want of time: {', '.join(out)}.")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--sides", default="ours,vllm", help="of ours and vllm, in this order")
    parser.add_argument("--vllm", default=sys.executable, metavar="PYTHON", help="command that has vLLM")
    parser.add_argument("--seconds", type=float, default=480, help="after which a side begins no case more")
    parser.add_argument("--no-reuse", action="store_true", help="of prefixes, on both sides")
    parser.add_argument(
        "--kv-tokens", type=int, default=0, help="most tokens in the KV cache (0: what has room)"
    )
    parser.add_argument("--host-gib", type=float, default=0.0, help="of host memory for more of the KV cache")
    parser.add_argument("--tiny", action="store_true", help="a small model and short prompts, on a CPU")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write all results there, as JSON")
    parser.add_argument("--only", choices=("ours", "vllm"), help="this side in this process, without a table")
    options = parser.parse_args()
    if options.only:
        return measure(options.only, options)
    sides = options.sides.split(",")
    if unknown := sorted(set(sides) - {"ours", "vllm"}):
        parser.error(f"--sides {unknown[0]}: use ours and vllm")
    lines: list[tuple[int, dict[str, Any]]] = []
    failed: list[str] = []
    for number, side in enumerate(sides):
        command = shlex.split(options.vllm) if side == "vllm" else [sys.executable]
        command += [__file__, "--only", side, "--cases", options.cases, "--seconds", str(options.seconds)]
        command += ["--kv-tokens", str(options.kv_tokens), "--host-gib", str(options.host_gib)]
        command += ["--no-reuse"] * options.no_reuse
        try:
            for line in lines_of(command + ["--tiny"] * options.tiny):
                lines.append((number, line))
        except SystemExit as error:  # what the others gave, and this one before, is worth a table
            failed.append(f"{side}: {error}")
        if options.out:
            options.out.write_text(json.dumps([line for _, line in lines], indent=1) + "\n", encoding="utf-8")
    print("\n" + table(lines, sides))
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
