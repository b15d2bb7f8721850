"""What all tests share: the kernels are compiled once."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator

import pytest

from flightline.torch_engine.kernels.cpu.toolchain import compiler
from tests import compiler_cache

pytest_plugins = ["tests.serving"]

# A shell that runs this in the background has SIGINT ignored, and so would all that the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

LONGEST = (
    *("test_runs.py", "test_sanitizers.py", "test_kernels_in_the_interpreter.py", "test_embedded.py"),
    *("test_faults.py", "test_nvidia_clients.py", "test_smollm2.py", "test_kernels.py", "test_sampling.py"),
    *("test_tensor_parallel.py", "test_triton_compile.py"),
)
"""Files of minutes, and the last one by name. Begun last, one of them would keep one worker busy and the other idle."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session", autouse=True)
def compile_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Builds in this process and in others find the kernels that an earlier one compiled."""
    found = compiler()
    if (
        found is None or compiler_cache.VARIABLE in os.environ
    ):  # none, or the cache of the test that started this
        yield
        return
    folder = tmp_path_factory.getbasetemp()
    in_a_worker = "PYTEST_XDIST_WORKER" in os.environ
    cache = (folder.parent if in_a_worker else folder) / "compiled"
    cache.mkdir(exist_ok=True)
    script = folder / "c++"
    script.write_text(f'#!/bin/sh\nexec {sys.executable} -S {compiler_cache.__file__} {cache} {found} "$@"\n')
    script.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CXX", str(script))
        patch.setenv(compiler_cache.VARIABLE, str(cache))
        yield
