"""What changes between TensorRT-LLM releases, all of it here.

1.0, 1.1 and 1.2 are one generation. Before 1.0 the LLM API was another; 1.3 removed the compiled engines
(``trtllm-build``, the C++ Triton backend).
"""

from __future__ import annotations

import importlib.metadata
import re
from typing import Any

ENGINE_LANE, PYTORCH_LANE = "trtllm-engine", "trtllm-pytorch"
FIRST = (1, 0)
FIRST_WITHOUT_ENGINES = (1, 3)
PINNED_IMAGE = "nvcr.io/nvidia/tritonserver:26.06-trtllm-python-py3"
PINNED_VERSION = "1.2.1"


def installed() -> str | None:
    """Version of the installed TensorRT-LLM, without importing it."""
    try:
        return importlib.metadata.version("tensorrt_llm")
    except importlib.metadata.PackageNotFoundError:
        return None


def release(version: str) -> tuple[int, int]:
    """``1.2.0rc8`` -> ``(1, 2)``. Raises ValueError: not a version."""
    found = re.match(r"(\d+)\.(\d+)", version)
    if not found:
        raise ValueError(f"{version!r} is not a version")
    return int(found[1]), int(found[2])


def refusal(lane: str, version: str | None) -> str:
    """Why a lane cannot run on a release, with the remedy; empty if it can."""
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


def sampler_arguments(version: str) -> dict[str, Any]:
    """Arguments of ``LLM`` that choose the sampler with penalties, minimum lengths and bad words."""
    if release(version) == (1, 0):
        return {"enable_trtllm_sampler": True}
    return {"sampler_type": "TRTLLMSampler"}
