"""The kernels' tests once more: under AddressSanitizer and UBSan, and with vectors twice as wide as this machine's.

By hand: FLIGHTLINE_TEST_CXXFLAGS="-fsanitize=address,undefined -Og" LD_PRELOAD=$(g++ -print-file-name=libasan.so)
ASAN_OPTIONS=detect_leaks=0 python -m pytest tests/torch_engine/test_kernels.py
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from flightline.torch_engine.kernels.cpu.toolchain import X86, available_isas, compile_library, compiler

pytestmark = [pytest.mark.slow, pytest.mark.skipif(compiler() is None, reason="no C++ compiler")]
LESS = "not tokens and not portable and not forced"
"""Whole engines take long here, and find what their kernels do alone."""
SANITIZE = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -Og"
"""Compiling is most of the time, and at -Og half of what it is at -O1."""


def run(flags: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider"]
    # One library, without the portable one: compiling is most of the time.
    environment = {"FLIGHTLINE_TEST_CXXFLAGS": flags, "FLIGHTLINE_TEST_ISAS": available_isas()[0]}
    if "sanitize" in flags:
        environment |= {"LD_PRELOAD": asan(), "ASAN_OPTIONS": "detect_leaks=0"}
    return subprocess.run(
        [*command, str(Path(__file__).with_name("test_kernels.py")), *options],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def asan() -> str:
    """Path of the compiler's AddressSanitizer library; empty if it has none."""
    command = shutil.which("g++")
    if command is None:
        return ""
    found = subprocess.run(
        [command, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True
    )
    return found.stdout.strip() if os.path.isabs(found.stdout) else ""


def test_address_and_undefined_behaviour() -> None:
    if not asan():
        pytest.skip("no g++ with libasan.so")
    done = run(SANITIZE, "-k", LESS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_wide_vectors() -> None:
    """What AVX-512 runs, but for its own instructions: the compiler makes two of each vector here, and the code that
    is for no machine in particular replaces what is for this one; under the sanitizers, too, if there are any."""
    flags = SANITIZE if asan() else "-Og"
    done = run(f"-DFL_LANES=16 {flags}", "-k", f"(linear or attention or norm or neighbours) and {LESS}")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.mark.skipif(not X86, reason="instructions of x86")
def test_avx512_compiles(tmp_path: Path) -> None:
    """It can only be compiled on a machine without it."""
    (library,) = compile_library(tmp_path, ["avx512"], ("-O1",))
    assert library.stat().st_size > 0
