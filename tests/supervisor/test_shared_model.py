"""A server whose model is shared by two ranks: it answers, survives the loss of one, and leaves no process."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from flightline.deployment import FILE, Deployment
from flightline.supervisor.serve import Server
from flightline.torch_engine.core.config import EngineConfig
from tests.model_repository.endpoints import Call, GrpcError, ask, wait_until
from tests.serving import CONTEXT, WATCHFUL, serving, settings_for
from tests.supervisor.test_faults import recovered

LONG = {"text_input": "the dog", "max_tokens": CONTEXT - 100, "end_id": -1, "stream": True}


@pytest.fixture(scope="module")
def lines() -> list[str]:
    """What the server says."""
    return []


@pytest.fixture(scope="module")
def shared(tiny_build: Path, tmp_path_factory: pytest.TempPathFactory, lines: list[str]) -> Iterator[Server]:
    """The engine of ``tiny_build`` as ``TP=2`` would have built it."""
    build, one = tmp_path_factory.mktemp("shared"), Deployment.load(tiny_build)
    folder = build / "engine"
    shutil.copytree(one.engine_dir, folder)
    ranks = {"tensor_parallel_size": 2, "kernels": "pytorch", "kernel_dir": ""}
    EngineConfig.load(one.engine_dir, **ranks).save(folder)
    (build / FILE).write_text(dataclasses.replace(one, engine_dir=folder, world_size=2).text())
    with serving(settings_for(build, baseline=False, **WATCHFUL), lines.append) as server:
        yield server


def ranks(server: Server) -> list[psutil.Process]:
    """The processes of all ranks but the first."""
    return [
        child for child in psutil.Process(server.engine_pids[0]).children()
        if "flightline.torch_engine.process.rank" in child.cmdline()
    ]  # fmt: skip


@pytest.mark.slow
def test_the_loss_of_a_rank(shared: Server, lines: list[str]) -> None:
    said = ask(shared, "ensemble", "the cat", 8, end_id=-1).text
    assert "shared by 2 ranks" in shared.engine.info.description
    first, (rank,) = shared.engine_pids[0], ranks(shared)
    call = Call(shared, "text_generation", LONG)
    call.next()
    rank.kill()
    with pytest.raises(GrpcError, match="the engine process ended while this request was in flight"):
        call.read()
    wait_until(lambda: shared.engine.connected and shared.engine_pids[0] != first)
    recovered(shared)
    assert not psutil.pid_exists(rank.pid) and len(ranks(shared)) == 1
    assert ask(shared, "ensemble", "the cat", 8, end_id=-1).text == said
    log = (shared.settings.run_dir / "engine.log").read_text()
    assert f"rank 1 of 2 (pid {rank.pid}) was killed by SIGKILL" in log
    assert "the engine process ended with status 1: restarting it" in lines


@pytest.mark.slow
def test_no_rank_outlives_its_engine(shared: Server) -> None:
    wait_until(lambda: shared.engine.connected and shared.wait_ready(0.1))
    first, (rank,) = shared.engine_pids[0], ranks(shared)
    psutil.Process(first).kill()
    wait_until(lambda: not rank.is_running())
    wait_until(lambda: shared.engine.connected and shared.engine_pids[0] != first)
    recovered(shared)
    assert ask(shared, "ensemble").text
