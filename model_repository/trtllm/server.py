"""The engine process of lane trtllm-pytorch.

python -m model_repository.trtllm.server --engine-dir DIR --socket PATH

It speaks the protocol of ``torch_engine.server``, so that Triton's models do not know which engine they have. A
process of its own: TensorRT-LLM starts MPI workers, which a Python stub of Triton should not.
"""

from __future__ import annotations

import sys
from typing import Any, cast

import numpy as np

from model_repository.trtllm import versions
from model_repository.trtllm.engine import LlmEngine
from model_repository.trtllm.llm_api import LlmConfig, LlmConfigError
from torch_engine.engine import Engine
from torch_engine.families import UnsupportedModel
from torch_engine.server import run
from torch_engine.text import UnsupportedTokenizer


def load(engine_dir: str) -> LlmEngine:
    """Raises LlmConfigError: not built, or TensorRT-LLM is missing or of a release that cannot serve it."""
    config = LlmConfig.load(engine_dir)
    return LlmEngine(config, _tensorrt_llm())


def _tensorrt_llm() -> Any:
    try:
        import tensorrt_llm
        import tensorrt_llm.llmapi
    except ImportError as error:
        why = f" ({error})" if versions.installed() else ""
        raise LlmConfigError(versions.refusal(versions.PYTORCH_LANE, None) + why) from None
    version = tensorrt_llm.__version__
    refusal = versions.refusal(versions.PYTORCH_LANE, version) or versions.numpy_refusal(
        version, np.__version__
    )
    if refusal:
        raise LlmConfigError(refusal)
    if remark := versions.remark(version):
        print(f"engine: {remark}", file=sys.stderr, flush=True)
    return tensorrt_llm


def main(arguments: list[str] | None = None) -> int:
    errors = (LlmConfigError, UnsupportedModel, UnsupportedTokenizer, OSError, ValueError, RuntimeError)
    program = "python -m model_repository.trtllm.server"
    return run(program, "llm_api.json", lambda folder: cast(Engine, load(folder)), errors, arguments)


if __name__ == "__main__":
    sys.exit(main())
