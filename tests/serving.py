"""Real servers for tests: a tiny random model, built by engine_build, served by Triton."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from model_repository.serve import Server, ServeSettings
from torch_engine.config import EngineConfig


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for taken in sockets:
            taken.bind(("127.0.0.1", 0))
        return [taken.getsockname()[1] for taken in sockets]
    finally:
        for taken in sockets:
            taken.close()


def settings_for(build_dir: Path, **changes: object) -> ServeSettings:
    """Settings on free ports, with the patience of a loaded test machine."""
    http, grpc, metrics = free_ports(3)
    return ServeSettings(build_dir=build_dir, http_port=http, grpc_port=grpc, metrics_port=metrics, **changes)


def build_tiny(folder: Path, tokenizer: str = "byte_level", baseline_max_batch_size: int = 1) -> Path:
    """Builds a tiny Llama (random weights, 512 tokens of context) into ``folder/build``; returns that."""
    from engine_build.build import Build
    from engine_build.settings import parse
    from tests.tiny import tiny_checkpoint

    checkpoint = tiny_checkpoint(folder / f"tiny-{tokenizer}", tokenizer=tokenizer)
    arguments = ["--model", str(checkpoint), "--engine", "torch", "--precision", "bf16"]
    arguments += ["--baseline-max-batch-size", str(baseline_max_batch_size)]
    deployment = Build(parse([*arguments, "--build-dir", str(folder / "build")]), say=lambda line: None).run()
    # One thread is plenty for so small a model, and does not wait for a core that other tests use.
    EngineConfig.load(deployment["engine_dir"], num_threads=1).save(deployment["engine_dir"])
    return folder / "build"


@pytest.fixture(scope="session")
def tiny_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build folder of a tiny model, for servers of one's own."""
    return build_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def served(tiny_build: Path) -> Iterator[Server]:
    """One server for the whole session, with every model; leave it as you found it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLIGHTLINE_BASELINE_THREADS", "1")
        with Server(settings_for(tiny_build), say=print) as server:
            yield server
