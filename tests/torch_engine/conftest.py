from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.tiny import tiny_checkpoint
from torch_engine.config import EngineConfig
from torch_engine.engine import Engine
from torch_engine.kernels.native import compile_library, compiler


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The compiled CPU kernels; empty where there is no compiler."""
    if compiler() is None:
        return ""
    return str(compile_library(tmp_path_factory.mktemp("kernels")))


@pytest.fixture
def make_engine(llama_dir: Path) -> Callable[..., Engine]:
    def make(model_dir: Path | None = None, **settings: object) -> Engine:
        defaults = {
            "num_kv_blocks": 64,
            "block_size": 4,
            "max_seq_len": 128,
            "max_batch_size": 16,
            "max_num_tokens": 16,
            "num_threads": 1,
        }
        return Engine(EngineConfig(model_dir=str(model_dir or llama_dir), **{**defaults, **settings}))

    return make
