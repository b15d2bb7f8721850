"""What changes between TensorRT-LLM releases, all of it here.

1.0, 1.1 and 1.2 are one generation. Before 1.0 the LLM API was another; 1.3 removed the compiled engines
(``trtllm-build``, the C++ Triton backend: #15907). ``HABITS`` is what the LLM API wants to be told by each; sources are
the API references of the releases, for the sampler and its log-probs #11938, #18232 and #18513, for the retention of
KV blocks #7062, for whole logits #7106 and #8317, for top-p decay #16184.
"""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from flightline.engine_build.trtllm.containers import CONTAINERS

ENGINE_LANE, PYTORCH_LANE = "trtllm-engine", "trtllm-pytorch"
FIRST = (1, 0)
FIRST_WITHOUT_ENGINES = (1, 3)
PINNED_IMAGE, PINNED_VERSION = CONTAINERS[0].image, CONTAINERS[0].tensorrt_llm
FINAL = 1_000_000
"""Number of a release candidate that stands for the release itself."""


@dataclass(frozen=True)
class Habits:
    """What the LLM API of a release, and of those up to the next entry, wants to be told."""

    since: tuple[int, int, int]
    """Major, minor, release candidate."""
    sampler: Mapping[str, Any]
    """Arguments of ``LLM`` that choose the sampler with penalties, minimum lengths and bad words."""
    chosen_log_prob: int
    """``logprobs`` of ``SamplingParams`` for the chosen token only. The C++ sampler wants 1, and 0 switches its
    log-probs off; TorchSampler wants 0, and 1 adds the most likely token."""
    numpy: str
    """What NVIDIA's container has, and its own wheels were built for; "" = not known."""
    transformers: str
    """The version that the release pins; "" = not known."""
    retention: bool = True
    """Whether the PyTorch flow keeps to a request's ``KvCacheRetentionConfig``; it was dropped on the way before."""
    logits: bool = True
    """Whether logits can be had whole: under a ``cache_salt`` of its own a request reuses no KV blocks, and of tokens
    in reused blocks there are none."""
    top_p_decay: bool = False
    """Whether its sampler knows ``top_p_decay``, ``top_p_min`` and ``top_p_reset_ids``; dropped before, too."""
    removed: tuple[str, ...] = ()
    """Arguments of ``LLM`` that are an error from here on."""


HABITS = (
    Habits((1, 0, 0), {"enable_trtllm_sampler": True}, 1, "<2", "4.53.1", retention=False, logits=False),
    Habits(
        (1, 1, 0), {"sampler_type": "TRTLLMSampler"}, 1, "<2", "4.56.0",
        retention=False, logits=False, removed=("enable_trtllm_sampler", "auto_parallel_config"),
    ),
    Habits((1, 2, 0), {"sampler_type": "TRTLLMSampler"}, 1, "<2", "4.57.3"),
    Habits((1, 3, 0), {"sampler_type": "TRTLLMSampler"}, 1, "", "", removed=("build_config", "quant_config")),
    # The C++ sampler is gone (1.3.0rc24 still had it, deprecated): what is left needs no choosing.
    Habits((1, 3, 26), {}, 0, "", "", top_p_decay=True, removed=("sampler_type",)),
)  # fmt: skip
"""Oldest first. 1.4 is like 1.3.0rc26 as far as its newest candidate (rc4) shows; a later one is taken to be, too."""
NEWEST_KNOWN = (1, 4)


def installed(package: str = "tensorrt_llm") -> str | None:
    """Version of an installed package, without importing it."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, int]:
    """``1.2.0rc8`` -> ``(1, 2)``. Raises ValueError: not a version."""
    return _parsed(version)[:2]


def _parsed(version: str) -> tuple[int, int, int]:
    """``1.3.0rc24`` -> ``(1, 3, 24)``; of a final release the last number is ``FINAL``."""
    found = re.match(r"(\d+)\.(\d+)(?:\.\d+)?(?:rc(\d+))?", version)
    if not found:
        raise ValueError(f"{version!r} is not a version")
    return int(found[1]), int(found[2]), int(found[3] or FINAL)


def habits(version: str) -> Habits:
    """The newest entry that is not newer than ``version``, which must not be older than 1.0."""
    return [each for each in HABITS if each.since <= _parsed(version)][-1]


def refusal(lane: str, version: str | None) -> str:
    """Why a backend cannot run on a release, with the remedy; empty if it can."""
    if version is None:
        return f"TensorRT-LLM is not installed here: run inside {PINNED_IMAGE} (make up)"
    if release(version) < FIRST:
        return f"TensorRT-LLM {version} is older than 1.0: use {PINNED_IMAGE} ({PINNED_VERSION})"
    if lane == ENGINE_LANE and release(version) >= FIRST_WITHOUT_ENGINES:
        return (
            f"TensorRT-LLM {version} has no compiled engines any more (removed in 1.3): use "
            f"ENGINE={PYTORCH_LANE}, or {PINNED_IMAGE} ({PINNED_VERSION})"
        )
    return ""


def import_failure(version: str | None, error: Exception) -> str:
    """Why ``import tensorrt_llm`` failed, with the remedy; ``version`` as of :func:`installed`."""
    if version is None and isinstance(error, ImportError):
        return refusal(PYTORCH_LANE, None)
    why = f"{type(error).__name__}: {error}".splitlines()[0]
    remedy = (
        "set HOME to a folder that this user may write, where FlashInfer and Triton's language keep what they compile"
        if isinstance(error, OSError)
        else f"use {PINNED_IMAGE} as NVIDIA ships it"
    )
    what = f"TensorRT-LLM {version or 'of unknown version'}"
    beside = transformers_remark(version) if version else ""
    return f"{what} is installed and cannot be imported ({why}): {remedy}" + (f"; {beside}" if beside else "")


def remark(version: str) -> str:
    """What should be known of a release that can run; empty if nothing."""
    if release(version) > NEWEST_KNOWN:
        newest = ".".join(map(str, NEWEST_KNOWN))
        return f"TensorRT-LLM {version} is newer than any we know ({newest}): it is used as {newest} is"
    return ""


def transformers_remark(version: str) -> str:
    """What should be known of the installed Transformers beside a release; empty if nothing."""
    pinned, found = habits(version).transformers, installed("transformers")
    if not pinned or found is None or release(pinned) == release(found):
        return ""
    return f"TensorRT-LLM {version} pins transformers {pinned} and {found} is installed: if it fails, install {pinned}"


def numpy_refusal(version: str, numpy: str) -> str:
    """Why a release cannot run with the installed NumPy, with the remedy; empty if it can."""
    if habits(version).numpy == "<2" and release(numpy)[0] >= 2:
        return (
            f"TensorRT-LLM {version} needs numpy<2 and {numpy} is installed: install numpy 1.26, or use the image "
            "as NVIDIA ships it"
        )
    return ""
