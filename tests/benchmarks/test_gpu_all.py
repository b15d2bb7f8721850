"""The order of the GPU benchmark; what its steps do needs a GPU."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[2]


def gpu_all(folder: Path, python: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": python, "PEER": "", "PEER_SERVED": ""} | variables
    command = ["sh", "benchmarks/gpu_all.sh", str(folder)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)


def test_correctness_first_and_every_command_exists(tmp_path: Path) -> None:
    done = gpu_all(tmp_path, "echo", PEER="peer fp8", PEER_SERVED="echo the peer, served")
    assert done.returncode == 0, done.stderr
    steps = re.findall(r"^== (\S+)$", done.stdout, flags=re.M)
    assert steps[:7] == ["correctness", "compare", "gaps", "checkpoint", "served", "peer-served", "build"]
    assert "--peer peer fp8 --" in done.stdout and "the peer, served" in done.stdout
    scripts = re.findall(r"^(benchmarks/\S+\.py) ", done.stdout, flags=re.M)
    assert "-m pytest -q -m gpu tests/torch_engine" in done.stdout
    assert len(scripts) >= 5 and all((ROOT / script).is_file() for script in scripts)
    assert "-m flightline.loadtest compare --levels 1,64" in (tmp_path / "loadtest" / "log").read_text()


def test_nothing_is_measured_of_an_engine_that_is_wrong(tmp_path: Path) -> None:
    done = gpu_all(tmp_path, "false")
    assert done.returncode == 1 and re.findall(r"^== (.*)$", done.stdout, flags=re.M) == ["correctness"]
    assert "correctness failed: see" in done.stderr
