"""The kernels' tests in Triton's interpreter, which has to be switched on before Triton is imported: in one process of
their own, since each would import PyTorch and Transformers once more."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.torch_engine.test_triton_ops import HAS_TRITON, INTERPRETED

FILES = ("test_triton_ops.py", "test_sampling_ops.py", "test_exchange.py", "test_mixture_ops.py")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_TRITON, reason="Triton's language is not installed: pip install triton")
@pytest.mark.skipif(INTERPRETED, reason="this is the interpreter's run")
def test_kernels_in_the_interpreter() -> None:
    files = [Path(__file__).with_name(name) for name in FILES]
    command = [sys.executable, "-m", "pytest", "-v", "-x", "-p", "no:cacheprovider", "-W", "ignore", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    # Tests that were skipped would pass as well.
    assert set(re.findall(r"(\w+\.py)::.* PASSED", run.stdout)) == set(FILES)
