"""The engine process of backend trtllm-pytorch.

python -m flightline.supervisor.trtllm.server --engine-dir DIR --socket PATH

It speaks the protocol of ``process/server.py``, so that Triton's models do not know which engine they have. A
process of its own: TensorRT-LLM starts MPI workers, which a Python stub of Triton should not.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from flightline.engine_build.trtllm import versions
from flightline.supervisor.trtllm.engine import LlmEngine
from flightline.supervisor.trtllm.llm_api import LlmConfig, LlmConfigError
from flightline.torch_engine.model.fields import UnsupportedModel
from flightline.torch_engine.process.server import run
from flightline.torch_engine.text.stream import UnsupportedTokenizer


def load(engine_dir: str) -> LlmEngine:
    """Raises LlmConfigError: not built, or TensorRT-LLM is missing or of a release that cannot serve it."""
    config = LlmConfig.load(engine_dir)
    return LlmEngine(config, _tensorrt_llm())


def _tensorrt_llm() -> Any:
    if version := versions.installed():  # before the import: a NumPy that is too new makes it fail
        _require_usable(version)
    try:
        import tensorrt_llm
        import tensorrt_llm.llmapi
    except Exception as error:  # what it imports fails in ways of its own, FlashInfer with PermissionError
        raise LlmConfigError(versions.import_failure(version, error)) from error
    if tensorrt_llm.__version__ != version:
        _require_usable(tensorrt_llm.__version__)
    for remark in (versions.remark, versions.transformers_remark):
        if line := remark(tensorrt_llm.__version__):
            print(f"engine: {line}", file=sys.stderr, flush=True)
    return tensorrt_llm


def _require_usable(version: str) -> None:
    refusal = versions.refusal(versions.PYTORCH_LANE, version)
    if refusal := refusal or versions.numpy_refusal(version, np.__version__):
        raise LlmConfigError(refusal)


def main(arguments: list[str] | None = None) -> int:
    errors = (LlmConfigError, UnsupportedModel, UnsupportedTokenizer, OSError, ValueError, RuntimeError)
    program = "python -m flightline.supervisor.trtllm.server"
    return run(program, "llm_api.json", load, errors, arguments)


if __name__ == "__main__":
    sys.exit(main())
