"""Under which conditions a run was measured, so that somebody else can repeat it."""

from __future__ import annotations

import json
import platform
import subprocess
from dataclasses import asdict
from datetime import datetime
from importlib import metadata
from pathlib import Path

import psutil

from flightline.deployment import FILE
from flightline.loadtest.options import LoadOptions
from flightline.loadtest.telemetry import Gpus

PROJECT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "torch", "transformers", "tokenizers", "numpy", "nvidia-modelopt", "nvidia-pytriton", "tritonclient",
    "grpcio", "locust",
)  # fmt: skip


def deployment(build_dir: Path) -> dict:
    """What ``make build-engines`` left for servers and clients; empty if nothing is built."""
    try:
        return json.loads((build_dir / FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def cores() -> int:
    """Logical CPUs of this machine."""
    return psutil.cpu_count() or 1


def gather(options: LoadOptions, gpus: Gpus, deployed: dict) -> dict:
    """Everything but the measurements; ``deployed`` is empty if the server was started elsewhere."""
    return {
        "created": datetime.now().astimezone().isoformat(timespec="seconds"),
        "settings": asdict(options),
        "model": deployed.get("model"),
        "lane": deployed.get("lane"),
        "precision": deployed.get("precision"),
        "baseline": deployed.get("baseline"),
        "hardware": {
            "cpu": _cpu_name(),
            "cores": psutil.cpu_count(),
            "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
            "gpu": ", ".join(gpus.names) or gpus.missing,
            "system": platform.platform(),
        },
        "versions": {"python": platform.python_version(), **_versions()},
        "git_commit": _git_commit(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def _versions() -> dict[str, str]:
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _git_commit() -> str:
    """Commit id, with ``+changes`` if the working tree differs from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(PROJECT), *arguments], capture_output=True, text=True, check=True
        ).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
