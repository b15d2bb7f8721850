"""Output tokens/s on a CPU: the engine directly, through Triton, Transformers, and any peer, in turns in one run.

    python3 benchmarks/cpu.py --peer 'openvino=ovenv/bin/python openvino_bench.py model.gguf'

Our sides are processes that are loaded once and then take turns, idle while another one is measured, so that what is
compared lies seconds apart on a machine whose speed changes; a peer is started anew in every round. The order changes
from round to round. All sides get the same distinct prompts, without a chat template (that is
what the peers do; ``--chat`` puts one around ours), and generate exactly as many tokens. ``--waves`` times as many
requests as are in flight come in a closed loop; a peer and Transformers take one wave. The time is from the first
request to the last token, prefill included, load and warm-up not. Only the ratios of one run mean anything on a
machine that others use.

A peer is a command that prints one line of JSON for each concurrency:
{"engine": ..., "concurrency": 8, "output_tokens_per_s": 123.4}; other lines are ignored.

``--sampling all`` compares the kinds of sampling instead, each in turns with greedy, in the engine alone:

    python3 benchmarks/cpu.py --sampling all

``--guesses`` compares the engine with prompt lookup and without, on text that repeats itself and on text that does not:

    python3 benchmarks/cpu.py --guesses --tokens 128

``--prompts`` gives the time of prompts by their length, in the engine alone, and of attention within it; ``--against``
compares with the kernels of another commit in a folder (``compile_library`` of ``kernels/cpu/toolchain.py`` makes it):

    python3 benchmarks/cpu.py --prompts 128,500,2000,8000 --against /tmp/kernels-before

``--prompts`` with ``--peer`` compares the time of a prompt alone, to its first token, with peers' in turns; the peer
gets ``--prompts LENGTHS``, too, and prints lines with ``prompt_tokens`` and ``ms`` (``peer_openvino.py`` does):

    python3 benchmarks/cpu.py --prompts 2000 --peer 'openvino=ovenv/bin/python benchmarks/peer_openvino.py MODEL.gguf'

Of the engine's steps the table also gives the host's time: a step's without that in the compiled kernels. The side
``prefill`` compares the rate of long prompts with large products of our kernels and of PyTorch's on as many threads.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import os
import random
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
if TYPE_CHECKING:
    from flightline.torch_engine.engine import Engine, Outputs

TOPICS = (
    *("France", "rivers", "music", "bridges", "whales", "bread", "trains", "glass"),
    *("tides", "paper", "chess", "salt", "wind", "maps", "bees", "coins"),
)
ENDPOINTS = ("ensemble", "text_generation")
SIDES = ("engine", "engine-reuse", *ENDPOINTS, "transformers")
PREFILL = "prefill"
Generate = Callable[[list[str], int], dict[str, float]]
"""From prompts and how many are in flight together to what is told beside the rate."""


def texts(count: int) -> list[str]:
    """Distinct prompts, so that no prefix cache answers for an engine."""
    return [f"Tell me something about {TOPICS[i % len(TOPICS)]}, part {i}." for i in range(count)]


def deployment(build_dir: Path) -> dict[str, str]:
    return json.loads((build_dir / "deployment.json").read_text(encoding="utf-8"))


def answer(sides: dict[str, Generate], options: argparse.Namespace) -> None:
    """Measures what standard input asks for, lines like ``engine 8``, and prints what a peer prints."""
    for generate in sides.values():
        generate(texts(2), 2)
    for line in sys.stdin:
        side, concurrency = line.split()[0], int(line.split()[1])
        prompts = texts(concurrency * (1 if side == "transformers" else options.waves))
        start = time.perf_counter()
        more = sides[side](prompts, concurrency)
        rate = len(prompts) * options.tokens / (time.perf_counter() - start)
        result = dict(engine=side, concurrency=concurrency, output_tokens_per_s=round(rate, 1)) | more
        print(json.dumps(result), flush=True)


def rendered(prompts: list[str], model_dir: str, chat: bool) -> list[str]:
    if not chat:
        return prompts
    from flightline.client.chat_template import ChatTemplate

    template = ChatTemplate.from_dir(model_dir)
    return [template.render([{"role": "user", "content": prompt}]) for prompt in prompts]


class HostTime:
    """What the host does in each step of an engine: all but the calls of its compiled library."""

    def __init__(self, engine: Engine) -> None:
        self.steps: list[float] = []
        """Seconds."""
        self._compiled = 0.0
        library, step = engine.kernels.library, engine.step
        for name in ("fl_decode", "fl_argmax", "fl_sample"):
            setattr(library, name, self._timed(getattr(library, name)))

        def timed_step() -> Outputs:
            self._compiled, start = 0.0, time.perf_counter()
            outputs = step()
            self.steps.append(time.perf_counter() - start - self._compiled)
            return outputs

        engine.step = timed_step

    def _timed(self, call: Callable[..., None]) -> Callable[..., None]:
        def timed(*arguments: Any) -> None:
            start = time.perf_counter()
            call(*arguments)
            self._compiled += time.perf_counter() - start

        return timed


def load_engine(options: argparse.Namespace, **settings: object) -> Engine:
    from flightline.torch_engine.core.config import EngineConfig
    from flightline.torch_engine.engine import Engine, freeze_garbage_collector

    engine = Engine(EngineConfig.load(deployment(options.build_dir)["engine_dir"], **settings))
    freeze_garbage_collector()
    print(engine.info.description, file=sys.stderr)
    return engine


def run_engine(options: argparse.Namespace, reuse: bool) -> None:
    """The engine in this process. Without ``reuse`` it computes every prompt."""
    from tokenizers import Tokenizer

    from flightline.torch_engine.core.request import GenerationRequest

    engine = load_engine(options, enable_kv_cache_reuse=reuse)
    host = HostTime(engine) if engine.kernels.name == "native" else None
    model_dir = engine.config.model_dir
    tokenizer = Tokenizer.from_file(str(Path(model_dir) / "tokenizer.json"))

    def generate(prompts: list[str], in_flight: int) -> dict[str, float]:
        ids = [row.ids for row in tokenizer.encode_batch(rendered(prompts, model_dir, options.chat))]
        waiting = [
            (number, GenerationRequest(row, options.tokens, end_id=-1, stream=False))
            for number, row in enumerate(ids)
        ]
        lengths = [0] * len(ids)
        if host is not None:
            host.steps.clear()
        for number, request in waiting[:in_flight]:
            engine.add(number, request)
        following = iter(waiting[in_flight:])
        while engine.busy:
            for number, output in engine.step():
                lengths[number] += len(output.token_ids)
                if output.finish_reason is not None and (request := next(following, None)) is not None:
                    engine.add(*request)
        require_lengths(lengths, options.tokens)
        return {} if host is None else {"host_ms": round(1000 * statistics.median(host.steps), 3)}

    answer({"engine-reuse" if reuse else "engine": generate}, options)


def compare_kinds(options: argparse.Namespace) -> None:
    """Output tokens/s of each kind of sampling against greedy, which is measured right before or after it.

    Greedy is compared with itself as well: how far that is from 1 is what this machine can tell apart.
    """
    from tokenizers import Tokenizer

    from benchmarks.kinds import ALL, request_fields
    from flightline.torch_engine.core.request import GenerationRequest

    kinds = ALL if options.sampling == "all" else ("greedy", *options.sampling.split(","))
    if unknown := sorted(set(kinds) - set(ALL)):
        raise SystemExit(
            f"cpu.py: error: --sampling={unknown[0]} is unknown: use all or some of {', '.join(ALL)}"
        )
    engine = load_engine(options, enable_kv_cache_reuse=False)
    tokenizer = Tokenizer.from_file(str(Path(engine.config.model_dir) / "tokenizer.json"))

    def rate(kind: str, in_flight: int) -> float:
        ids = [row.ids for row in tokenizer.encode_batch(texts(in_flight))]
        requests = [
            GenerationRequest(row, options.tokens, end_id=-1, stream=False, **request_fields(kind, number))
            for number, row in enumerate(ids)
        ]
        start = time.perf_counter()
        outputs = engine.generate(requests)
        seconds = time.perf_counter() - start
        require_lengths([len(output.token_ids) for output in outputs], options.tokens)
        return len(requests) * options.tokens / seconds

    lines = [
        f"| {'kind':10} | in flight | greedy tok/s | tok/s | against greedy: median (spread) |",
        "|---|--:|--:|--:|--:|",
    ]
    results = []
    for in_flight in options.concurrency:
        for kind in kinds:
            rate(kind, in_flight)
        for kind in kinds:
            pairs = []
            for number in range(options.rounds):
                pair = [
                    rate(each, in_flight) for each in (("greedy", kind) if number % 2 else (kind, "greedy"))
                ]
                pairs.append((pair[0], pair[1]) if number % 2 else (pair[1], pair[0]))
            ratios = sorted(own / greedy for greedy, own in pairs)
            greedy, own = (statistics.median(column) for column in zip(*pairs, strict=True))
            spread = f"{statistics.median(ratios):.3f} ({ratios[0]:.3f}-{ratios[-1]:.3f})"
            lines.append(f"| {kind:10} | {in_flight} | {greedy:.1f} | {own:.1f} | {spread} |")
            print(lines[-1], file=sys.stderr, flush=True)
            results.append({"kind": kind, "concurrency": in_flight, "rates": pairs})
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print("\n".join(lines))


CODE = """def read_{name}(path):
    with open(path) as file:
        lines = file.readlines()
    {name} = []
    for line in lines:
        key, value = line.strip().split(",")
        {name}.append((key, int(value)))
    return {name}
"""


def guess(options: argparse.Namespace) -> None:
    """Prompt lookup in the engine of this process: code edited and text copied, and answers told and drawn."""
    from tokenizers import Tokenizer

    from benchmarks.guesses import GUESSES, HEAD, take_turns
    from benchmarks.kinds import request_fields
    from flightline.torch_engine.core.request import GenerationRequest

    engine = load_engine(options, enable_kv_cache_reuse=False, speculation_tokens=GUESSES)
    model_dir = engine.config.model_dir
    tokenizer = Tokenizer.from_file(str(Path(model_dir) / "tokenizer.json"))
    topics = [f"{topic} {part}" for part in range(16) for topic in TOPICS]
    edits = [
        f"Rename the variable lines to rows:\n\n{CODE.format(name=each.replace(' ', '_'))}" for each in topics
    ]
    copies = [
        f"Repeat word by word: In the year 19{n:02} {each} cost 3 pounds, 4 shillings and 5 pence a piece, "
        f"and who had none of {each} went to the market of York on foot."
        for n, each in enumerate(topics)
    ]
    asked = {
        "code edit": (edits, "greedy"), "copy": (copies, "greedy"),
        "answer": (texts(len(topics)), "greedy"), "answer, temperature 1": (texts(len(topics)), "seeded"),
        "answer, penalty": (texts(len(topics)), "penalty"),
    }  # fmt: skip

    def requests(prompts: list[str], kind: str, in_flight: int, number: int) -> list[GenerationRequest]:
        places = range(number * in_flight, (number + 1) * in_flight)
        chosen = [prompts[place % len(prompts)] for place in places]
        rows = tokenizer.encode_batch(rendered(chosen, model_dir, chat=True))
        return [
            GenerationRequest(row.ids, options.tokens, end_id=-1, stream=False, **request_fields(kind, place))
            for row, place in zip(rows, places, strict=True)
        ]

    print(HEAD, flush=True)
    for in_flight in options.concurrency:
        for text, (prompts, kind) in asked.items():
            turns = take_turns(
                engine, text, in_flight, partial(requests, prompts, kind, in_flight), options.rounds
            )
            print(turns.row(), flush=True)


class AttentionTime:
    """Seconds of attention in an engine whose layers are computed one by one, operation by operation."""

    def __init__(self, engine: Engine) -> None:
        from flightline.torch_engine.core.steps import TensorSteps
        from flightline.torch_engine.kernels.operations import Operations

        self.seconds = 0.0
        kernels, attention = engine.kernels, engine.kernels.attention

        def timed(*arguments: Any) -> Any:
            start = time.perf_counter()
            out = attention(*arguments)
            self.seconds += time.perf_counter() - start
            return out

        kernels.attention = timed
        kernels.decode = partial(Operations.decode, kernels)  # the compiled decoder is one call
        engine.runner.steps = TensorSteps(engine.config.block_size, kernels.device)


def time_prompts(options: argparse.Namespace) -> None:
    """Milliseconds of a prompt, of attention in it, and of a token after it; with other kernels in turns."""
    from flightline.torch_engine.core.request import GenerationRequest

    lengths, chance, following = options.prompts, random.Random(1), 16
    longest = max(lengths) + following + 1
    folders = {"of the build": None} | ({str(options.against): options.against} if options.against else {})
    room = {"max_seq_len": longest, "num_kv_blocks": longest // 16 + 2, "enable_kv_cache_reuse": False}
    engines = {
        name: load_engine(options, **room, **({"kernel_dir": str(folder.absolute())} if folder else {}))
        for name, folder in folders.items()
    }
    parts = {name: AttentionTime(engine) for name, engine in engines.items()}

    def once(name: str, length: int, tokens: int) -> tuple[float, float]:
        """Milliseconds in all, and of attention."""
        engine, part = engines[name], parts[name]
        ids = [chance.randrange(engine.info.vocab_size) for _ in range(length)]
        part.seconds, start = 0.0, time.perf_counter()
        engine.generate([GenerationRequest(ids, tokens, end_id=-1, stream=False)])
        return 1000 * (time.perf_counter() - start), 1000 * part.seconds

    print("| tokens | kernels | prompt | tokens/s | attention in it | attention of a token after it |")
    print("|--:|---|--:|--:|--:|--:|")
    results = []
    for length in lengths:
        times: dict[str, list[tuple[float, float, float]]] = defaultdict(list)
        for number in range(options.rounds):
            for name in turned(list(engines), number):
                whole, attention = once(name, length, 1)
                more = once(name, length, 1 + following)[1] - attention
                times[name].append((whole, attention, more / following))
        for name, rounds in times.items():
            whole, attention, more = (min(column) for column in zip(*rounds, strict=True))
            cells = (
                f"{whole:.1f} ms | {1000 * length / whole:.0f} | {attention:.1f} ms | {max(more, 0):.2f} ms"
            )
            print(f"| {length} | {name} | {cells} |", flush=True)
            results.append({"tokens": length, "kernels": name, "ms": rounds})
    if options.output:
        options.output.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(f"\nThe least of {options.rounds} rounds.")


def compare_prompts(options: argparse.Namespace) -> None:
    """Tokens/s of one prompt alone in the engine of this process and in peers, in turns."""
    from flightline.torch_engine.core.request import GenerationRequest

    lengths, chance = options.prompts, random.Random(1)
    room = {"max_seq_len": max(lengths) + 1, "num_kv_blocks": max(lengths) // 16 + 2}
    engine = load_engine(options, **room, enable_kv_cache_reuse=False)

    def ours() -> list[dict[str, Any]]:
        results = []
        for length in lengths:
            ids = [chance.randrange(10, min(40_000, engine.info.vocab_size)) for _ in range(length)]
            start = time.perf_counter()
            engine.generate([GenerationRequest(ids, 1, end_id=-1, stream=False)])
            results.append({"prompt_tokens": length, "ms": 1000 * (time.perf_counter() - start)})
        return results

    peers = dict(peer.split("=", 1) for peer in options.peer)
    commands = {
        name: [*shlex.split(command), "--prompts", ",".join(map(str, lengths))]
        for name, command in peers.items()
    }
    ours()
    rounds = []
    for number in range(options.rounds):
        one: dict[str, dict[int, float]] = {}
        for name in turned(["engine", *commands], number):
            results = ours() if name == "engine" else run(commands[name])
            one[name] = {line["prompt_tokens"]: line["ms"] for line in results if "prompt_tokens" in line}
        rounds.append(one)
        print(json.dumps(one), file=sys.stderr, flush=True)
    if options.output:
        options.output.write_text(json.dumps(rounds, indent=1) + "\n", encoding="utf-8")
    print("| tokens | side | prompt | tokens/s | engine against it: median (spread) |\n|--:|---|--:|--:|--:|")
    for length in lengths:
        for name in ("engine", *commands):
            median = statistics.median(one[name][length] for one in rounds)
            ratios = sorted(one[name][length] / one["engine"][length] for one in rounds)
            against = (
                f"{statistics.median(ratios):.2f}× ({ratios[0]:.2f}-{ratios[-1]:.2f})"
                if name != "engine"
                else ""
            )
            print(f"| {length} | {name} | {median:.1f} ms | {1000 * length / median:.0f} | {against} |")


def run_served(options: argparse.Namespace, models: list[str]) -> None:
    """Through Triton, without streaming, from this process."""
    from flightline.client.aio import AsyncClient
    from flightline.supervisor.serve import Server, ServeSettings

    settings = ServeSettings.from_environment()
    settings = dataclasses.replace(settings, build_dir=options.build_dir, baseline=False)
    model_dir = deployment(options.build_dir)["model_dir"]

    async def closed_loop(model: str, prompts: list[str], in_flight: int) -> list[int]:
        waiting, lengths = iter(rendered(prompts, model_dir, options.chat)), []

        async def user(llm: AsyncClient) -> None:
            for prompt in waiting:
                answer = await llm.generate(prompt, max_tokens=options.tokens, end_id=-1)
                lengths.append(answer.num_output_tokens)

        async with AsyncClient(settings.grpc_url, model) as llm:
            await asyncio.gather(*(user(llm) for _ in range(in_flight)))
        return lengths

    def generate(model: str, prompts: list[str], in_flight: int) -> dict[str, float]:
        require_lengths(asyncio.run(closed_loop(model, prompts, in_flight)), options.tokens)
        return {}

    with Server(settings, say=lambda line: print(line, file=sys.stderr)):
        answer({model: partial(generate, model) for model in models}, options)


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
    def generate(prompts: list[str], in_flight: int) -> dict[str, float]:
        prompts = rendered(prompts, folder, options.chat)
        batch = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False)
        out = model.generate(
            **batch, max_new_tokens=options.tokens, min_new_tokens=options.tokens, do_sample=False
        )
        require_lengths([out.shape[1] - batch["input_ids"].shape[1]] * len(prompts), options.tokens)
        return {}

    answer({"transformers": generate}, options)


def run_prefill(options: argparse.Namespace, prompts: int = 8, length: int = 256) -> None:
    """Multiply-adds/s of the layers' linears while prompts are computed, beside those of one large product."""
    import torch

    from flightline.torch_engine.core.request import GenerationRequest
    from flightline.torch_engine.kernels.choice import default_threads

    engine = load_engine(options, enable_kv_cache_reuse=False)
    chance = random.Random(1)
    layers = engine.model.layers
    gate_up = layers[0].mlp.gate_up
    inputs, outputs = gate_up.inputs, gate_up.outputs
    work = sum(
        linear.inputs * linear.outputs
        for layer in layers
        for linear in (
            (layer.qkv, layer.out, layer.mlp.gate_up, layer.mlp.down)
            if layer is not layers[-1]
            else (layer.qkv,)
        )
    )  # the rest of the last layer is computed for a prompt's last token only
    rows = engine.config.max_num_tokens
    x = engine.kernels.add_norm(torch.randn(rows, inputs), None, None, torch.ones(inputs), 1e-6, gate_up)[0]
    wide, weight = torch.randn(rows, inputs), torch.randn(outputs, inputs)
    threads = engine.config.num_threads or default_threads()

    def compute_prompts() -> None:
        engine.generate(
            [
                GenerationRequest(
                    [chance.randrange(engine.info.vocab_size) for _ in range(length)], 1, end_id=-1
                )
                for _ in range(prompts)
            ]
        )

    rates: dict[str, float] = {}
    for _ in range(3):
        torch.set_num_threads(1)
        done = {
            "prefill": (compute_prompts, 1, prompts * length * work),
            "ours": (lambda: gate_up(x), 20, rows * inputs * outputs),
            "PyTorch float32": (
                lambda: torch.nn.functional.linear(wide, weight),
                20,
                rows * inputs * outputs,
            ),
        }
        for name, (call, times, macs) in done.items():
            if name.startswith("PyTorch"):
                torch.set_num_threads(threads)
            call()
            start = time.perf_counter()
            for _ in range(times):
                call()
            rate = times * macs / (time.perf_counter() - start) / 1e9
            rates[name] = max(rates.get(name, 0.0), round(rate, 1))
    print(json.dumps({"prefill_gmac_s": rates}), flush=True)


def require_lengths(lengths: list[int], tokens: int) -> None:
    if set(lengths) != {tokens}:
        raise SystemExit(f"cpu.py: error: outputs of {sorted(set(lengths))} tokens instead of {tokens}")


def run_sides(sides: list[str], options: argparse.Namespace) -> None:
    """What one process of ours does."""
    if sides == [PREFILL]:
        run_prefill(options)
    elif sides[0].startswith("engine"):
        run_engine(options, reuse=sides[0] == "engine-reuse")
    elif sides == ["transformers"]:
        run_transformers(options)
    else:
        run_served(options, sides)


class Loaded:
    """A process of ours that has loaded and answers: see :func:`answer`."""

    def __init__(self, sides: list[str], options: argparse.Namespace) -> None:
        command = [sys.executable, __file__, "--only", ",".join(sides), "--build-dir", str(options.build_dir)]
        command += ["--tokens", str(options.tokens), "--waves", str(options.waves)]
        command += ["--chat"] if options.chat else []
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def measure(self, side: str, concurrency: int) -> dict[str, Any]:
        """Raises SystemExit if the process has ended; it has said why."""
        assert self._process.stdin and self._process.stdout
        print(side, concurrency, file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"cpu.py: error: the side {side} ended")
        return json.loads(line)

    def close(self) -> None:
        self._process.communicate()  # the end of its input is the end of its work


def run(command: list[str]) -> list[dict[str, Any]]:
    """The lines of JSON that the command printed.

    Raises:
        SystemExit: the command failed or printed none.
    """
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    results = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode != 0 or not results:
        raise SystemExit(f"cpu.py: error: {shlex.join(command)} failed:\n{done.stderr[-2000:]}")
    return results


def stolen() -> int:
    """Hundredths of a second that the host has taken from this machine since it started; 0 if it does not tell."""
    return int(Path("/proc/stat").read_text(encoding="utf-8").split()[8])


def compare(options: argparse.Namespace) -> None:
    sides = [side for side in options.sides.split(",") if side]
    if unknown := sorted(set(sides) - {*SIDES, PREFILL}):
        raise SystemExit(
            f"cpu.py: error: --sides={unknown[0]} is unknown: use {', '.join((*SIDES, PREFILL))}"
        )
    together = [side for side in sides if side in ENDPOINTS]  # one server has both endpoints
    with ExitStack() as stack:
        loaded = {}
        for group in ([side] for side in sides if side not in (*together, PREFILL)):
            loaded[group[0]] = Loaded(group, options)
        loaded |= dict.fromkeys(together, Loaded(together, options)) if together else {}
        for process in set(loaded.values()):
            stack.callback(process.close)
        commands: dict[str, list[str]] = {}
        if PREFILL in sides:
            commands[PREFILL] = [
                sys.executable,
                __file__,
                "--only",
                PREFILL,
                "--build-dir",
                str(options.build_dir),
            ]
        commands |= {
            name: shlex.split(command) for name, _, command in (p.partition("=") for p in options.peer)
        }
        rounds: list[dict[str, Any]] = []

        def add(number: int, side: str, measure: Callable[[], list[dict[str, Any]]]) -> None:
            before, start = stolen(), time.monotonic()
            one: dict[str, Any] = dict(round=number, side=side, results=measure())
            one |= dict(steal_s=(stolen() - before) / 100, seconds=round(time.monotonic() - start, 1))
            rounds.append(one)
            print(json.dumps(one), file=sys.stderr, flush=True)

        for number in range(options.rounds):
            for concurrency in options.concurrency:
                for side in turned(list(loaded), number):
                    add(number, side, lambda: [loaded[side].measure(side, concurrency)])  # noqa: B023
            for name in turned(list(commands), number):
                add(number, name, lambda: run(commands[name]))  # noqa: B023
    text = table(rounds, options.concurrency, sides[0])
    print(text)
    if options.output:
        about = dict(
            tokens=options.tokens, waves=options.waves, cpu=cpu_model(), python=sys.version.split()[0]
        )
        about["rounds"] = rounds
        options.output.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def turned(names: list[str], number: int) -> list[str]:
    """The names in the order of this round."""
    at = number % max(len(names), 1)
    return names[at:] + names[:at]


def cpu_model() -> str:
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return f"{len(os.sched_getaffinity(0))} x {names[0] if names else 'unknown'}"


def table(rounds: list[dict[str, Any]], concurrencies: list[int], first: str) -> str:
    """Median rates, and in how many times the first side's each round stands to the others': median (spread)."""
    rates: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    host: dict[int, list[float]] = defaultdict(list)
    prefill: dict[str, list[float]] = defaultdict(list)
    for one in rounds:
        for result in one["results"]:
            for name, rate in result.get("prefill_gmac_s", {}).items():
                prefill[name].append(rate)
            if "output_tokens_per_s" in result:
                rates[one["side"]][result["concurrency"]].append(result["output_tokens_per_s"])
            if one["side"] == "engine" and "host_ms" in result:
                host[result["concurrency"]].append(result["host_ms"])
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
    if host:
        cells = [f"{statistics.median(host[concurrency]):.2f} ms" for concurrency in concurrencies]
        lines.append("| engine: host's time a step | " + " | ".join(cells) + " |")
    lines.append(
        f"\nOutput tokens/s, median of the rounds; in brackets {first} against that side, median: spread."
    )
    if prefill:
        medians = {name: statistics.median(values) for name, values in prefill.items()}
        best = max(rate for name, rate in medians.items() if name != PREFILL)
        products = ", ".join(f"{name} {rate:.0f}" for name, rate in medians.items() if name != PREFILL)
        lines.append(
            f"\nPrefill: {medians[PREFILL]:.0f} G multiply-adds/s in linear layers; one large product: {products}. "
            f"That is {medians[PREFILL] / best:.0%} of the best."
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--build-dir", type=Path, default=Path("build"))
    parser.add_argument(
        "--sides",
        default=",".join(SIDES),
        help=f"of ours, the first is compared: {', '.join(SIDES)}, {PREFILL}",
    )
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=COMMAND")
    parser.add_argument(
        "--concurrency",
        type=lambda text: [int(part) for part in text.split(",")],
        help="requests in flight: 1,8,32 or, with --sampling, 1,16",
    )
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of each request")
    parser.add_argument("--waves", type=int, default=1, help="requests for each one in flight")
    parser.add_argument("--chat", action="store_true", help="put the chat template around the prompts")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--sampling", metavar="KINDS", help="kinds of sampling against greedy: all, or some of kinds.py"
    )
    parser.add_argument(
        "--guesses", action="store_true", help="prompt lookup against none, in the engine alone"
    )
    parser.add_argument(
        "--prompts",
        type=lambda text: [int(part) for part in text.split(",")],
        metavar="LENGTHS",
        help="time of prompts of so many tokens each, in the engine alone",
    )
    parser.add_argument(
        "--against",
        type=Path,
        metavar="FOLDER",
        help="of other compiled kernels that --prompts compares with",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="all rounds as JSON")
    parser.add_argument(
        "--only", metavar="SIDES", help="run these in this process: what each process is started with"
    )
    options = parser.parse_args()
    options.build_dir = options.build_dir.absolute()
    alone = options.sampling or options.guesses
    options.concurrency = options.concurrency or ([1, 16] if alone else [1, 8, 32])
    if options.prompts and options.peer:
        compare_prompts(options)
    elif options.prompts:
        time_prompts(options)
    elif options.guesses:
        guess(options)
    elif options.sampling:
        compare_kinds(options)
    elif options.only:
        run_sides(options.only.split(","), options)
    else:
        compare(options)


if __name__ == "__main__":
    main()
