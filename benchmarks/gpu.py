"""Correctness, then throughput, of the engine on one GPU: ``python3 benchmarks/gpu.py`` from the project's root.

Throughput is measured like the peer's (vLLM): the shape of Llama-3.1-8B with random weights made on the device,
random prompts, greedy, end of sequence ignored, wall clock with prefill; a case is CONCURRENCY:INPUT:OUTPUT.
One line of JSON a result; a table last; everything also in $OUT/gpu.json if OUT is set.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import os
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

from benchmarks.kinds import ALL, request_fields  # noqa: E402
from torch_engine.config import EngineConfig  # noqa: E402
from torch_engine.engine import Engine, spare_the_collector  # noqa: E402
from torch_engine.families import LayerSpec, ModelSpec, Rope  # noqa: E402
from torch_engine.request import GenerationRequest  # noqa: E402
from torch_engine.text import TokenBytes  # noqa: E402
from torch_engine.weights import Checkpoint  # noqa: E402

CASES = "1:128:128,8:128:128,32:128:128,64:128:128,256:128:128,1024:128:128,512:1000:500,1:1000:1"
PARTS = ("kernels", "families", "stress", "throughput", "gaps", "profile")
BUDGETS = (8192, 4096, 2048, 1024, 512)
"""Tokens of one step (MAX_NUM_TOKENS of the build) to measure gaps at."""
STREAMS = 32
LLAMA_ROPE = Rope(
    500000.0,
    (
        ("factor", 8.0), ("high_freq_factor", 4.0), ("low_freq_factor", 1.0),
        ("original_max_position_embeddings", 8192), ("rope_type", "llama3"),
    ),
)  # fmt: skip
LLAMA_8B = ModelSpec(
    architecture="LlamaForCausalLM", vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_heads=32,
    num_kv_heads=8, head_dim=128, norm_eps=1e-5, layers=(LayerSpec(LLAMA_ROPE, None),) * 32, tie_embeddings=False,
    max_position_embeddings=131072, activation="silu", attention_scale=128**-0.5, end_ids=(), fp8=True,
)  # fmt: skip

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the interpreter's: correctness only
results: list[dict[str, Any]] = []


def report(**result: Any) -> None:
    results.append(result)
    print(json.dumps(result), flush=True)


class RandomCheckpoint(Checkpoint):
    """Random weights of a given shape, made on the device when asked for: FP8 linears, the rest in bf16."""

    def __init__(self, spec: ModelSpec, fp8: bool, device: str = "cuda") -> None:
        self.spec, self.fp8, self.device, self.folder = spec, fp8, device, Path("random")
        self._generator = torch.Generator(device).manual_seed(0)

    def __contains__(self, name: str) -> bool:
        return name.endswith(("norm.weight", "layernorm.weight")) or name in (
            "model.embed_tokens.weight", "lm_head.weight",
        )  # fmt: skip

    def _random(self, *shape: int, spread: float) -> torch.Tensor:
        values = torch.randn(*shape, generator=self._generator, device=self.device, dtype=torch.bfloat16)
        return values * spread

    def _shape(self, module: str) -> tuple[int, int]:
        spec = self.spec
        hidden, inner, query = spec.hidden_size, spec.intermediate_size, spec.num_heads * spec.head_dim
        keys = spec.num_kv_heads * spec.head_dim
        return {
            "q_proj": (query, hidden), "k_proj": (keys, hidden), "v_proj": (keys, hidden), "o_proj": (hidden, query),
            "gate_proj": (inner, hidden), "up_proj": (inner, hidden), "down_proj": (hidden, inner),
            "lm_head": (spec.vocab_size, hidden), "embed_tokens": (spec.vocab_size, hidden),
        }[module.rsplit(".", 1)[-1]]  # fmt: skip

    def raw(self, name: str) -> torch.Tensor:
        if "norm" in name:
            return 1.0 + self._random(self.spec.hidden_size, spread=0.1)
        return self.weight(name.removesuffix(".weight"), torch.bfloat16)

    def weight(self, module: str, dtype: torch.dtype) -> torch.Tensor:
        return self._random(*self._shape(module), spread=0.02).to(dtype)

    def bias(self, module: str, dtype: torch.dtype) -> None:
        return None

    def fused_fp8(self, modules: list[str], device: torch.device) -> tuple | None:
        if not self.fp8:
            return None
        codes = [
            self._random(*self._shape(module), spread=64.0).clamp_(-448, 448).to(torch.float8_e4m3fn)
            for module in modules
        ]
        scale = torch.tensor(0.02 / 64, device=device)
        return torch.cat(codes), scale, torch.tensor(8.0 / 448, device=device), None


def llama_engine(options: argparse.Namespace) -> Engine:
    spec = LLAMA_8B
    width = {"fp8": 1, "int8": 1 + 4 / spec.head_dim, "bfloat16": 2}[options.kv]
    a_block = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 16 * width
    weights = 17e9 if options.precision == "bf16" else 10e9
    room = torch.cuda.mem_get_info()[0] * 0.9 - weights - 8e9
    config = EngineConfig(
        model_dir="random", device="cuda", compute_dtype="bfloat16", kv_dtype=options.kv,
        weight_precision={"fp8": "auto", "bf16": "dequantised", "int8": "int8"}[options.precision],
        lm_head_precision=options.head, cuda_graphs=not options.no_graphs, cuda_tuning=not options.no_tuning,
        num_kv_blocks=min(60000, int(room / a_block)),
        max_batch_size=options.batch, max_num_tokens=options.budget, max_seq_len=4096, max_queue_size=0,
        enable_kv_cache_reuse=False,
    )  # fmt: skip
    started = time.perf_counter()
    checkpoint = RandomCheckpoint(spec, fp8=options.precision == "fp8")
    engine = Engine(config, checkpoint, TokenBytes([b"a"] * spec.vocab_size))
    spare_the_collector()  # as the engine's server does
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
    for count in map(int, options.profile_at.split(",")):
        for number, request in enumerate(requests(count, 128, 200, chance)):
            engine.add(number, request)
        while any(sequence.num_generated < 2 for sequence in engine.sequences.values()):
            engine.step()
        by_kernel(f"decode {count}", engine.step, 20)
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


# Correctness -----------------------------------------------------------------------------------------


def check(name: str, ok: bool, detail: str = "") -> None:
    report(part="check", name=name, ok=bool(ok), detail=detail)


def kernels(options: argparse.Namespace) -> None:
    """The kernels' own tests, on this device."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
    command += [
        str(ROOT / f"tests/torch_engine/{name}.py") for name in ("test_triton_ops", "test_sampling_ops")
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    tail = run.stdout.strip().splitlines()[-1:]
    if run.returncode:
        print(run.stdout[-6000:], run.stderr[-2000:], flush=True)
    check("kernels against references (pytest -m gpu)", run.returncode == 0, " ".join(tail))


def families(options: argparse.Namespace) -> None:
    from tests.tiny import tiny_checkpoint
    from tests.torch_engine.test_models import VARIANTS

    with tempfile.TemporaryDirectory() as folder:
        for name, fields in VARIANTS.items():
            if options.families and name not in options.families.split(","):
                continue
            try:
                family(name, tiny_checkpoint(Path(folder) / name, **fields))
            except Exception as error:
                traceback.print_exc()
                check(name, False, f"{type(error).__name__}: {error}"[:300])


def small_engine(folder: Path, checkpoint: Checkpoint | None = None, **settings: Any) -> Engine:
    defaults = {
        "device": DEVICE, "kernels": "cuda", "num_kv_blocks": 256, "block_size": 16, "max_seq_len": 256,
        "max_batch_size": 8, "max_num_tokens": 16,
    }  # fmt: skip
    return Engine(EngineConfig(model_dir=str(folder), **{**defaults, **settings}), checkpoint)


def spoken(engine: Engine, prompts: list[list[int]], count: int = 12) -> list[list[int]]:
    whole = engine.generate([GenerationRequest(prompt, count, end_id=-1) for prompt in prompts])
    engine.audit()
    assert engine.stats.kv_blocks_free == engine.stats.kv_blocks_max
    return [output.token_ids for output in whole]


@torch.inference_mode()
def logit_error(engine: Engine, model: Any, prompts: list[list[int]]) -> float:
    """Relative error of the logits of a chunked prefill and of 12 decodes, batch 1, without graphs."""
    seen: list[torch.Tensor] = []
    raw_logits = engine.model.raw_logits

    def record(step: Any, caches: Any) -> torch.Tensor:
        logits = raw_logits(step, caches)
        scales = engine.model.lm_head.column_scales
        seen.append(engine.model.finished(logits.float() if scales is None else logits.float() * scales)[-1:])
        return logits

    engine.model.raw_logits = record
    ours, theirs = [], []
    for prompt in prompts:
        seen.clear()
        tokens = spoken(engine, [prompt])[0]
        truth = model(torch.tensor([prompt + tokens[:-1]], device=DEVICE), use_cache=False).logits[0].float()
        ours.append(torch.cat(seen[-len(tokens) :]))
        theirs.append(truth[len(prompt) - 1 :])
    engine.model.raw_logits = raw_logits
    expected = torch.cat(theirs)
    return ((torch.cat(ours) - expected).norm() / expected.norm()).item()


def family(name: str, folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    def reference(dtype: torch.dtype) -> Any:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")
        return model.eval().to(DEVICE)

    exact = reference(torch.float32)
    vocab = exact.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(7)
    prompts = [torch.randint(3, vocab, (n,), generator=generator).tolist() for n in (1, 3, 9, 33, 50, 100)]
    plain = {"enable_kv_cache_reuse": False, "cuda_graphs": False}
    error = logit_error(small_engine(folder, compute_dtype="float32", **plain), exact, prompts)
    check(f"{name}: float32 logits", error < 1e-3, f"relative error {error:.1e}")
    expected = spoken(small_engine(folder, compute_dtype="float32", kernels="pytorch"), prompts)
    for graphs in (False, True):
        for reuse in (False, True):
            engine = small_engine(
                folder, compute_dtype="float32", cuda_graphs=graphs, enable_kv_cache_reuse=reuse
            )
            same = [spoken(engine, prompts) == expected for _ in range(2)]
            check(f"{name}: float32 greedy tokens, graphs {graphs}, reuse {reuse}", all(same), str(same))
    speculation(name, folder)
    theirs = bf16_error(exact, reference(torch.bfloat16), prompts)
    for kv, limit in (("bfloat16", 1.5), ("int8", 2.5), ("fp8", 12.0)):
        error = logit_error(
            small_engine(folder, compute_dtype="bfloat16", kv_dtype=kv, **plain), exact, prompts
        )
        detail = f"relative error {error:.1e}, Transformers in bf16 {theirs:.1e}"
        check(f"{name}: bf16 logits, {kv} KV", error < limit * theirs, detail)
    # Random layers amplify rounding; the linears themselves are tested to a few per cent (part kernels).
    error = logit_error(
        small_engine(folder, Fp8View(folder), compute_dtype="bfloat16", kv_dtype="int8", **plain),
        exact,
        prompts,
    )
    check(f"{name}: FP8 W8A8 logits", error < 0.4, f"relative error {error:.1e}")
    error = logit_error(
        small_engine(folder, compute_dtype="bfloat16", weight_precision="int8", lm_head_precision="fp8", **plain),
        exact, prompts,
    )  # fmt: skip
    check(f"{name}: int8 W8A8 + FP8 head logits", error < 0.4, f"relative error {error:.1e}")


def speculation(name: str, folder: Path) -> None:
    """Guesses from the prompt change no greedy token; prompts that repeat themselves, so that some are right."""
    prompts = [[5, 6, 7, 8, 9] * 8, [11, 12] * 15, list(range(20, 60))]
    plain = {"compute_dtype": "float32", "cuda_graphs": False}
    count = 150 if DEVICE == "cuda" else 48
    expected = spoken(small_engine(folder, **plain, kernels="pytorch"), prompts, count)
    engine = small_engine(folder, **plain, speculation_tokens=4)
    same = spoken(engine, prompts, count) == expected
    told = f"{engine.stats.accepted_tokens} of {engine.stats.guessed_tokens} guesses were right"
    check(f"{name}: float32 greedy tokens with speculation", same and engine.stats.accepted_tokens > 0, told)


@torch.inference_mode()
def bf16_error(exact: Any, rounded: Any, prompts: list[list[int]]) -> float:
    ids = [torch.tensor([prompt], device=DEVICE) for prompt in prompts]
    truth = torch.cat([exact(prompt, use_cache=False).logits[0] for prompt in ids])
    theirs = torch.cat([rounded(prompt, use_cache=False).logits[0].float() for prompt in ids])
    return ((theirs - truth).norm() / truth.norm()).item()


class Fp8View(Checkpoint):
    """An unquantised checkpoint as if it had been quantised to FP8 with generous input scales."""

    def __init__(self, folder: Path) -> None:
        from torch_engine.families import load_spec

        super().__init__(folder, load_spec(folder))

    def fused_fp8(self, modules: list[str], device: torch.device) -> tuple:
        weight, bias = self.fused(modules, torch.float32)
        scale = weight.abs().amax() / 448
        codes = (weight / scale).to(torch.float8_e4m3fn)
        scales = (scale.to(device), torch.tensor(16 / 448, device=device))
        return codes.to(device), *scales, None if bias is None else bias.to(device)


def answers(options: argparse.Namespace) -> None:
    """A real model's greedy answers, against those of the PyTorch kernels on the CPU in float32."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from engine_build.build import CALIBRATION, GATE_PROMPTS
    from engine_build.prompts import read_prompts

    folder = options.model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    samples = [*read_prompts(GATE_PROMPTS), *read_prompts(CALIBRATION)][:20]
    texts = [sample.render(tokenizer) for sample in samples]
    prompts = [tokenizer(text, add_special_tokens=False).input_ids for text in texts]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    plain = {"max_num_tokens": 512, "max_seq_len": 1024, "max_batch_size": 32}
    expected = spoken(small_engine(folder, **plain, device="cpu", kernels="pytorch"), prompts, 48)
    for dtype in ("float32", "bfloat16"):
        for graphs in (True, False):
            engine = small_engine(folder, **plain, compute_dtype=dtype, kv_dtype=dtype, cuda_graphs=graphs)
            gaps = [
                gap_of(model, prompt, ours, theirs)
                for prompt, ours, theirs in zip(prompts, spoken(engine, prompts, 48), expected, strict=True)
            ]
            equal = gaps.count(None)
            worst = max((gap for gap in gaps if gap is not None), default=0.0)
            # Logits of about 20 lie 0.125 apart in bf16: a difference there is a tie.
            ok = equal == len(prompts) if dtype == "float32" else worst <= 0.5
            detail = f"{equal} of {len(prompts)} equal; where not, the logits differ by at most {worst:.3f}"
            check(f"{Path(folder).name}: greedy answers in {dtype}, graphs {graphs}", ok, detail)


@torch.inference_mode()
def gap_of(model: Any, prompt: list[int], ours: list[int], theirs: list[int]) -> float | None:
    """How far apart the logits of the first two differing tokens are; None if there is no such pair."""
    at = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
    if at is None:
        return None
    logits = model(torch.tensor([prompt + theirs[:at]])).logits[0, -1]
    return (logits[theirs[at]] - logits[ours[at]]).abs().item()


def stress(options: argparse.Namespace) -> None:
    """1,000 requests of random lengths, some cancelled, with too few KV blocks: all end and everything returns."""
    from tests.tiny import tiny_checkpoint

    chance = random.Random(5)
    count = 1000 if DEVICE == "cuda" else 10
    with tempfile.TemporaryDirectory() as folder:
        engine = small_engine(
            tiny_checkpoint(folder), compute_dtype="bfloat16" if DEVICE == "cuda" else "float32",
            num_kv_blocks=64, max_batch_size=32, max_num_tokens=128, batch_scheduler_policy="max_utilization",
            max_queue_size=0,
        )  # fmt: skip
        wanted = {}
        for number in range(count):
            prompt = [chance.randrange(3, 250) for _ in range(chance.randrange(1, 120))]
            wanted[number] = chance.randrange(1, 60)
            engine.add(number, GenerationRequest(prompt, wanted[number], end_id=-1))
        ended: dict[int, int] = defaultdict(int)
        cancelled = wrong = steps = 0
        memory = None
        while engine.busy:
            steps += 1
            for number, output in engine.step():
                ended[number] += len(output.token_ids)
                wrong += output.error is not None
            if chance.random() < 0.1 and engine.sequences:
                engine.cancel(chance.choice(list(engine.sequences)))
                cancelled += 1
            if steps == 100 and DEVICE == "cuda":
                memory = torch.cuda.memory_reserved()
        engine.audit()
        grown = torch.cuda.memory_reserved() - memory if memory else 0
    complete = sum(ended[number] == length for number, length in wanted.items())
    ok = not wrong and complete >= count - cancelled and engine.stats.kv_blocks_free == 64 and grown <= 2**26
    detail = (
        f"{complete} complete, {cancelled} cancelled, {engine.scheduler.num_preemptions} preemptions, "
        f"{steps} steps, memory grew by {grown} bytes"
    )
    check(f"stress: {count} requests", ok, detail)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--cases", default=CASES)
    parser.add_argument("--sampling", default="greedy", help=f"kinds, separated by commas: {', '.join(ALL)}")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--long", action="store_true", help="repeat the longest cases too")
    parser.add_argument("--precision", choices=["fp8", "bf16", "int8"], default="fp8")
    parser.add_argument("--kv", choices=["fp8", "int8", "bfloat16"], default="fp8")
    parser.add_argument("--head", choices=["auto", "fp8"], default="auto", help="auto = bf16")
    parser.add_argument("--no-graphs", action="store_true")
    parser.add_argument("--no-tuning", action="store_true", help="library products for few rows too")
    parser.add_argument("--batch", type=int, default=1024, help="max_batch_size")
    parser.add_argument("--budget", type=int, default=8192, help="max_num_tokens")
    parser.add_argument("--profile-at", default="1,64,256")
    parser.add_argument("--profile-prompts", default="64:128,1:1000", help="COUNT:LENGTH, ...")
    parser.add_argument("--model", help="checkpoint folder of part answers")
    parser.add_argument("--families", default="", help="only these variants, separated by commas")
    options = parser.parse_args()
    if DEVICE == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        sys.exit("benchmarks/gpu.py needs a CUDA device")
    import triton

    gpu = torch.cuda.get_device_name() if DEVICE == "cuda" else "none: Triton's interpreter"
    report(
        part="machine", gpu=gpu, torch=torch.__version__, triton=triton.__version__,
        options=vars(options),
    )  # fmt: skip
    chosen = options.parts.split(",")
    engine: Engine | None = None
    for part in chosen:
        started = time.perf_counter()
        try:
            if part in ("throughput", "gaps", "profile"):
                engine = engine or llama_engine(options)
                {"throughput": throughput, "gaps": gaps, "profile": profile}[part](engine, options)
            else:
                {"kernels": kernels, "families": families, "answers": answers, "stress": stress}[part](
                    options
                )
        except Exception as error:
            traceback.print_exc()
            report(part=part, failed=f"{type(error).__name__}: {error}"[:500])
            engine = None
        gc.collect()
        print(f"-- {part}: {time.perf_counter() - started:.0f} s", flush=True)
    if out := os.environ.get("OUT"):
        (Path(out) / "gpu.json").write_text(json.dumps(results, indent=1))
    return table()


def table() -> int:
    checks = [result for result in results if result["part"] == "check"]
    failed = [result for result in checks if not result["ok"]]
    crashed = [result for result in results if "failed" in result]
    print(f"\nchecks: {len(checks) - len(failed)} of {len(checks)} passed")
    for result in failed:
        print(f"  FAILED {result['name']}: {result['detail']}")
    for result in crashed:
        print(f"  CRASHED {result['part']}: {result['failed']}")
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
        elif result["part"] == "profile" and "what" in result:
            print(
                f"  {result['what']:>16}: {result['wall_ms']} ms; kernels {result['busy_ms']} ms, "
                f"gaps {result['gaps_ms']} ms, {result['kernels']} launches"
            )
    return 1 if failed or crashed else 0


if __name__ == "__main__":
    sys.exit(main())
