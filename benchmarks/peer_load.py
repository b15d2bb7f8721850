"""vLLM's own load generator against any OpenAI-compatible server, several cases in one process: for ``gpu_gateway.py``.

``python3 benchmarks/peer_load.py --url http://127.0.0.1:8000 --model NAME --tokenizer DIR [--levels 1,64]``

Needs an environment with vLLM, nothing of ours. It calls the program ``vllm bench serve`` for each case; to start it
once for each would take longer than most of them. Random prompts of 128 tokens, streamed answers of 128, end of
sequence ignored; a wave of warm-up requests before each case. A line of JSON a case.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1")
LENGTH = 128
WAVES = 4
LEAST = 16
"""Requests of a case."""
TOLD = (
    "total_output_tokens",
    "output_throughput",
    "mean_ttft_ms",
    "p99_ttft_ms",
    "mean_tpot_ms",
    "p99_tpot_ms",
    "mean_itl_ms",
    "p99_itl_ms",
)


def case(options: argparse.Namespace, level: int, temperature: str, seed: int, folder: str) -> dict:
    """What ``vllm bench serve`` found out."""
    from vllm.entrypoints.cli.main import main as vllm

    requests = max(LEAST, WAVES * level)
    sys.argv = [
        *(
            "vllm",
            "bench",
            "serve",
            "--backend",
            "openai",
            "--base-url",
            options.url,
            "--model",
            options.model,
        ),
        *("--tokenizer", options.tokenizer, "--dataset-name", "random", "--random-input-len", str(LENGTH)),
        *("--random-output-len", str(LENGTH), "--ignore-eos", "--num-prompts", str(requests)),
        *("--max-concurrency", str(level), "--num-warmups", str(level), "--temperature", temperature),
        *("--seed", str(seed), "--percentile-metrics", "ttft,tpot,itl,e2el", "--disable-tqdm"),
        *("--save-result", "--result-dir", folder, "--result-filename", "result.json"),
    ]
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            vllm()
    except SystemExit as end:
        if end.code:
            raise SystemExit(f"vllm bench serve ended with {end.code}: {said.getvalue()[-2000:]}") from None
    found = json.loads(Path(folder, "result.json").read_text())
    if found["completed"] != requests:
        raise SystemExit(
            f"{found['completed']} of {requests} requests were answered: {said.getvalue()[-2000:]}"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--url", required=True)
    parser.add_argument("--model", required=True, help="its name at the server")
    parser.add_argument("--tokenizer", required=True, help="folder")
    parser.add_argument("--levels", default="1,32,64,256", help="requests in flight")
    parser.add_argument("--temperatures", default="0,1")
    parser.add_argument("--repeats", type=int, default=1, help="of all cases, one after the other")
    options = parser.parse_args()
    cases = itertools.product(
        range(options.repeats), options.temperatures.split(","), map(int, options.levels.split(","))
    )
    for seed, (_, temperature, level) in enumerate(cases, 1):
        # Other prompts each time: those of a case before would come from a prefix cache.
        with tempfile.TemporaryDirectory() as folder:
            found = case(options, level, temperature, seed, folder)
        line = {"level": level, "temperature": float(temperature)}
        print(json.dumps(line | {name: found.get(name) for name in TOLD}), flush=True)


if __name__ == "__main__":
    main()
