"""OpenVINO GenAI on a GGUF; a peer for ``cpu.py``, whose prompts it takes: ``python3 peer_openvino.py MODEL.gguf``.

Needs an environment with openvino-genai and openvino-tokenizers, nothing of ours but this folder. One line of JSON a
concurrency with the output tokens/s, or with ``--prompts`` a length with the milliseconds to the first token of a
prompt of so many random tokens alone.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import openvino as ov
import openvino_genai as genai
from cpu import texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="GGUF file")
    parser.add_argument("--tokens", type=int, default=64, help="output tokens of each request")
    parser.add_argument("--concurrency", default="1,8,32")
    parser.add_argument("--prompts", default="", metavar="LENGTHS")
    options = parser.parse_args()
    pipeline = genai.LLMPipeline(options.model, "CPU")
    if options.prompts:
        return time_prompts(pipeline, [int(length) for length in options.prompts.split(",")])
    config = config_of(options.tokens)
    pipeline.generate(texts(2), config)
    for count in map(int, options.concurrency.split(",")):
        start = time.perf_counter()
        pipeline.generate(texts(count), config)
        rate = count * options.tokens / (time.perf_counter() - start)
        print(
            json.dumps({"engine": "openvino", "concurrency": count, "output_tokens_per_s": round(rate, 1)}),
            flush=True,
        )


def config_of(tokens: int) -> genai.GenerationConfig:
    config = genai.GenerationConfig()
    config.max_new_tokens = config.min_new_tokens = tokens
    config.do_sample, config.ignore_eos, config.apply_chat_template = False, True, True
    return config


def time_prompts(pipeline: genai.LLMPipeline, lengths: list[int]) -> None:
    chance, config = random.Random(time.time_ns()), config_of(1)

    def once(length: int) -> float:
        """Milliseconds."""
        ids = np.array([[chance.randrange(10, 40_000) for _ in range(length)]], dtype=np.int64)
        inputs = genai.TokenizedInputs(ov.Tensor(ids), ov.Tensor(np.ones_like(ids)))
        start = time.perf_counter()
        pipeline.generate(inputs, config)
        return 1000 * (time.perf_counter() - start)

    once(50)
    for length in lengths:
        print(
            json.dumps({"engine": "openvino", "prompt_tokens": length, "ms": round(once(length), 1)}),
            flush=True,
        )


if __name__ == "__main__":
    main()
