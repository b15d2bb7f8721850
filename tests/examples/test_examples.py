"""Each example runs as it stands, against a real server, and says what its README says."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
PROGRAMS = sorted(EXAMPLES.glob("*.py"))
MOST_LINES = 40


def test_each_is_short_and_listed():
    listed = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    assert len(PROGRAMS) >= 6
    for program in PROGRAMS:
        assert len(program.read_text(encoding="utf-8").splitlines()) <= MOST_LINES, program.name
        assert f"`{program.name}`" in listed


@pytest.mark.slow
@pytest.mark.parametrize("program", PROGRAMS, ids=lambda path: path.stem)
def test_it_runs(program: Path, served):
    settings = served.settings
    environment = os.environ | {
        "GRPC_PORT": str(settings.grpc_port),
        "HTTP_PORT": str(settings.http_port),
        "BUILD_DIR": str(settings.build_dir),
    }
    run = subprocess.run(
        [sys.executable, str(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip()
    assert "Traceback" not in run.stderr


def test_without_a_server_it_says_so(tmp_path: Path):
    program = EXAMPLES / "answer.py"
    environment = os.environ | {"GRPC_PORT": "1", "BUILD_DIR": str(tmp_path)}
    run = subprocess.run(
        [sys.executable, str(program)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1
