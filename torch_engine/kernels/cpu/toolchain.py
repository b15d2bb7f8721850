"""The C++ compiler, and the CPU kernels compiled for several instruction sets. No torch.

No torch, because the build's plan asks before it imports anything heavy.
"""

from __future__ import annotations

import errno
import os
import platform
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterable
from pathlib import Path

SOURCES = Path(__file__).parent
X86 = platform.machine() in ("x86_64", "AMD64")

# No -ffast-math: it would break infinities, set the flush-to-zero flag of the whole process, and add up sums in an
# order that depends on the number of rows. Sums that may be reordered say so (omp simd reduction).
FLAGS = (
    *("-O3", "-std=c++20", "-fPIC", "-shared", "-pthread", "-fopenmp-simd", "-ffp-contract=fast"),
    *("-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros"),
)
ISAS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "avx512": (
        ("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni"),
        ("-march=x86-64-v4", "-mavx512vnni", "-mprefer-vector-width=512"),
    ),
    "avx2": (("avx2", "fma"), ("-march=x86-64-v3",)),
    "portable": ((), ("-O1",) if X86 else ("-mcpu=native",)),
}
"""Instruction sets, the best first: the CPU flags that one needs (Linux's names) and the compiler's options.
On x86 the portable one is for the rare CPU without AVX2, so it is compiled quickly rather than well."""


class NoCompiler(RuntimeError):
    """The kernels cannot be compiled on this machine; the message says why."""


def compiler() -> str | None:
    """Path of ``$CXX``, else g++, else clang++; None if there is none."""
    named = os.environ.get("CXX")
    return shutil.which(named) if named else shutil.which("g++") or shutil.which("clang++")


def available_isas() -> list[str]:
    """Names in ``ISAS`` that this machine's CPU runs, the best first."""
    flags = _cpu_flags()
    return [name for name, (needed, _) in ISAS.items() if (X86 or not needed) and flags.issuperset(needed)]


def library(folder: str | Path, isa: str) -> Path:
    return Path(folder) / f"kernels-{isa}.so"


def is_whole(path: Path) -> bool:
    """Whether a 64-bit ELF file is as long as its header says: its section headers come last (System V ABI)."""
    with path.open("rb") as file:
        header = file.read(64)
        if len(header) < 64 or header[:5] != b"\x7fELF\x02":
            return False
        order = "<" if header[5] == 1 else ">"
        (sections_at,) = struct.unpack_from(f"{order}Q", header, 40)
        size, count = struct.unpack_from(f"{order}HH", header, 58)
        end: int = sections_at + size * count
        return os.fstat(file.fileno()).st_size >= end


def compile_library(
    folder: str | Path, isas: Iterable[str] | None = None, extra_flags: tuple[str, ...] = ()
) -> list[Path]:
    """Compiles the CPU kernels into ``folder``, all at once; returns the libraries' paths.

    Args:
        isas: names in ``ISAS``; by default the best of this machine's CPU, and the portable one in case that
            the folder moves to another.

    Raises:
        NoCompiler: there is no C++ compiler, or it failed; nothing is left in ``folder``.
        OSError: the disk is full, which other kernels would not cure.
    """
    command = compiler()
    if command is None:
        raise NoCompiler("no C++ compiler found (CXX, g++, clang++)")
    targets = {isa: library(folder, isa) for isa in isas or {available_isas()[0], "portable"}}
    # The compiler's temporary files are inside, too: whoever removes the folder after a kill removes them.
    with tempfile.TemporaryDirectory(dir=folder, prefix="compiling-") as workshop:
        partial = {isa: Path(workshop) / target.name for isa, target in targets.items()}
        runs = {
            isa: subprocess.Popen(
                [command, *FLAGS, *ISAS[isa][1], *extra_flags, "-o", str(path), str(SOURCES / "kernels.cpp")],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                env=os.environ | {"TMPDIR": workshop},
            )
            for isa, path in partial.items()
        }
        errors = [run.communicate()[1] for run in runs.values()]
        failed = [error for run, error in zip(runs.values(), errors, strict=True) if run.returncode != 0]
        if failed:
            if os.strerror(errno.ENOSPC) in failed[0]:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
            raise NoCompiler(f"{command} failed: {(failed[0].strip().splitlines() or ['no message'])[0]}")
        for isa, target in targets.items():
            os.replace(partial[isa], target)
    return list(targets.values())


def _cpu_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))
