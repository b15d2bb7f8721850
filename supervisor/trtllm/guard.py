"""Before a TensorRT-LLM backend starts: does what was built fit what is here? One clear line instead of a crash."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flightline.engine_build.trtllm import host, versions
from flightline.supervisor.errors import ServeError
from flightline.torch_engine.core.config import FP8_CAPABILITY

BUILD = "make build-engines again, on this machine and in this container"


@dataclass(frozen=True)
class Facts:
    """What is here."""

    tensorrt_llm: str | None
    gpus: tuple[host.Gpu, ...]


def observe() -> Facts:
    return Facts(versions.installed(), tuple(host.gpus()))


def check(lane: str, engine_dir: Path, facts: Facts, rank_hosts: tuple[str, ...] = ()) -> int:
    """Returns the number of GPUs that the engine runs on.

    Args:
        rank_hosts: the node of each of them, this one first; none: all are here.

    Raises:
        ServeError: the engine is half-built, or made for another release, GPU or number of GPUs.
    """
    manifest = _manifest(engine_dir)
    plan, hardware = manifest["plan"], manifest["hardware"]
    world_size: int = plan.get("tp", 1) * plan.get("pp", 1)
    if refusal := versions.refusal(lane, facts.tensorrt_llm):
        raise ServeError(refusal)
    if not facts.gpus:
        raise ServeError(
            f"backend {lane} needs an NVIDIA GPU and none is visible: start the container with --gpus"
        )
    here_too = world_size
    if rank_hosts:
        if lane != versions.ENGINE_LANE:
            raise ServeError(
                f"MPI_HOSTS is for backend {versions.ENGINE_LANE} and this is {lane}: leave it out"
            )
        if len(rank_hosts) != world_size:
            raise ServeError(
                f"MPI_HOSTS names {len(rank_hosts)} GPUs and the engine runs on {world_size}: name as many"
            )
        here_too = rank_hosts.count(rank_hosts[0])
    if len(facts.gpus) < here_too:
        raise ServeError(
            f"the engine runs on {here_too} GPUs (TP {plan.get('tp', 1)}, PP {plan.get('pp', 1)}) "
            f"and {len(facts.gpus)} are visible: show more, or build with smaller TP and PP"
        )
    here = facts.gpus[0]
    if plan["precision"] in ("fp8", "nvfp4") and here.capability < FP8_CAPABILITY:
        raise ServeError(
            f"the engine is {plan['precision']} and {here.name} has compute capability "
            f"{_dotted(here.capability)} (FP8 needs {_dotted(FP8_CAPABILITY)}): "
            "build with PRECISION=int8_sq or int4_awq there"
        )
    if lane == versions.ENGINE_LANE:
        _require_same(manifest, engine_dir, hardware, world_size, facts)
    return world_size


def _manifest(engine_dir: Path) -> dict[str, Any]:
    path = engine_dir / "manifest.json"
    try:
        manifest: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        files = manifest["files"].items()
        damaged = [name for name, size in files if not _has_size(engine_dir / name, size)]
        manifest["plan"]["precision"], manifest["hardware"]["name"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ServeError(f"{path} is missing or damaged, so the engine may be half-built: {BUILD}") from None
    if damaged:
        raise ServeError(f"{engine_dir / damaged[0]} is missing or cut short: {BUILD}")
    return manifest


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _require_same(
    manifest: dict[str, Any], engine_dir: Path, hardware: dict[str, Any], world_size: int, facts: Facts
) -> None:
    """A compiled engine loads only where it was built: same TensorRT, same GPU architecture, same world size."""
    built_with, here = hardware.get("tensorrt_llm"), facts.gpus[0]
    if built_with != facts.tensorrt_llm:
        raise ServeError(
            f"the engine was built by TensorRT-LLM {built_with} and {facts.tensorrt_llm} is installed: {BUILD}"
        )
    if tuple(hardware.get("capability") or ()) != here.capability:
        raise ServeError(
            f"the engine was built on {hardware['name']} ({_dotted(hardware.get('capability') or ())}) and this "
            f"is {here.name} ({_dotted(here.capability)}): {BUILD}"
        )
    ranks = len(list(engine_dir.glob("rank*.engine")))
    if ranks != world_size:
        raise ServeError(
            f"the engine has {ranks} rank files and its manifest says {world_size} GPUs: {BUILD}"
        )


def _dotted(capability: Any) -> str:
    return ".".join(str(part) for part in capability)
