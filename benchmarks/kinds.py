"""The kinds of sampling that applications ask for, in the words of OpenAI's API as vLLM extends them.

One table for all commands that compare kinds, ours and peers', so that both sides are asked for the same.
"""

from __future__ import annotations

from typing import Any

KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "topk_topp": {"temperature": 0.8, "top_k": 50, "top_p": 0.95},
    "topp": {"temperature": 0.7, "top_p": 0.9},
    "minp": {"temperature": 1.0, "min_p": 0.05},
    "temp1": {"temperature": 1.0},
    "penalty": {"temperature": 0.0, "repetition_penalty": 1.1},
    "seeded": {"temperature": 1.0, "seed": 1234},
    "logprobs": {"temperature": 0.0, "logprobs": 0},
    "top5": {"temperature": 0.0, "logprobs": 5},
}
"""Name -> parameters; ``logprobs`` is how many of the likeliest tokens are told beside the chosen one."""
MIX = "mix"
ALL = (*KINDS, MIX)


def parameters(kind: str, number: int) -> dict[str, Any]:
    """What request ``number`` of a batch of this kind asks for: in a mix one kind after the other, seeds all different.

    Raises:
        KeyError: no such kind.
    """
    if kind == MIX:
        kind = list(KINDS)[number % len(KINDS)]
    wanted = dict(KINDS[kind])
    if "seed" in wanted:
        wanted["seed"] += number
    return wanted


def ours(kind: str, number: int) -> tuple[dict[str, Any], int | None]:
    """The same in our own words, and how many log-probs: temperature 1 without limits is ``top_p`` 1 there."""
    wanted = parameters(kind, number)
    told = wanted.pop("logprobs", None)
    if wanted["temperature"] and not {"top_k", "top_p", "min_p"} & set(wanted):
        wanted["top_p"] = 1.0
    return wanted, told


def request_fields(kind: str, number: int) -> dict[str, Any]:
    """As fields of ``GenerationRequest``."""
    from flightline.torch_engine.core.request import SamplingParams

    wanted, told = ours(kind, number)
    return {
        "sampling": SamplingParams(**wanted),
        "return_log_probs": told is not None,
        "top_log_probs": told or 0,
    }
