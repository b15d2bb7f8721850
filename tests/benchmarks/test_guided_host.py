"""What guides cost a GPU's host, in the small."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_all_requests_get_their_tokens() -> None:
    """A step whose requests have failed would take no time at all."""
    command = [sys.executable, "benchmarks/guided_host.py", "--rows", "2", "--plain", "1", "--steps", "3"]
    env = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, "--rounds", "1"], cwd=ROOT, env=env, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr[-3000:]
    (line,) = map(json.loads, run.stdout.splitlines())
    assert set(line) == {"round", "us", "fetch", "mask", "without guides"}
    assert line["mask"]["own"] > 0
