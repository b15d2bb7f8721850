"""The engine process of lane trtllm-pytorch.

python -m model_repository.trtllm.server --engine-dir DIR --socket PATH

It speaks the protocol of ``torch_engine.server``, so that Triton's models do not know which engine they have. A
process of its own: TensorRT-LLM starts MPI workers, which a Python stub of Triton should not.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import time
from typing import Any, cast

from model_repository.trtllm import versions
from model_repository.trtllm.engine import LlmEngine
from model_repository.trtllm.llm_api import LlmConfig, LlmConfigError
from torch_engine.engine import Engine
from torch_engine.families import UnsupportedModel
from torch_engine.server import EngineServer
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
    if refusal := versions.refusal(versions.PYTORCH_LANE, tensorrt_llm.__version__):
        raise LlmConfigError(refusal)
    return tensorrt_llm


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m model_repository.trtllm.server")
    parser.add_argument(
        "--engine-dir", required=True, help="folder with llm_api.json, from make build-engines"
    )
    parser.add_argument("--socket", required=True, help="Unix socket to listen on; must not exist")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    try:
        engine = load(options.engine_dir)
        server = EngineServer(cast(Engine, engine), options.socket)
    except (
        LlmConfigError,
        UnsupportedModel,
        UnsupportedTokenizer,
        OSError,
        ValueError,
        RuntimeError,
    ) as error:
        print(f"engine: {error}", file=sys.stderr)
        return 1
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: server.stop())
    print(
        f"engine ready: {engine.info.description} (loaded in {time.monotonic() - started:.1f} s)", flush=True
    )
    status = server.run()
    if os.path.exists(options.socket):
        os.unlink(options.socket)
    engine.close()
    return status


if __name__ == "__main__":
    sys.exit(main())
