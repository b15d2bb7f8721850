"""Output tokens/s on a CPU: the engine directly, through Triton, Transformers, and any peer, in turns in one run.

    python3 benchmarks/cpu.py --peer 'openvino=ovenv/bin/python openvino_bench.py model.gguf'

Every side is a process of its own, started anew in every round, so that nothing competes with what is measured;
the order changes from round to round. All sides get the same distinct prompts through the model's chat template
and generate exactly as many tokens; the time is from the first request to the last token, prefill included, load
and warm-up not. Only the ratios of one run mean anything on a machine that others use.

A peer is a command that prints one line of JSON for each concurrency:
{"engine": ..., "concurrency": 8, "output_tokens_per_s": 123.4}; other lines are ignored.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

TOPICS = (
    *("France", "rivers", "music", "bridges", "whales", "bread", "trains", "glass"),
    *("tides", "paper", "chess", "salt", "wind", "maps", "bees", "coins"),
)
SIDES = ("engine", "engine-reuse", "ensemble", "text_generation", "transformers")
Generate = Callable[[list[str]], None]


def texts(count: int, salt: str) -> list[str]:
    """Distinct prompts, so that no prefix cache answers for an engine."""
    return [f"Tell me something about {TOPICS[i % len(TOPICS)]}, part {i}{salt}." for i in range(count)]


def deployment(build_dir: Path) -> dict[str, str]:
    return json.loads((build_dir / "deployment.json").read_text(encoding="utf-8"))


def measure(name: str, generate: Generate, concurrencies: list[int], tokens: int) -> None:
    """Prints what a peer prints. ``generate`` makes ``tokens`` tokens for each prompt, all in flight together."""
    generate(texts(2, " of none"))
    for concurrency in concurrencies:
        prompts = texts(concurrency, f" of {concurrency}")
        start = time.perf_counter()
        generate(prompts)
        rate = concurrency * tokens / (time.perf_counter() - start)
        print(
            json.dumps(dict(engine=name, concurrency=concurrency, output_tokens_per_s=round(rate, 1))),
            flush=True,
        )


def chat(model_dir: str, prompts: list[str]) -> list[str]:
    from client.chat_template import ChatTemplate

    template = ChatTemplate.from_dir(model_dir)
    return [template.render([{"role": "user", "content": prompt}]) for prompt in prompts]


def run_engine(options: argparse.Namespace, reuse: bool) -> None:
    """The engine in this process. Without ``reuse`` it computes every prompt, the chat template's part too."""
    from tokenizers import Tokenizer

    from torch_engine.config import EngineConfig
    from torch_engine.engine import Engine
    from torch_engine.request import GenerationRequest

    engine = Engine(
        EngineConfig.load(deployment(options.build_dir)["engine_dir"], enable_kv_cache_reuse=reuse)
    )
    print(engine.info.description, file=sys.stderr)
    model_dir = engine.config.model_dir
    tokenizer = Tokenizer.from_file(str(Path(model_dir) / "tokenizer.json"))

    def generate(prompts: list[str]) -> None:
        ids = [encoding.ids for encoding in tokenizer.encode_batch(chat(model_dir, prompts))]
        outputs = engine.generate([GenerationRequest(row, options.tokens, end_id=-1) for row in ids])
        require_lengths([len(output.token_ids) for output in outputs], options.tokens)

    measure("engine-reuse" if reuse else "engine", generate, options.concurrency, options.tokens)


def run_served(options: argparse.Namespace, model: str) -> None:
    """Through Triton, without streaming, from this process."""
    from client.aio import AsyncClient
    from model_repository.serve import Server, ServeSettings

    settings = ServeSettings.from_environment()
    settings = ServeSettings(
        options.build_dir, baseline=False, **{k.lower(): v for k, v in settings.ports.items()}
    )
    model_dir = deployment(options.build_dir)["model_dir"]

    async def all_at_once(prompts: list[str]) -> list[int]:
        async with AsyncClient(settings.grpc_url, model) as llm:
            calls = [
                llm.generate(prompt, max_tokens=options.tokens, end_id=-1)
                for prompt in chat(model_dir, prompts)
            ]
            return [answer.num_output_tokens for answer in await asyncio.gather(*calls)]

    def generate(prompts: list[str]) -> None:
        require_lengths(asyncio.run(all_at_once(prompts)), options.tokens)

    with Server(settings, say=lambda line: print(line, file=sys.stderr)):
        measure(model, generate, options.concurrency, options.tokens)


def run_transformers(options: argparse.Namespace) -> None:
    """``generate`` on the bf16 checkpoint, one left-padded batch."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = deployment(options.build_dir)["source_dir"]
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

    @torch.inference_mode()
    def generate(prompts: list[str]) -> None:
        batch = tokenizer(chat(folder, prompts), return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(
            **batch, max_new_tokens=options.tokens, min_new_tokens=options.tokens, do_sample=False
        )
        require_lengths([out.shape[1] - batch["input_ids"].shape[1]] * len(prompts), options.tokens)

    measure("transformers", generate, options.concurrency, options.tokens)


def require_lengths(lengths: list[int], tokens: int) -> None:
    if set(lengths) != {tokens}:
        raise SystemExit(f"cpu.py: error: outputs of {sorted(set(lengths))} tokens instead of {tokens}")


def run_side(side: str, options: argparse.Namespace) -> None:
    if side.startswith("engine"):
        run_engine(options, reuse=side == "engine-reuse")
    elif side == "transformers":
        run_transformers(options)
    else:
        run_served(options, side)


def commands(options: argparse.Namespace) -> dict[str, list[str]]:
    """What starts each side."""
    shared = ["--build-dir", str(options.build_dir), "--tokens", str(options.tokens)]
    shared += ["--concurrency", ",".join(map(str, options.concurrency))]
    own = {
        side: [sys.executable, __file__, "--only", side, *shared] for side in options.sides.split(",") if side
    }
    peers = dict(peer.partition("=")[::2] for peer in options.peer)
    return own | {name: shlex.split(command) for name, command in peers.items()}


def run(command: list[str]) -> dict[int, float]:
    """Concurrency -> output tokens/s, as the command printed them.

    Raises:
        SystemExit: the command failed or printed nothing.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    rates: dict[int, float] = {}
    for line in done.stdout.splitlines():
        if line.startswith("{") and "output_tokens_per_s" in line:
            result = json.loads(line)
            rates[result["concurrency"]] = result["output_tokens_per_s"]
    if done.returncode != 0 or not rates:
        raise SystemExit(f"cpu.py: error: {shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return rates


def stolen() -> int:
    """Hundredths of a second that the host has taken from this machine since it started; 0 if it does not tell."""
    return int(Path("/proc/stat").read_text(encoding="utf-8").split()[8])


def compare(options: argparse.Namespace) -> None:
    sides = commands(options)
    rates: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    for number in range(options.rounds):
        names = list(sides)
        names = names[number % len(names) :] + names[: number % len(names)]
        for name in names:
            before = stolen()
            for concurrency, rate in run(sides[name]).items():
                rates[name][concurrency].append(rate)
            shown = {concurrency: values[-1] for concurrency, values in rates[name].items()}
            line = dict(round=number, side=name, output_tokens_per_s=shown, steal_s=(stolen() - before) / 100)
            print(json.dumps(line), file=sys.stderr, flush=True)
    print(table(rates, options.concurrency, next(iter(sides))))


def table(rates: dict[str, dict[int, list[float]]], concurrencies: list[int], first: str) -> str:
    """Median rates, and in how many times the first side's each round stands to the others': median (spread)."""
    lines = ["| side | " + " | ".join(f"{c} in flight" for c in concurrencies) + " |"]
    lines.append("|---|" + "--:|" * len(concurrencies))
    for name, measured in rates.items():
        cells = []
        for concurrency in concurrencies:
            cell = f"{statistics.median(measured[concurrency]):.0f}"
            if name != first:
                pairs = zip(rates[first][concurrency], measured[concurrency], strict=True)
                ratios = sorted(ours / theirs for ours, theirs in pairs)
                cell += f" ({statistics.median(ratios):.2f}×: {ratios[0]:.2f}–{ratios[-1]:.2f})"
            cells.append(cell)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines.append(
        f"\nOutput tokens/s, median of the rounds; in brackets {first} against that side, median: spread."
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument(
        "--sides", default=",".join(SIDES), help=f"of ours, the first is compared: {', '.join(SIDES)}"
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument(
        "--concurrency", type=lambda text: [int(part) for part in text.split(",")], default=[1, 8, 32]
    )
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of each request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=SIDES, help="run one side in this process and print its figures")
    options = parser.parse_args()
    options.build_dir = options.build_dir.absolute()
    if options.only:
        run_side(options.only, options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
