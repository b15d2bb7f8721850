"""Real servers for tests: a tiny random model, built by engine_build, served by Triton."""

from __future__ import annotations

import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flightline.engine_build.hardware import Hardware
from flightline.engine_build.settings import parse
from flightline.engine_build.trtllm.host import Gpu
from flightline.supervisor.serve import Server, ServeSettings
from flightline.supervisor.trtllm import guard
from flightline.torch_engine.core.config import EngineConfig
from tests.engine_build import trtllm_tools
from tests.short_gate import short_gate


def free_ports(count: int) -> list[int]:
    """Ports that nothing listens on now.

    They are below those that the kernel gives to outgoing connections, so that none takes them before the server does,
    or while one is started again; each worker of pytest-xdist has a thousand of its own.
    """
    first = 10_000 + 1_000 * int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    found: list[int] = []
    for port in random.sample(range(first, first + 1_000), 1_000):
        with socket.socket() as trial:
            try:
                trial.bind(("127.0.0.1", port))
            except OSError:
                continue
        found.append(port)
        if len(found) == count:
            break
    return found


def settings_for(build_dir: Path, **changes: object) -> ServeSettings:
    """Settings on free ports, with the patience of a loaded test machine."""
    http, grpc, metrics = free_ports(3)
    given = {
        "http_port": http,
        "grpc_port": grpc,
        "metrics_port": metrics,
        "start_timeout_s": 900.0,
        **changes,
    }
    return ServeSettings(build_dir=build_dir, **given)


WATCHFUL = {"probe_period_s": 1.0, "probe_timeout_s": 3.0}
"""Settings of a server that soon notices what hangs. It must not take a busy machine for a hang: one that uses the
processor, or answers meanwhile, is left alone."""


@contextmanager
def serving(settings: ServeSettings, say: Callable[[str], None] = print) -> Iterator[Server]:
    """A server for what it answers. It is ended without patience: how one ends well, tests/supervisor shows."""
    with Server(settings, say=say) as server:
        try:
            yield server
        finally:
            server.hurry()


CONTEXT = 16_384
"""Tokens; so long that a test can break something in the middle of an answer, however slow its client is."""


def build_tiny(
    folder: Path, tokenizer: str = "byte_level", baseline_max_batch_size: int = 1, dp: int = 1
) -> Path:
    """Builds a tiny Llama (random weights, ``CONTEXT`` tokens) into ``folder/build``; returns that."""
    from flightline.engine_build.build import Build
    from tests.tiny import tiny_checkpoint

    checkpoint = tiny_checkpoint(
        folder / f"tiny-{tokenizer}", tokenizer=tokenizer, max_position_embeddings=CONTEXT
    )
    arguments = ["--model", str(checkpoint), "--engine", "torch", "--precision", "bf16"]
    arguments += ["--max-seq-len", str(CONTEXT), "--baseline-max-batch-size", str(baseline_max_batch_size)]
    arguments += ["--dp", str(dp)]
    with short_gate():
        deployment = Build(
            parse([*arguments, "--build-dir", str(folder / "build")]), say=lambda line: None
        ).run()
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
        with serving(settings_for(tiny_build)) as server:
            yield server


GPU = Gpu("NVIDIA H200", (9, 0), 141 << 30, 140 << 30, "590.44.01")
DOUBLE = Path(__file__).parent / "trtllm_double"


@contextmanager
def tensorrt_llm_lane(
    folder: Path,
    lane: str,
    version: str = "1.2.1",
    prepare: Callable[[Path], None] = lambda build: None,
    baseline: bool = True,
    **checkpoint_fields: object,
) -> Iterator[Server]:
    """A real Triton that serves a TensorRT-LLM backend of a tiny model, with TensorRT-LLM itself replaced.

    ``prepare`` gets the build folder before the server starts; ``checkpoint_fields`` go to ``tiny_checkpoint``.
    """
    from flightline.engine_build import build
    from tests.tiny import tiny_checkpoint

    hardware = Hardware("cuda", GPU.name, 64 << 20, 64 << 20, capability=(9, 0), tensorrt_llm=version)
    root = str(Path(__file__).parents[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FLIGHTLINE_BASELINE_THREADS", "1")
        patch.setenv("PYTHONPATH", os.pathsep.join([str(DOUBLE), root]))
        patch.setenv("TRTLLM_DOUBLE_VERSION", version)
        patch.setattr(guard, "observe", lambda: guard.Facts(version, (GPU,)))
        checkpoint = tiny_checkpoint(folder / "tiny", **checkpoint_fields)
        arguments = ["--model", str(checkpoint), "--engine", lane, "--precision", "bf16"]
        settings = parse([*arguments, "--build-dir", str(folder / "build")])
        with pytest.MonkeyPatch.context() as tools:
            tools.setattr(build, "detect", lambda: hardware)
            tools.setenv("PATH", str(trtllm_tools.install(folder / "bin")), prepend=os.pathsep)
            build.Build(settings, say=lambda line: None).run()
        prepare(folder / "build")
        # It asks itself nothing meanwhile: tests count the requests of its engine.
        with serving(settings_for(folder / "build", baseline=baseline, probe_period_s=3600.0)) as server:
            yield server
