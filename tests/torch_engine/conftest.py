from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from flightline.torch_engine.core.config import EngineConfig
from flightline.torch_engine.engine import Engine
from flightline.torch_engine.kernels.cpu.toolchain import compile_library, compiler
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Folder of the compiled CPU kernels; empty where there is no compiler."""
    if compiler() is None:
        return ""
    folder = tmp_path_factory.mktemp("kernels")
    flags, isas = (os.environ.get(f"FLIGHTLINE_TEST_{name}", "").split() for name in ("CXXFLAGS", "ISAS"))
    compile_library(folder, isas or None, tuple(flags))
    return str(folder)


@pytest.fixture(scope="session")
def parrot(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of few words that soon repeats itself, but not always."""
    folder = tiny_checkpoint(tmp_path_factory.mktemp("parrot"), "llama")
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            tensor *= 0.35
        if name == "lm_head.weight":
            tensor[12:] = 0
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


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
