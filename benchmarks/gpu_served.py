"""The same shape served: through Triton, by our own client, streamed and not: ``python3 benchmarks/gpu_served.py``.

Writes a random FP8 checkpoint of the shape of Llama-3.1-8B (in NVIDIA's unified layout, with a tokenizer whose words
are single tokens), or takes the one that gpu_checkpoint.py has made; builds an engine from it; puts the load on the
engine itself, in a process of its own; then starts the server as ``make serve`` does and puts the same load on it over
gRPC: a closed loop of users, each of whom sends the next of the same prompts as soon as the last is answered. Prompts
have 128 tokens, answers 128; end of sequence ignored; greedy, or another ``--sampling``, engine and server alike.
One line of JSON a case, a table last.
``--shape tiny`` is for trying the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import uvloop
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.kinds import KINDS, ours, request_fields  # noqa: E402
from benchmarks.random_checkpoint import LLAMA_8B, LLAMA_70B, RandomCheckpoint  # noqa: E402
from benchmarks.words import FIRST, word, write_tokenizer  # noqa: E402
from flightline.client.aio import AsyncClient  # noqa: E402
from flightline.deployment import Deployment  # noqa: E402
from flightline.engine_build.build import Build  # noqa: E402
from flightline.engine_build.settings import parse  # noqa: E402
from flightline.loadtest.http_client import HttpAnswer, HttpClient  # noqa: E402
from flightline.loadtest.openai_api import events  # noqa: E402
from flightline.model_repository.shared.vocabulary import Vocabulary  # noqa: E402
from flightline.torch_engine.core.config import EngineConfig  # noqa: E402
from flightline.torch_engine.core.request import GenerationRequest  # noqa: E402
from flightline.torch_engine.engine import Engine, freeze_garbage_collector  # noqa: E402
from flightline.torch_engine.model.spec import ModelSpec  # noqa: E402

LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
TINY = dataclasses.replace(
    LLAMA_8B, hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=2048,
    attention_scale=0.25, layers=LLAMA_8B.layers[:2],
)  # fmt: skip
SHAPES = {
    "8b": ("llama-3.1-8b-shape", LLAMA_8B), "70b": ("llama-3.3-70b-shape", LLAMA_70B), "tiny": ("tiny-shape", TINY),
}  # fmt: skip
"""The checkpoint's folder, and what is in it."""
LENGTH = 128
WAVES = 4
"""Requests of each user."""
WARM_UP = (1, 8, 64)
USERS_OF_A_CLIENT = 16
"""From this many users on, another client process."""


# A checkpoint ------------------------------------------------------------------------------------------


def write_checkpoint(folder: Path, spec: ModelSpec, device: str) -> None:
    """Names, scales and settings as NVIDIA's ModelOpt writes them."""
    folder.mkdir(parents=True)
    rope = spec.layers[0].rope
    config = {
        "architectures": [spec.architecture], "model_type": "llama", "vocab_size": spec.vocab_size,
        "hidden_size": spec.hidden_size, "intermediate_size": spec.intermediate_size,
        "num_hidden_layers": spec.num_layers,
        "num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads, "head_dim": spec.head_dim,
        "max_position_embeddings": 8192, "rms_norm_eps": spec.norm_eps, "tie_word_embeddings": False,
        "rope_theta": rope.theta, "rope_scaling": dict(rope.scaling), "torch_dtype": "bfloat16",
        "hidden_act": "silu", "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    quantization = {"quant_algo": "FP8", "kv_cache_quant_algo": None, "exclude_modules": ["lm_head"]}
    quantized = {"producer": {"name": "benchmark"}, "quantization": quantization}
    (folder / "hf_quant_config.json").write_text(json.dumps(quantized))
    write_tokenizer(folder, spec.vocab_size)
    source = RandomCheckpoint(spec, device=device)
    names = ["model.embed_tokens", "lm_head"]
    shards = [{f"{name}.weight": source.weight(name, torch.bfloat16) for name in names}]
    shards[0]["model.norm.weight"] = source.raw("model.norm.weight")
    where: dict[str, str] = {}
    for number, tensors in enumerate(itertools.chain(shards, layers(source, spec, device))):
        filename = f"model-{number:05}.safetensors"
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, folder / filename)
        where |= dict.fromkeys(tensors, filename)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))


def layers(source: RandomCheckpoint, spec: ModelSpec, device: str) -> Iterator[dict[str, torch.Tensor]]:
    for index in range(spec.num_layers):
        tensors = {}
        for kind in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"model.layers.{index}.{kind}.weight"] = source.raw("norm.weight")
        for linear in LINEARS:
            name = f"model.layers.{index}.{linear}"
            coded = source.coded(name)
            assert coded is not None and coded.input_scale is not None
            tensors[f"{name}.weight"] = coded.codes
            tensors[f"{name}.weight_scale"] = coded.scales[0, 0].clone()
            tensors[f"{name}.input_scale"] = coded.input_scale
        yield tensors


class RandomBuild(Build):
    """The build without what random weights have no use for: a bf16 reading of them and the accuracy gate."""

    baseline: Path | None = None
    """Unquantised checkpoint."""

    def _engine_checkpoint(self, source: Any, plan: Any) -> tuple[Path, Path, dict[str, Any]]:
        return self.baseline or source.folder, source.folder, {"key": None}

    def _engine_gate(self, source: Path, plan: Any, engine_dir: Path) -> dict[str, Any]:
        return {}


# The load ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Answer:
    """Times in seconds since the request was sent."""

    text: str
    tokens: int
    first: float
    last: float
    chunks: int
    ended: float
    """By the clock that all processes share."""


SERVED_KINDS = [kind for kind in KINDS if ours(kind, 0)[1] is None]


async def ask(client: AsyncClient, prompt: str, stream: bool, kind: str = "greedy") -> Answer:
    started = time.perf_counter()
    options: dict[str, Any] = {"max_tokens": LENGTH, "end_id": -1} | ours(kind, 0)[0]
    if not stream:
        whole = await client.generate(prompt, **options)
        took = time.perf_counter() - started
        return Answer(whole.text, whole.num_output_tokens or 0, took, took, 1, time.time())
    texts, first, tokens = [], 0.0, 0
    async for chunk in client.generate_stream(prompt, **options):
        first = first or time.perf_counter() - started
        texts.append(chunk.text)
        tokens = chunk.num_output_tokens or tokens
    took = time.perf_counter() - started
    return Answer("".join(texts), tokens, first, took, len(texts), time.time())


async def ask_openai(client: HttpClient, prompt: str, model: str, kind: str) -> Answer:
    """The same of a server with OpenAI's ``/v1/completions``, streamed; ``kind`` is greedy or temp1. The events are
    read when the last one has come."""
    body = {"model": model, "prompt": prompt, "max_tokens": LENGTH, "ignore_eos": True, "stream": True}
    body |= {"temperature": {"greedy": 0, "temp1": 1}[kind], "stream_options": {"include_usage": True}}
    request, answer = client.request("POST", "/v1/completions", json.dumps(body).encode()), HttpAnswer()
    started = time.monotonic_ns()
    await client.send(request, answer)
    ended = time.time()
    if answer.status != 200:
        raise RuntimeError(f"HTTP {answer.status}: {answer.body.decode()[:300]}")
    texts, times, tokens = [], [], 0
    for arrived, data in events(answer.pieces):
        if data == b"[DONE]":
            continue
        event = json.loads(data)
        tokens = (event.get("usage") or {}).get("completion_tokens", tokens)
        if event["choices"]:
            texts.append(event["choices"][0]["text"])
            times.append((arrived - started) / 1e9)
    return Answer("".join(texts), tokens, times[0], times[-1], len(texts), ended)


class Clients:
    """Client processes that put a load on together: a single one is the limit before the server is."""

    def __init__(self, url: str, most: int) -> None:
        """``url``: of gRPC, or, with http://, of OpenAI's endpoints."""
        self._url = url
        self._most = most
        spawn = multiprocessing.get_context("spawn")
        all_there = spawn.Barrier(most + 1)
        self._pool = ProcessPoolExecutor(most, spawn, all_there.wait)
        for _ in range(most):
            self._pool.submit(settle)  # an executor starts a process for each
        all_there.wait(timeout=120)

    def load(
        self, model: str, prompts: list[str], users: int, stream: bool, kind: str = "greedy"
    ) -> dict[str, Any]:
        """Closed loop: ``users`` share the prompts, in equal parts for each process."""
        count = min(self._most, max(1, users // USERS_OF_A_CLIENT))
        start = time.time() + 1.0
        parts = [
            self._pool.submit(
                put, self._url, model, prompts[i::count], len(range(i, users, count)), stream, kind, start
            )
            for i in range(count)
        ]
        answers = [answer for part in parts for answer in part.result()]
        return figures(answers, max(answer.ended for answer in answers) - start, len(prompts), stream)


def settle() -> None:
    """A client process has this module, with all that it imports, before the first load."""
    freeze_garbage_collector()


def put(
    url: str, model: str, prompts: list[str], users: int, stream: bool, kind: str, start: float
) -> list[Answer]:
    """One process's part, from the time ``start`` on."""
    part = _put(url, model, prompts, users, stream, kind, start)
    return uvloop.run(part) if url.startswith("http://") else asyncio.run(part)  # gRPC polls by itself


async def _put(
    url: str, model: str, prompts: list[str], users: int, stream: bool, kind: str, start: float
) -> list[Answer]:
    queue = iter(prompts)
    answers: list[Answer] = []
    async with contextlib.AsyncExitStack() as stack:
        if url.startswith("http://"):
            http = stack.enter_context(contextlib.closing(HttpClient(url)))
            one = functools.partial(ask_openai, http, model=model, kind=kind)
        else:
            client = await stack.enter_async_context(AsyncClient(url, model, timeout_s=120))
            one = functools.partial(ask, client, stream=stream, kind=kind)

        async def user() -> None:
            for prompt in queue:
                answers.append(await one(prompt))

        late = time.time() - start
        if late > 0:
            raise RuntimeError(f"a client was ready {late:.1f} s after the start: the figures would be wrong")
        await asyncio.sleep(-late)
        await asyncio.gather(*(user() for _ in range(users)))
    return answers


def figures(answers: list[Answer], took: float, requests: int, stream: bool) -> dict[str, Any]:
    made = sum(answer.tokens for answer in answers)
    assert made == LENGTH * requests, f"{made} tokens instead of {LENGTH * requests}"
    result: dict[str, Any] = {"tok_s": made / took, "e2e_ms": mean(a.last for a in answers) * 1e3}
    if stream:
        result["ttft_ms"] = mean(a.first for a in answers) * 1e3
        result["tpot_ms"] = mean((a.last - a.first) / (a.tokens - 1) for a in answers) * 1e3
        result["tokens_a_response"] = made / sum(a.chunks for a in answers)
    return result


def mean(values: Any) -> float:
    return statistics.mean(list(values))


async def exact(url: str, prompts: list[str], engines: int) -> dict[str, Any]:
    """The same text from both endpoints, streamed and whole.

    Nothing else runs: the supervisor's own probes, which would share a step now and then, wait an hour. Each prompt is
    asked once before, and more often where there are several engines, since each that gets it computes the whole prompt
    once; later answers find most of it in the prefix cache, and products of fewer rows round otherwise, which random
    weights amplify.
    """
    before = 1 if engines == 1 else 4 * engines
    same, first_too = 0, 0
    patterns = []
    for prompt in prompts:
        texts: list[str] = []
        for model, stream in (*before * ENDPOINTS[:1], *ENDPOINTS):
            async with AsyncClient(url, model, timeout_s=120) as client:
                texts.append((await ask(client, prompt, stream)).text)
        same += len(set(texts[before:])) == 1
        first_too += len(set(texts)) == 1
        patterns.append("".join(str(texts.index(text)) for text in texts))
    counts = {"same_from_all_endpoints": same, "same_without_prefix_cache_too": first_too}
    return {"part": "text", "prompts": len(prompts), **counts, "patterns": " ".join(patterns)}


def cases(options: argparse.Namespace) -> Iterator[tuple[int, int, int, str]]:
    """(repeat, users, requests, kind of sampling) of each case."""
    for repeat in range(options.repeats):
        for kind in options.sampling.split(","):
            for users in map(int, options.concurrency.split(",")):
                yield repeat, users, max(4, WAVES * users), kind


class Prompts:
    """New ones at every call, and others of another seed: a second time they would come from the prefix cache."""

    def __init__(self, spec: ModelSpec, seed: str = "") -> None:
        self._words = range(FIRST, spec.vocab_size)
        self._chance = random.Random(seed)

    def __call__(self, count: int) -> list[str]:
        return ["".join(map(word, self._chance.choices(self._words, k=LENGTH))) for _ in range(count)]


def say(result: dict[str, Any]) -> dict[str, Any]:
    rounded = {name: round(value, 2) if isinstance(value, float) else value for name, value in result.items()}
    print(json.dumps(rounded), flush=True)
    return rounded


def measure(url: str, spec: ModelSpec, options: argparse.Namespace) -> list[dict[str, Any]]:
    prompts, clients = Prompts(spec), Clients(url, options.clients)
    for count in (*WARM_UP, options.clients * USERS_OF_A_CLIENT):
        clients.load("ensemble", prompts(count), count, True)
    results = [say(asyncio.run(exact(url, prompts(options.texts), options.dp)))]
    if options.text_only:
        return results
    for repeat, users, count, kind in cases(options):
        for model in options.models.split(","):
            for stream in (False, True):
                found = clients.load(model, prompts(count), users, stream, kind)
                case = {"part": "served", "sampling": kind, "users": users, "model": model, "stream": stream}
                results.append(say(case | {"repeat": repeat} | found))
    return results


def measure_engine(engine_dir: Path, spec: ModelSpec, options: argparse.Namespace) -> None:
    """The same closed loop without a server: prints a line of JSON a case."""
    prompts = Prompts(spec)
    engine = Engine(EngineConfig.load(engine_dir))
    freeze_garbage_collector()
    vocabulary = Vocabulary(engine.config.model_dir)
    for count in WARM_UP:
        closed_loop(engine, vocabulary, prompts(count), count)
    for repeat, users, count, kind in cases(options):
        rate = closed_loop(engine, vocabulary, prompts(count), users, kind)
        say({"part": "engine", "sampling": kind, "users": users, "repeat": repeat, "tok_s": rate})


def closed_loop(
    engine: Engine, vocabulary: Vocabulary, texts: list[str], users: int, kind: str = "greedy"
) -> float:
    """Output tokens/s."""
    asked = request_fields(kind, 0)
    waiting = iter(
        enumerate(
            GenerationRequest(vocabulary.encode_prompt(text), LENGTH, end_id=-1, **asked) for text in texts
        )
    )
    started, made = time.perf_counter(), 0
    for number, request in itertools.islice(waiting, users):
        engine.add(number, request)
    while engine.busy:
        for _, output in engine.step():
            made += len(output.token_ids)
            if output.finish_reason is not None and (following := next(waiting, None)):
                engine.add(*following)
    assert made == LENGTH * len(texts), f"{made} tokens instead of {LENGTH * len(texts)}"
    return made / (time.perf_counter() - started)


def table(results: list[dict[str, Any]]) -> None:
    heads = (
        "sampling",
        "users",
        "model",
        "stream",
        "tok/s",
        "of engine",
        "TTFT ms",
        "TPOT ms",
        "tokens/response",
    )
    layout = "{:>10} {:>6} {:>16} {:>7} {:>22} {:>10} {:>8} {:>8} {:>16}"
    print("\n" + layout.format(*heads))
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for result in results:
        if result["part"] != "text":
            key = (result["sampling"], result["users"], result.get("model", ""), result.get("stream", ""))
            groups.setdefault(key, []).append(result)
    for (kind, users, model, stream), same in sorted(groups.items()):
        direct = groups.get((kind, users, "", ""))
        rates = [result["tok_s"] for result in same]
        rate = f"{statistics.median(rates):.0f} ({min(rates):.0f}..{max(rates):.0f})"
        share = f"{statistics.median(rates) / median(direct, 'tok_s'):.1%}" if direct else ""
        parts = (f"{median(same, name):.2f}" if name in same[0] else "" for name in TIMES)
        print(layout.format(kind, users, model or "engine", str(stream), rate, share, *parts))


ENDPOINTS = tuple(itertools.product(("ensemble", "text_generation"), (False, True)))
"""Model, and whether it streams."""

TIMES = ("ttft_ms", "tpot_ms", "tokens_a_response")


def median(results: list[dict[str, Any]], name: str) -> float:
    return statistics.median(result[name] for result in results)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", default="1,8,32,64,256")
    parser.add_argument("--models", default="ensemble,text_generation")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--sampling", default="greedy", help=f"kinds, of {', '.join(SERVED_KINDS)}")
    parser.add_argument("--texts", type=int, default=16, help="prompts whose texts are compared")
    parser.add_argument("--clients", type=int, default=4, help="most client processes")
    parser.add_argument("--shape", default="8b", choices=SHAPES, help="of the model; tiny: on the CPU")
    parser.add_argument(
        "--folder", type=Path, help="keep checkpoint and build here; a checkpoint there is used again"
    )
    parser.add_argument("--from", dest="made", type=Path, help="the folder that gpu_checkpoint.py has filled")
    parser.add_argument("--build-only", action="store_true")
    parser.add_argument("--dp", type=int, default=1, help="engines, each on a GPU of its own")
    parser.add_argument("--tp", type=int, default=1, help="GPUs that share each layer of an engine")
    parser.add_argument(
        "--instances",
        default="",
        help="also serve text_generation_N with N instances, like 1,2,4; names for --models",
    )
    parser.add_argument("--no-engine", action="store_true", help="leave the engine alone out")
    parser.add_argument("--text-only", action="store_true", help="only compare the answers of both models")
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write all results there, as JSON")
    parser.add_argument("--engine-only", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.sampling.split(",")) - set(SERVED_KINDS):
        parser.error(f"--sampling: {unknown.pop()} is none of {', '.join(SERVED_KINDS)}")
    _, spec = SHAPES[options.shape]
    if options.engine_only:
        measure_engine(options.engine_only, spec, options)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        results = run(options.folder or Path(scratch), spec, options)
    if options.out:
        options.out.write_text(json.dumps(results, indent=1))
    if results and not options.text_only:
        table(results)
    different = [r for r in results if r["part"] == "text" and r["same_from_all_endpoints"] < r["prompts"]]
    if different:
        print(f"error: the endpoints gave different texts: {different}", file=sys.stderr)
    return 1 if different else 0


def run(folder: Path, spec: ModelSpec, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Builds, measures the engine, then the server."""
    started = time.perf_counter()
    checkpoint = folder / SHAPES[options.shape][0]
    if options.made:
        rename(options.made / "fp8", checkpoint)
    if not checkpoint.exists():
        write_checkpoint(checkpoint, spec, "cpu" if options.shape == "tiny" else "cuda")
        print(f"checkpoint: {time.perf_counter() - started:.0f} s", flush=True)
    arguments = ["--model", str(checkpoint), "--build-dir", str(folder / "build"), "--engine", "torch"]
    arguments += [
        "--precision",
        "fp8",
        "--max-seq-len",
        "4096",
        "--dp",
        str(options.dp),
        "--tp",
        str(options.tp),
    ]
    build = RandomBuild(parse(arguments))
    build.baseline = options.made / "source" if options.made else None
    build.run()
    print(f"build: {time.perf_counter() - started:.0f} s", flush=True)
    if options.build_only:
        return []
    for count in filter(None, options.instances.split(",")):
        with_instances(folder / "build" / "model_repository", count)
    results = [] if options.text_only or options.no_engine else engine_alone(folder / "build", sys.argv[1:])
    serve = [sys.executable, "-m", "flightline.supervisor.serve", "--build-dir", str(folder / "build")]
    with subprocess.Popen(
        [*serve, "--no-baseline"], cwd=ROOT, env=os.environ | {"PROBE_PERIOD_S": "3600"},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    ) as server:  # fmt: skip
        try:
            wait_until_ready(server)
            print(f"ready: {time.perf_counter() - started:.0f} s", flush=True)
            results += measure(f"127.0.0.1:{os.environ.get('GRPC_PORT') or 8001}", spec, options)
        finally:
            server.terminate()
            print(server.communicate(timeout=60)[0][-2000:], flush=True)
    return results


def with_instances(repository: Path, count: str) -> None:
    """One more model, ``text_generation`` with so many instances, on the same engines."""
    target = repository / f"text_generation_{count}"
    shutil.copytree(repository / "text_generation", target, dirs_exist_ok=True)
    config = target / "config.pbtxt"
    text = re.sub(
        r"instance_group \[ { count: \d+", f"instance_group [ {{ count: {count}", config.read_text()
    )
    config.write_text(text.replace('name: "text_generation"', f'name: "{target.name}"'))


def rename(source: Path, target: Path) -> None:
    """The same files once more in a folder of another name: reports call a model by its folder."""
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        link = target / file.name
        link.unlink(missing_ok=True)
        link.symlink_to(file.resolve())


def engine_alone(build: Path, options: list[str]) -> list[dict[str, Any]]:
    """In a process of its own, whose memory is free again afterwards; with these options of the command."""
    engine_dir = Deployment.load(build).engine_dir
    command = [sys.executable, __file__, *options, "--engine-only", str(engine_dir)]
    lines = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout
    print(lines, end="", flush=True)
    return [json.loads(line) for line in lines.splitlines() if line.startswith("{")]


def wait_until_ready(server: subprocess.Popen) -> None:
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        if line.startswith("ready:"):
            return
    sys.exit("the server ended before it was ready: see its output above")


if __name__ == "__main__":
    sys.exit(main())
