"""Conversations of several turns whose KV cache has no room for all: with a second tier in host memory and without.

``python3 benchmarks/host_kv.py build/engines/NAME`` for an engine that was built (for a CPU or a GPU); without a folder
the shape of Llama-3.1-8B with random weights on a GPU. Random words, greedy, ends ignored. Each conversation waits for
its answer before it goes on, and all others have their turn meanwhile. Both engines are in one process and take turns,
round by round, each time with other conversations. One line of JSON a round; a table last.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from flightline.torch_engine.core.config import EngineConfig  # noqa: E402
from flightline.torch_engine.core.request import GenerationRequest  # noqa: E402
from flightline.torch_engine.engine import Engine  # noqa: E402
from flightline.torch_engine.text.stream import TokenBytes  # noqa: E402

ARMS = ("without", "with")


def load(options: argparse.Namespace, hosted: bool) -> Engine:
    length = options.first + options.turns * (options.words + options.answer)
    wanted = options.conversations * -(-length // 16)
    blocks = max(int(wanted * options.share), options.at_once * -(-length // 16))
    sizes = {
        "num_kv_blocks": blocks,
        "num_host_kv_blocks": 2 * wanted if hosted else 0,
        "max_seq_len": length,
        "block_size": 16,
    }
    if options.folder is not None:
        return Engine(EngineConfig.load(options.folder, **sizes))
    from benchmarks.random_checkpoint import LLAMA_8B, RandomCheckpoint

    config = EngineConfig(
        model_dir="random", device="cuda", compute_dtype="bfloat16", kv_dtype="fp8", max_batch_size=64,
        max_num_tokens=8192, max_queue_size=0, cuda_tuning=False, **sizes,
    )  # fmt: skip
    tokens = TokenBytes([b"a"] * LLAMA_8B.vocab_size)
    return Engine(config, RandomCheckpoint(LLAMA_8B), tokens)


def talk(engine: Engine, options: argparse.Namespace, seed: int) -> dict[str, Any]:
    """All turns of all conversations, ``at_once`` in flight; what was computed, and how long that took."""
    chance = random.Random(seed)  # not below 0: -1 is the same as 1
    vocabulary = engine.info.vocab_size

    def words(count: int) -> list[int]:
        return [chance.randrange(5, vocabulary) for _ in range(count)]

    texts = [words(options.first) for _ in range(options.conversations)]
    before, started = engine.stats, time.perf_counter()
    prompt_tokens, cached, waits = 0, 0, []
    for _ in range(options.turns):
        for begin in range(0, len(texts), options.at_once):
            some = range(begin, min(begin + options.at_once, len(texts)))
            for number in some:
                texts[number] += words(options.words)
            outputs = engine.generate(
                [GenerationRequest(texts[number], options.answer, end_id=-1) for number in some]
            )
            for number, output in zip(some, outputs, strict=True):
                assert output.metrics is not None
                prompt_tokens += len(texts[number])
                cached += output.metrics.num_cached_tokens
                waits.append(output.metrics.first_token_time_ns - output.metrics.arrival_time_ns)
                texts[number] += output.token_ids
    after = engine.stats
    return {
        "prompt_tokens": prompt_tokens,
        "computed": prompt_tokens - cached,
        "seconds": round(time.perf_counter() - started, 3),
        "first_token_ms": round(statistics.median(waits) / 1e6, 1),
        "hits": after.host_kv_hits - before.host_kv_hits,
        "saved_mib": (after.host_kv_bytes_saved - before.host_kv_bytes_saved) >> 20,
        "restored_mib": (after.host_kv_bytes_restored - before.host_kv_bytes_restored) >> 20,
    }


def table(rounds: dict[str, list[dict[str, Any]]]) -> str:
    lines = [
        "| host memory | prompt tokens | computed | seconds | first token, ms (median) | hits | MiB out, in |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for arm, results in rounds.items():
        middle = {name: statistics.median(result[name] for result in results) for name in results[0]}
        lines.append(
            f"| {arm} | {middle['prompt_tokens']:,.0f} | {middle['computed']:,.0f} | {middle['seconds']:.2f} | "
            f"{middle['first_token_ms']:.1f} | {middle['hits']:.0f} | {middle['saved_mib']:.0f}, "
            f"{middle['restored_mib']:.0f} |"
        )
    pairs = zip(rounds["without"], rounds["with"], strict=True)
    ratios = sorted(off["seconds"] / on["seconds"] for off, on in pairs)
    lines.append(
        f"\nseconds without / with: {statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})"
    )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", help="engine folder of a build")
    for name, default, text in (
        ("conversations", 16, "that take turns"),
        ("turns", 4, "of each conversation"),
        ("first", 400, "tokens that a conversation begins with"),
        ("words", 60, "tokens that each turn adds to the prompt"),
        ("answer", 32, "tokens of each answer"),
        ("at-once", 2, "conversations in flight"),
        ("rounds", 3, "of both engines in turns"),
    ):
        parser.add_argument(f"--{name}", type=int, default=default, help=text)
    parser.add_argument(
        "--share", type=float, default=0.4, help="of all conversations' tokens that fit the KV cache"
    )
    parser.add_argument("--out", type=Path, help="file for all results as JSON")
    options = parser.parse_args()
    engines = {arm: load(options, arm == "with") for arm in ARMS}
    print(engines["with"].info.description, flush=True)
    rounds: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    for number in range(-1, options.rounds):  # the first one warms up
        for arm in ARMS if number % 2 else reversed(ARMS):
            result = talk(engines[arm], options, number + 1)
            print(json.dumps({"arm": arm, "round": number, **result}), flush=True)
            if number >= 0:
                rounds[arm].append(result)
    if options.out is not None:
        options.out.write_text(json.dumps(rounds, indent=1) + "\n", encoding="utf-8")
    print(table(rounds))
    for engine in engines.values():
        engine.close()


if __name__ == "__main__":
    main()
