"""Greedy answers of llama.cpp with their likeliest tokens; the peer of ``llama_cpp.py``, which starts it.

Needs an environment with ``xllamacpp`` (wheels with llama.cpp inside), nothing of ours. Standard input: JSON with
``model`` (a GGUF file), ``prompts`` (token ids), ``tokens``, ``threads`` and ``top``. Standard output: a line of JSON
with a list for each prompt, of ``[token, [[likely token, log-probability], ...]]`` for each token of the answer.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import xllamacpp


def main() -> None:
    asked = json.load(sys.stdin)
    parameters = xllamacpp.CommonParams()
    parameters.model.path = asked["model"]
    parameters.n_ctx, parameters.n_parallel = 2048, 1
    parameters.cpuparams.n_threads = asked["threads"]
    server = xllamacpp.Server(parameters)
    answers = [answer(server, prompt, asked["tokens"], asked["top"]) for prompt in asked["prompts"]]
    print(json.dumps({"version": xllamacpp.__version__, "answers": answers}))


def answer(server: Any, prompt: list[int], tokens: int, top: int) -> list[Any]:
    """Token ids go in, so that no tokenizer has a say."""
    said = server.handle_completions(
        {
            "prompt": prompt, "n_predict": tokens, "temperature": 0, "n_probs": top, "cache_prompt": False,
        }
    )  # fmt: skip
    return [
        [each["id"], [[likely["id"], likely["logprob"]] for likely in each["top_logprobs"]]]
        for each in said["choices"][0]["logprobs"]["content"]
    ]


if __name__ == "__main__":
    main()
