"""The same shape served: through Triton, by our own client, streamed and not: ``python3 benchmarks/gpu_served.py``.

Writes a random FP8 checkpoint of the shape of Llama-3.1-8B (in NVIDIA's unified layout, with a tokenizer whose words
are single tokens), builds an engine from it, starts the server as ``make serve`` does and loads it over gRPC. Prompts
have 128 tokens, answers 128; end of sequence ignored. One line of JSON a case, a table last; also in $OUT/served.json.
``--tiny`` is for trying the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.gpu import LLAMA_8B, RandomCheckpoint  # noqa: E402
from client.aio import AsyncClient  # noqa: E402
from engine_build.build import Build  # noqa: E402
from engine_build.settings import parse  # noqa: E402
from torch_engine.families import ModelSpec  # noqa: E402

LINEARS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip
TINY = dataclasses.replace(
    LLAMA_8B, hidden_size=64, intermediate_size=128, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=2048,
    attention_scale=0.25, layers=LLAMA_8B.layers[:2],
)  # fmt: skip
LENGTH = 128
BYTES = 256


# A checkpoint ------------------------------------------------------------------------------------------


def word(token: int) -> str:
    letters = []
    for _ in range(4):
        token, digit = divmod(token, 26)
        letters.append(chr(ord("a") + digit))
    return " " + "".join(letters)


def write_tokenizer(folder: Path, size: int) -> None:
    """After the bytes every token is a word of its own: any ids can be asked for as text and stay what they are."""
    pieces = [*sorted(ByteLevel.alphabet()), *(word(token).replace(" ", "Ġ") for token in range(BYTES, size))]
    vocab = {piece: token for token, piece in enumerate(pieces)}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    model = {"type": "BPE", "vocab": vocab, "merges": [], "ignore_merges": True}
    tokenizer = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": byte_level,
        "post_processor": None, "decoder": byte_level, "model": model,
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))


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
    source = RandomCheckpoint(spec, fp8=True, device=device)
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
            codes, scale, input_scale, _ = source.fused_fp8([name], torch.device(device))
            tensors[f"{name}.weight"] = codes
            tensors[f"{name}.weight_scale"], tensors[f"{name}.input_scale"] = scale, input_scale
        yield tensors


class RandomBuild(Build):
    """The build without what random weights have no use for: a bf16 reading of them and the accuracy gate."""

    def _engine_checkpoint(self, source: Any, plan: Any) -> tuple[Path, Path, dict[str, Any]]:
        return source.folder, source.folder, {"key": None}


# The load ----------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Answer:
    """Times in seconds since the request was sent."""

    text: str
    tokens: int
    first: float
    last: float
    chunks: int


async def ask(client: AsyncClient, prompt: str, stream: bool) -> Answer:
    started = time.perf_counter()
    options: dict[str, Any] = {"max_tokens": LENGTH, "end_id": -1}
    if not stream:
        whole = await client.generate(prompt, **options)
        took = time.perf_counter() - started
        return Answer(whole.text, whole.num_output_tokens or 0, took, took, 1)
    texts, first, tokens = [], 0.0, 0
    async for chunk in client.generate_stream(prompt, **options):
        first = first or time.perf_counter() - started
        texts.append(chunk.text)
        tokens = chunk.num_output_tokens or tokens
    return Answer("".join(texts), tokens, first, time.perf_counter() - started, len(texts))


async def load(url: str, model: str, prompts: list[str], concurrency: int, stream: bool) -> dict[str, Any]:
    """Closed loop: ``concurrency`` users share the prompts."""
    queue = iter(prompts)
    answers: list[Answer] = []
    async with AsyncClient(url, model, timeout_s=120) as client:

        async def user() -> None:
            for prompt in queue:
                answers.append(await ask(client, prompt, stream))

        started = time.perf_counter()
        await asyncio.gather(*(user() for _ in range(concurrency)))
        took = time.perf_counter() - started
    made = sum(answer.tokens for answer in answers)
    assert made == LENGTH * len(prompts), f"{made} tokens instead of {LENGTH * len(prompts)}"
    result: dict[str, Any] = {"tok_s": made / took, "e2e_ms": mean(a.last for a in answers) * 1e3}
    if stream:
        result["ttft_ms"] = mean(a.first for a in answers) * 1e3
        result["tpot_ms"] = mean((a.last - a.first) / (a.tokens - 1) for a in answers) * 1e3
        result["tokens_a_response"] = made / sum(a.chunks for a in answers)
    return result


def mean(values: Any) -> float:
    return statistics.mean(list(values))


async def exact(url: str, prompts: list[str]) -> dict[str, Any]:
    """The same text from both doors, streamed and whole."""
    same = 0
    for prompt in prompts:
        texts = set()
        for model, stream in itertools.product(("ensemble", "text_generation"), (False, True)):
            async with AsyncClient(url, model, timeout_s=120) as client:
                texts.add((await ask(client, prompt, stream)).text)
        same += len(texts) == 1
    return {"part": "text", "prompts": len(prompts), "same_from_all_doors": same}


def measure(url: str, spec: ModelSpec, options: argparse.Namespace) -> list[dict[str, Any]]:
    chance = random.Random(0)

    def prompts(count: int) -> list[str]:
        return [
            "".join(word(chance.randrange(BYTES, spec.vocab_size)) for _ in range(LENGTH))
            for _ in range(count)
        ]

    for count in (1, 8, 64):
        asyncio.run(load(url, "ensemble", prompts(count), count, True))
    results: list[dict[str, Any]] = [asyncio.run(exact(url, prompts(4)))]
    print(json.dumps(results[0]), flush=True)
    for repeat in range(options.repeats):
        for concurrency in map(int, options.concurrency.split(",")):
            for model in options.models.split(","):
                for stream in (False, True):
                    count = max(4 if concurrency < 8 else 2 * concurrency, concurrency)
                    found = asyncio.run(load(url, model, prompts(count), concurrency, stream))
                    case = {"part": "served", "concurrency": concurrency, "model": model, "stream": stream}
                    rounded = {name: round(value, 2) for name, value in found.items()}
                    results.append(case | {"repeat": repeat} | rounded)
                    print(json.dumps(results[-1]), flush=True)
    return results


def table(results: list[dict[str, Any]]) -> None:
    served = [result for result in results if result["part"] == "served"]
    heads = ("users", "model", "stream", "tok/s", "TTFT ms", "TPOT ms", "tokens/response")
    print("\n{:>6} {:>16} {:>7} {:>22} {:>8} {:>8} {:>16}".format(*heads))
    keys = dict.fromkeys((r["concurrency"], r["model"], r["stream"]) for r in served)
    for key in keys:
        same = [r for r in served if (r["concurrency"], r["model"], r["stream"]) == key]

        def middle(name: str, same: list[dict[str, Any]] = same) -> str:
            return f"{statistics.median(r[name] for r in same):.2f}" if name in same[0] else ""

        rates = [r["tok_s"] for r in same]
        rate = f"{statistics.median(rates):.0f} ({min(rates):.0f}..{max(rates):.0f})"
        print(
            f"{key[0]:>6} {key[1]:>16} {key[2]!s:>7} {rate:>22} {middle('ttft_ms'):>8} {middle('tpot_ms'):>8} "
            f"{middle('tokens_a_response'):>16}"
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--concurrency", default="1,8,32,64,256")
    parser.add_argument("--models", default="ensemble,text_generation")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape on the CPU")
    parser.add_argument(
        "--folder", type=Path, help="keep checkpoint and build here; a checkpoint there is used again"
    )
    options = parser.parse_args()
    spec, device = (TINY, "cpu") if options.tiny else (LLAMA_8B, "cuda")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        started = time.perf_counter()
        if not (folder / "random-8b").exists():
            write_checkpoint(folder / "random-8b", spec, device)
        print(f"checkpoint: {time.perf_counter() - started:.0f} s", flush=True)
        build = folder / "build"
        arguments = ["--model", str(folder / "random-8b"), "--build-dir", str(build), "--engine", "torch"]
        RandomBuild(parse([*arguments, "--precision", "fp8", "--max-seq-len", "4096"])).run()
        print(f"build: {time.perf_counter() - started:.0f} s", flush=True)
        serve = [sys.executable, "-m", "model_repository.serve", "--build-dir", str(build), "--no-baseline"]
        with subprocess.Popen(
            serve, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        ) as server:
            try:
                wait_until_ready(server)
                print(f"ready: {time.perf_counter() - started:.0f} s", flush=True)
                results = measure(f"127.0.0.1:{os.environ.get('GRPC_PORT') or 8001}", spec, options)
            finally:
                server.terminate()
                print(server.communicate(timeout=60)[0][-2000:], flush=True)
    if out := os.environ.get("OUT"):
        (Path(out) / "served.json").write_text(json.dumps(results, indent=1))
    table(results)
    return 0


def wait_until_ready(server: subprocess.Popen) -> None:
    assert server.stdout is not None
    for line in server.stdout:
        print(line, end="", flush=True)
        if line.startswith("ready:"):
            return
    sys.exit("the server ended before it was ready: see its output above")


if __name__ == "__main__":
    sys.exit(main())
