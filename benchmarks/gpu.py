"""Throughput of the engine on one GPU: ``python3 benchmarks/gpu.py`` from the project's root.

Throughput is measured like the peer's (vLLM): the shape of Llama-3.1-8B with random weights made on the device,
random prompts, greedy, end of sequence ignored, wall clock with prefill; a case is CONCURRENCY:INPUT:OUTPUT.
One line of JSON a result; a table last. That it computes the right thing is what ``pytest -m gpu`` shows.
"""

from __future__ import annotations

import argparse
import cProfile
import dataclasses
import gc
import itertools
import json
import pstats
import random
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.guesses import GUESSES, HEAD, take_turns  # noqa: E402
from benchmarks.kinds import ALL, request_fields  # noqa: E402
from benchmarks.random_checkpoint import PRECISIONS, SHAPES, RandomCheckpoint  # noqa: E402
from flightline.torch_engine.core.config import EngineConfig  # noqa: E402
from flightline.torch_engine.core.request import GenerationRequest, SamplingParams  # noqa: E402
from flightline.torch_engine.engine import Engine, freeze_garbage_collector  # noqa: E402
from flightline.torch_engine.model import layout  # noqa: E402
from flightline.torch_engine.text.stream import TokenBytes  # noqa: E402

CASES = "1:128:128,8:128:128,32:128:128,64:128:128,256:128:128,1024:128:128,512:1000:500,1:1000:1"
PARTS = ("throughput", "gaps", "profile")
MORE_PARTS = ("arrivals", "speculation", "guided", "launch", "load")
BUDGETS = (8192, 4096, 2048, 1024, 512)
"""Tokens of one step (MAX_NUM_TOKENS of the build) to measure gaps at."""
STREAMS = 32
results: list[dict[str, Any]] = []


def report(**result: Any) -> None:
    results.append(result)
    print(json.dumps(result), flush=True)


def engine_of(options: argparse.Namespace, guesses: int = 0, vocabulary: list[bytes] | None = None) -> Engine:
    spec = SHAPES[options.shape]
    if options.layers:
        spec = dataclasses.replace(spec, layers=spec.layers[: options.layers])
    width = {"fp8": 1, "int8": 1 + 4 / spec.head_dim, "bfloat16": 2}[options.kv]
    a_block = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 16 * width
    parameters, linear = layout.count(spec)
    each = {"bf16": 2, "int4": 0.6, "mxfp4": 0.6}.get(options.precision, 1.1)
    weights = each * linear + 2 * (parameters - linear)
    room = torch.cuda.mem_get_info()[0] * 0.9 - weights - 8e9
    config = EngineConfig(
        model_dir="random", device="cuda", compute_dtype="bfloat16", kv_dtype=options.kv,
        weight_precision={"bf16": "dequantised", "int8": "int8"}.get(options.precision, "auto"),
        lm_head_precision=options.head, cuda_graphs=not options.no_graphs, cuda_tuning=not options.no_tuning,
        num_kv_blocks=min(60000, int(room / a_block)),
        max_batch_size=options.batch, max_num_tokens=options.budget, max_seq_len=4096, max_queue_size=0,
        enable_kv_cache_reuse=False, speculation_tokens=guesses,
    )  # fmt: skip
    started = time.perf_counter()
    checkpoint = RandomCheckpoint(spec, options.precision)
    engine = Engine(config, checkpoint, TokenBytes(vocabulary or [b"a"] * spec.vocab_size))
    freeze_garbage_collector()  # as the engine's server does
    report(
        part="engine", description=engine.info.description, load_s=round(time.perf_counter() - started, 1),
        memory_gib=round(torch.cuda.memory_allocated() / 2**30, 1),
    )  # fmt: skip
    if engine.kernels.tuned:
        report(part="tuning", microseconds=engine.kernels.tuned)
    return engine


def requests(
    count: int, inputs: int, outputs: int, chance: random.Random, kind: str = "greedy"
) -> list[GenerationRequest]:
    return [
        GenerationRequest(
            [chance.randrange(5, 120000) for _ in range(inputs)],
            outputs,
            end_id=-1,
            **request_fields(kind, number),
        )
        for number in range(count)
    ]


def throughput(engine: Engine, options: argparse.Namespace) -> None:
    chance = random.Random(0)
    kinds = options.sampling.split(",")
    for warm in ((4, 128, 16), (1, 128, 128), (40, 500, 8)):
        engine.generate(requests(*warm, chance, kinds[-1]))
    rates: dict[str, list[float]] = defaultdict(list)
    seconds: dict[str, list[float]] = defaultdict(list)
    waits: dict[str, list[float]] = defaultdict(list)
    watched: dict[str, dict[str, float]] = {}
    torch.cuda.reset_peak_memory_stats()
    # Each case's kinds follow each other, so that their ratios are of the same minute.
    named = [(case, kind) for case in options.cases.split(",") for kind in kinds]
    named += [(case, "greedy") for case in filter(None, options.greedy_cases.split(","))]
    for repeat in range(options.repeats):
        for sizes, kind in named:
            count, inputs, outputs = map(int, sizes.split(":"))
            case = sizes if kind == "greedy" else f"{sizes} {kind}"
            if repeat and count * outputs > 100_000 and not options.long:
                continue  # minutes of device time for little
            batch = requests(count, inputs, outputs, chance, kind)
            waited, watch = Waiting(engine), Watch()
            torch.cuda.synchronize()
            started = time.perf_counter()
            whole = engine.generate(batch)
            took = time.perf_counter() - started
            waits[case].append(waited.stop() / took)
            watched[case] = watch.stop()
            made = sum(len(output.token_ids) for output in whole)
            assert made == count * outputs, f"{made} tokens instead of {count * outputs}"
            rates[case].append(made / took)
            seconds[case].append(took)
    for case, values in rates.items():
        sizes, _, kind = case.partition(" ")
        share = statistics.median(values) / statistics.median(rates.get(sizes, values))
        report(
            part="throughput", case=sizes, sampling=kind or "greedy",
            of_greedy=round(share, 3), output_tokens_per_s=round(statistics.median(values), 1),
            lowest=round(min(values), 1), highest=round(max(values), 1), rates=[round(v, 1) for v in values],
            seconds=round(statistics.median(seconds[case]), 4),
            host_waits=round(statistics.median(waits[case]), 2), gpu=watched[case],
            peak_gib=round(torch.cuda.max_memory_allocated() / 2**30, 1),
        )  # fmt: skip


def guess(options: argparse.Namespace) -> None:
    """Prompt lookup against none. Random weights do not copy, so a bias says what follows: always the same, one of two
    by chance (half of the guesses are wrong, which costs most), or nothing (the cost of looking alone).
    """
    engine = engine_of(options, guesses=GUESSES)
    chance = random.Random(1)
    texts = {
        "as the weights say, greedy": SamplingParams(),
        "as the weights say, temperature 1": SamplingParams(top_p=1.0, seed=1),
        "one token": SamplingParams(logit_bias=((77, 1e4),)),
        "one of two tokens": SamplingParams(top_p=1.0, seed=1, logit_bias=((77, 1e4), (78, 1e4))),
    }
    for sizes in options.guess_cases.split(","):
        count, inputs, outputs = map(int, sizes.split(":"))
        for text, sampling in texts.items():
            batches = [
                [
                    dataclasses.replace(each, sampling=sampling)
                    for each in requests(count, inputs, outputs, chance)
                ]
                for _ in range(options.repeats)
            ]
            turns = take_turns(engine, text, count, batches.__getitem__, options.repeats)
            report(part="speculation", case=sizes, row=turns.row(), **dataclasses.asdict(turns))


def guided(options: argparse.Namespace) -> None:
    """What guides cost: rows with a JSON schema each against as many without, and what plain rows lose beside them."""
    from benchmarks.guided import RECORDS, compare
    from benchmarks.words import pieces

    engine = engine_of(options, vocabulary=pieces(SHAPES[options.shape].vocab_size))
    chance = random.Random(4)
    prompts = [request.prompt_ids for request in requests(128, 128, 1, chance)]
    for rows in (1, 32, 64):
        sizes = argparse.Namespace(rows=rows, rounds=options.repeats, tokens=128, greedy=False)
        report(part="guided", rows=rows, rates=compare(engine, prompts[: 2 * rows], sizes))
    for name, guides in (
        ("64 drawn", (None,)),
        ("64 guided", (RECORDS,)),
        ("128, half guided", (None, RECORDS)),
    ):
        count = int(name.split()[0].strip(","))
        for number, prompt in enumerate(prompts[:count]):
            sampling = SamplingParams(0.8, top_p=0.95, seed=number)
            guide = guides[number % len(guides)]
            engine.add(number, GenerationRequest(prompt, 200, sampling, end_id=-1, guide=guide))
        while any(sequence.num_generated < 2 for sequence in engine.sequences.values()):
            engine.step()
        by_kernel(f"decode {name}", engine.step, 20)
        report(part="host", what=name, ms_a_step=host_times(engine, 40))
        for key in list(engine.sequences):
            engine.cancel(key)


def host_times(engine: Engine, steps: int) -> dict[str, float]:
    """Milliseconds a step in what a step calls; ``_fetch`` waits for the device, the others are the host's own."""
    spent: dict[str, float] = defaultdict(float)
    owners = {
        "schedule": engine.scheduler, "launch": engine.runner, "_fetch": engine, "finish": engine.runner,
        "_mask": engine.runner, "allow": engine.runner.sampling, "step": engine,
    }  # fmt: skip

    def timed(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return real(*arguments)
            finally:
                spent[name] += time.perf_counter() - began

        return call

    for name, owner in owners.items():
        setattr(owner, name, timed(name, getattr(owner, name)))
    for _ in range(steps):
        engine.step()
    for name, owner in owners.items():
        delattr(owner, name)
    return {name: round(seconds / steps * 1e3, 3) for name, seconds in spent.items()}


class Watch:
    """Utilisation, power and memory of the GPU while something runs, as NVML tells ``nvidia-smi``."""

    def __init__(self) -> None:
        query = "--query-gpu=utilization.gpu,power.draw,memory.used"
        command = ["nvidia-smi", query, "--format=csv,noheader,nounits", "-lms", "100", "-i", "0"]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def stop(self) -> dict[str, float]:
        """Means (of utilisation: NVML's own window is longer than our sampling) and the largest memory use."""
        self._process.terminate()
        rows = [line.split(",") for line in self._process.communicate()[0].splitlines()]
        columns = list(zip(*[[float(value) for value in row] for row in rows if len(row) == 3], strict=True))
        if not columns:
            return {}
        busy, power, memory = columns
        return {
            "busy_percent": round(statistics.mean(busy)), "power_w": round(statistics.mean(power)),
            "memory_mib": round(max(memory)),
        }  # fmt: skip


class Waiting:
    """Time that the host spends waiting for tokens: near 0 means that the host is the bottleneck."""

    def __init__(self, engine: Engine) -> None:
        self.runner, self.launch, self.total = engine.runner, engine.runner.launch, 0.0
        engine.runner.launch = self._launch

    def _launch(self, chunks: list, sampling: list) -> Any:
        ticket = self.launch(chunks, sampling)

        def timed() -> list:
            started = time.perf_counter()
            tokens = ticket()
            self.total += time.perf_counter() - started
            return tokens

        return timed

    def stop(self) -> float:
        self.runner.launch = self.launch
        return self.total


def profile(engine: Engine, options: argparse.Namespace) -> None:
    """One decode step at several batch sizes and one prompt step of several shapes, by kernel."""
    chance = random.Random(1)
    for case in options.profile_at.split(","):
        count, length = map(int, (case if ":" in case else f"{case}:128").split(":"))
        for number, request in enumerate(requests(count, length, 200, chance)):
            engine.add(number, request)
        while any(sequence.num_generated < 2 for sequence in engine.sequences.values()):
            engine.step()
        by_kernel(f"decode {case}", engine.step, 20)
        for key in list(engine.sequences):
            engine.cancel(key)
    for case in filter(None, options.profile_prompts.split(",")):
        count, length = map(int, case.split(":"))

        def prompts(count: int = count, length: int = length) -> None:
            engine.generate(requests(count, length, 1, chance))

        by_kernel(f"prompts {case}", prompts, 3)


def gaps(engine: Engine, options: argparse.Namespace) -> None:
    """Time between two tokens of a stream while prompts of others are computed, and what these wait for it."""
    for budget in BUDGETS:
        config = engine.scheduler.config
        engine.scheduler.config = dataclasses.replace(config, max_num_tokens=budget, max_batch_size=256)
        try:
            report(part="gaps", budget=budget, **gaps_at(engine))
        finally:
            engine.scheduler.config = config
            for key in list(engine.sequences):
                engine.cancel(key)


def gaps_at(engine: Engine) -> dict[str, float]:
    chance = random.Random(3)
    for number, request in enumerate(requests(STREAMS, 128, 2000, chance)):
        engine.add(number, request)
    while any(sequence.num_generated < 8 for sequence in engine.sequences.values()):
        engine.step()
    last = dict.fromkeys(range(STREAMS), time.perf_counter())

    def step(found: list[float]) -> set[Any]:
        """Adds the gaps of the streams; returns the other requests that have ended."""
        outputs = engine.step()
        now = time.perf_counter()
        for key, _ in outputs:
            if key in last:
                found.append(now - last[key])
                last[key] = now
        return {key for key, output in outputs if key not in last and output.finish_reason is not None}

    def beside(name: str, prompts: list[GenerationRequest]) -> dict[str, float]:
        """Worst gap while these prompts are computed, and when the last of them has its token."""
        found: list[float] = []
        started, open_prompts = time.perf_counter(), set()
        for number, request in enumerate(prompts):
            engine.add((name, number), request)
            open_prompts.add((name, number))
        while open_prompts:
            open_prompts -= step(found)
        took = time.perf_counter() - started
        for _ in range(8):
            step(found)
        return {f"{name}_worst_ms": round(max(found) * 1e3, 1), f"{name}_took_ms": round(took * 1e3, 1)}

    quiet: list[float] = []
    for _ in range(100):
        step(quiet)
    return {
        "quiet_p50_ms": round(statistics.median(quiet) * 1e3, 2), "quiet_worst_ms": round(max(quiet) * 1e3, 2),
        **beside("one_3900", requests(1, 3900, 1, chance)), **beside("sixteen_1000", requests(16, 1000, 1, chance)),
    }  # fmt: skip


def arrivals(engine: Engine, options: argparse.Namespace) -> None:
    """Users whose requests end and begin one by one, as applications' do, against users who all begin together, both
    with 128/128 tokens in a closed loop; then a step of streams that one prompt joins, and one that eight do."""
    chance, keys = random.Random(7), itertools.count()
    kind = options.sampling.split(",")[0]
    for users in map(int, options.arrivals.split(",")):
        ratios = []
        for _ in range(options.repeats):
            together = closed_loop(engine, users, [128] * users, chance, kind)
            spread = [1 + 127 * number // users for number in range(users)]
            ratios.append((closed_loop(engine, users, spread, chance, kind), together))
        apart, together = (statistics.median(side) for side in zip(*ratios, strict=True))
        report(
            part="arrivals", users=users, together_tok_s=round(together, 1), one_by_one_tok_s=round(apart, 1),
            ratio=round(apart / together, 3), all=[[round(value) for value in pair] for pair in ratios],
        )  # fmt: skip
        for number, request in enumerate(requests(users - 8, 128, 2000, chance, kind)):
            engine.add(number, request)
        while any(sequence.num_generated < 8 for sequence in engine.sequences.values()):
            engine.step()
        by_kernel(f"{users - 8} streams", engine.step, 20)
        for prompts in (1, 8):

            def joined(prompts: int = prompts) -> None:
                for request in requests(prompts, 128, 1, chance, kind):
                    engine.add(("joins", next(keys)), request)
                engine.step()

            by_kernel(f"{users - 8} streams, {prompts} prompts", joined, 20)
        for key in list(engine.sequences):
            engine.cancel(key)


def closed_loop(engine: Engine, users: int, firsts: list[int], chance: random.Random, kind: str) -> float:
    """Output tokens/s of users who ask again as soon as they are answered; the first answers have so many tokens."""
    waiting = iter(requests(4 * users, 128, 128, chance, kind))
    for number, request in enumerate(requests(users, 128, 128, chance, kind)):
        engine.add(("first", number), dataclasses.replace(request, max_tokens=firsts[number]))
    made, ends = 0, 0
    started = time.perf_counter()
    while ends < 4 * users:  # the rest runs out with fewer and fewer of them
        for _, output in engine.step():
            made += len(output.token_ids)
            if output.finish_reason is not None:
                ends += 1
                if (following := next(waiting, None)) is not None:
                    engine.add(("later", ends), following)
    took = time.perf_counter() - started
    for key in list(engine.sequences):
        engine.cancel(key)
    return made / took


def launch(engine: Engine, options: argparse.Namespace) -> None:
    """What the host does to launch a prompt's step that is no graph, by function: the device waits for that where it is
    longer than the step."""
    chance = random.Random(6)
    for case in filter(None, options.profile_prompts.split(",")):
        count, length = map(int, case.split(":"))
        profiler = cProfile.Profile()

        def prompts(count: int = count, length: int = length) -> float:
            started = time.perf_counter()
            for _ in range(5):
                engine.generate(requests(count, length, 1, chance))
            return (time.perf_counter() - started) / 5 * 1e3

        prompts()
        report(part="launch", what=f"prompts {case}", wall_ms=round(prompts(), 2))
        profiler.enable()
        prompts()
        profiler.disable()
        pstats.Stats(profiler).sort_stats("tottime").print_stats(16)


def load(engine: Engine, options: argparse.Namespace) -> None:
    """Only that: it fills Triton's cache. Several shapes can do so at once, before anything is measured."""


def by_kernel(what: str, work: Callable[[], Any], repeats: int) -> None:
    """Wall time of ``work``, then its kernels and the time between them."""
    work()
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(repeats):
        work()
    torch.cuda.synchronize()
    wall_ms = (time.perf_counter() - started) / repeats * 1e3
    profiled = 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        for _ in range(profiled):
            work()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    events.sort(key=lambda event: event["ts"])
    kernels: dict[str, list[float]] = defaultdict(list)
    for event in events:
        kernels[event["name"]].append(event["dur"])
    gaps = [after["ts"] - before["ts"] - before["dur"] for before, after in itertools.pairwise(events)]
    report(
        part="profile", what=what, wall_ms=round(wall_ms, 3), kernels=len(events) // profiled,
        busy_ms=round(sum(event["dur"] for event in events) / profiled / 1e3, 3),
        gaps_ms=round(sum(max(gap, 0) for gap in gaps) / profiled / 1e3, 3),
        largest_gaps_us=[round(gap) for gap in sorted(gaps)[-5:]],
    )  # fmt: skip
    top = sorted(kernels.items(), key=lambda item: -sum(item[1]))[:14]
    for name, times in top:
        print(
            f"  {what}: {sum(times) / profiled:8.1f} us, {len(times) / profiled:5.0f} x "
            f"{statistics.median(times):6.1f} us  {name[:100]}",
            flush=True,
        )
    results[-1]["top"] = [(name, len(times) / profiled, statistics.median(times)) for name, times in top]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join((*PARTS, *MORE_PARTS))}")
    parser.add_argument("--cases", default=CASES)
    parser.add_argument(
        "--guess-cases", default="1:128:128,8:128:128,32:128:128,64:128:128", help="of speculation"
    )
    parser.add_argument("--sampling", default="greedy", help=f"kinds, separated by commas: {', '.join(ALL)}")
    parser.add_argument("--greedy-cases", default="", help="more cases, of greedy requests only")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long", action="store_true", help="repeat the longest cases too")
    parser.add_argument("--shape", choices=PRECISIONS, default="llama-8b")
    parser.add_argument("--precision", default="fp8", help=f"of the shape: {PRECISIONS}")
    parser.add_argument(
        "--layers", type=int, help="only so many: a profile says the same of a model that loads sooner"
    )
    parser.add_argument("--kv", choices=["fp8", "int8", "bfloat16"], default="fp8")
    parser.add_argument("--head", choices=["auto", "fp8"], default="auto", help="auto = bf16")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--no-tuning", action="store_true", help="library products for few rows too")
    parser.add_argument("--batch", type=int, default=1024, help="max_batch_size")
    parser.add_argument("--budget", type=int, default=8192, help="max_num_tokens")
    parser.add_argument("--profile-at", default="1,64,256", help="COUNT[:LENGTH of the prompts], ...")
    parser.add_argument("--profile-prompts", default="64:128,1:1000", help="COUNT:LENGTH, ...")
    parser.add_argument("--arrivals", default="64,256", help="users")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write all results there, as JSON")
    options = parser.parse_args()
    if options.precision not in PRECISIONS[options.shape]:
        parser.error(
            f"--precision {options.precision}: --shape {options.shape} has {', '.join(PRECISIONS[options.shape])}"
        )
    chosen = options.parts.split(",")
    if unknown := set(chosen) - {*PARTS, *MORE_PARTS}:
        parser.error(f"--parts {','.join(sorted(unknown))}: use {', '.join((*PARTS, *MORE_PARTS))}")
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a CUDA device")
    import triton

    report(
        part="machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__, triton=triton.__version__,
        options={name: value for name, value in vars(options).items() if name != "out"},
    )  # fmt: skip
    engine: Engine | None = None
    for part in chosen:
        started = time.perf_counter()
        try:
            if part in ON_ONE_ENGINE:
                engine = engine or engine_of(options)
                ON_ONE_ENGINE[part](engine, options)
            else:
                engine = None  # it wants its memory
                gc.collect()
                {"speculation": guess, "guided": guided}[part](options)
        except Exception as error:
            traceback.print_exc()
            report(part=part, failed=f"{type(error).__name__}: {error}"[:500])
            engine = None
        gc.collect()
        print(f"-- {part}: {time.perf_counter() - started:.0f} s", flush=True)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    return table()


ON_ONE_ENGINE = {
    "throughput": throughput,
    "gaps": gaps,
    "profile": profile,
    "arrivals": arrivals,
    "launch": launch,
    "load": load,
}


def table() -> int:
    crashed = [result for result in results if "failed" in result]
    print()
    for result in crashed:
        print(f"  CRASHED {result['part']}: {result['failed']}")
    rows = [result["row"] for result in results if result["part"] == "speculation" and "row" in result]
    if rows:
        print("\n".join([HEAD, *rows]))
    for result in results:
        if result["part"] == "throughput":
            print(
                f"{result['case']:>14} {result['sampling']:>10} {result['output_tokens_per_s']:>10} tok/s "
                f"({result['lowest']} .. {result['highest']}), {result['of_greedy']:.3f} of greedy, "
                f"{result['seconds']:.3f} s, host waits {result['host_waits']:.0%}"
            )
        elif result["part"] == "gaps":
            print(
                f"  {result['budget']:>5} tokens a step: gaps {result['quiet_p50_ms']} ms; worst "
                f"{result['one_3900_worst_ms']} ms beside a prompt of 3,900 ({result['one_3900_took_ms']} ms), "
                f"{result['sixteen_1000_worst_ms']} ms beside 16 of 1,000 ({result['sixteen_1000_took_ms']} ms)"
            )
        elif result["part"] == "arrivals" and "users" in result:
            print(
                f"{result['users']:>5} users: {result['together_tok_s']} tok/s together, "
                f"{result['one_by_one_tok_s']} one by one: {result['ratio']:.3f}"
            )
        elif result["part"] == "profile" and "what" in result:
            print(
                f"  {result['what']:>16}: {result['wall_ms']} ms; kernels {result['busy_ms']} ms, "
                f"gaps {result['gaps_ms']} ms, {result['kernels']} launches"
            )
    return 1 if crashed else 0


if __name__ == "__main__":
    sys.exit(main())
